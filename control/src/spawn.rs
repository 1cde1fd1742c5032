//! How a VMM process is started.

use std::{
    env,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    process::{Child, Command},
    time::timeout,
};

use crate::{Failure, LaunchSpec, Launched, Registry, RegistryError};

/// The environment variable that says which messages a program of fermata's writes to standard error, in
/// the syntax of `tracing_subscriber`'s `EnvFilter`.
pub const LOG_VARIABLE: &str = "FERMATA_LOG";

/// How many logs and consoles of ended VMMs are kept.
const KEPT_LOGS: usize = 128;

/// The longest answer that is read.
const MAX_ANSWER_BYTES: u64 = 64 << 10;

/// How long a VMM that has said that it failed may take to exit.
const EXIT_BOUND: Duration = Duration::from_secs(5);

/// Where a VMM's standard error goes.
#[derive(Debug)]
pub enum Log {
    /// To [`Registry::log_of`] it.
    File,
    /// To this terminal, which with [`Console::Terminal`](crate::Console::Terminal) is its console.
    Terminal(OwnedFd),
}

/// A VMM process that serves. It lives on when this is dropped.
#[derive(Debug)]
pub struct Spawned {
    /// Its process id.
    pub pid: u32,
    /// Loopback port of its control service.
    pub port: u16,
    /// The process, whose exit status its parent can learn; see [`Exit`](crate::Exit).
    pub child: Child,
}

/// Why a VMM could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The program cannot be run.
    #[error("cannot run {}; set FERMATA_VMM_BIN to the path of fermata-vmm", path.display())]
    Program {
        /// The program.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The run directory cannot be used.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Its log cannot be made.
    #[error("cannot write the log of the new VMM in {}", dir.display())]
    Log {
        /// The run directory.
        dir: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It answered that it cannot run the machine.
    #[error(transparent)]
    Refused(#[from] Failure),
    /// It ended without an answer.
    #[error("the VMM process {pid} ended ({status}) before its machine ran; its log says why")]
    Died {
        /// Its process id.
        pid: u32,
        /// How it ended.
        status: ExitStatus,
    },
    /// It did not answer in time and was killed.
    #[error(
        "the VMM process {pid} did not start its machine within {} s and was killed; \
         its log says how far it came", deadline.as_secs()
    )]
    Deadline {
        /// Its process id.
        pid: u32,
        /// The time it had.
        deadline: Duration,
    },
    /// It answered something else, or could not be spoken to.
    #[error("{} does not speak this release's launch protocol; install both from one release", path.display())]
    Protocol {
        /// The program.
        path: PathBuf,
        /// What was wrong.
        #[source]
        source: io::Error,
    },
}

/// Starts the VMM program `program` with `spec` and waits until it serves, though not longer than
/// `deadline`.
///
/// It gets a process group of its own, so that a Ctrl-C for its parent is not one for it.
///
/// # Errors
///
/// [`SpawnError`]; no process is left behind.
pub async fn spawn(
    program: &Path,
    spec: &LaunchSpec,
    log: Log,
    deadline: Duration,
) -> Result<Spawned, SpawnError> {
    let registry = Registry::open(&spec.registry)?;
    registry.prune(KEPT_LOGS)?;
    let (mut child, pid) = start(program, &registry, log)?;
    let answer = match timeout(deadline, launch(&mut child, spec)).await {
        Ok(answer) => answer,
        Err(_) => {
            end(&mut child, Duration::ZERO).await;
            return Err(SpawnError::Deadline { pid, deadline });
        }
    };
    match answer {
        Ok(Some(Launched::Ready { port })) => Ok(Spawned { pid, port, child }),
        Ok(Some(Launched::Failed(failure))) => {
            end(&mut child, EXIT_BOUND).await;
            Err(SpawnError::Refused(failure))
        }
        answer => {
            let path = program.to_owned();
            Err(match (end(&mut child, EXIT_BOUND).await, answer) {
                (Some(status), Ok(_)) => SpawnError::Died { pid, status },
                (None, Ok(_)) => SpawnError::Protocol {
                    path,
                    source: io::ErrorKind::UnexpectedEof.into(),
                },
                (_, Err(source)) => SpawnError::Protocol { path, source },
            })
        }
    }
}

fn start(program: &Path, registry: &Registry, log: Log) -> Result<(Child, u32), SpawnError> {
    let log_error = |source| SpawnError::Log {
        dir: registry.dir().to_owned(),
        source,
    };
    // The log is named after the process, whose id is known only when it has its log.
    let mut command = Command::new(program);
    let unnamed = match log {
        Log::Terminal(terminal) => {
            command.stderr(Stdio::from(terminal));
            // Its usual messages would stand between what the guest writes.
            if env::var_os(LOG_VARIABLE).is_none() {
                command.env(LOG_VARIABLE, "warn");
            }
            None
        }
        Log::File => {
            let file = tempfile::NamedTempFile::new_in(registry.dir()).map_err(log_error)?;
            let stderr = File::try_clone(file.as_file()).map_err(log_error)?;
            command.stderr(Stdio::from(stderr));
            Some(file)
        }
    };
    let child = command
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|source| SpawnError::Program {
            path: program.to_owned(),
            source,
        })?;
    // A child that has not been waited for has an id.
    let pid = child.id().unwrap_or_default();
    if let Some(file) = unnamed {
        file.persist(registry.log_of(pid))
            .map_err(|e| log_error(e.error))?;
    }
    Ok((child, pid))
}

/// Hands over the spec and reads the answer: `None` if the process closed its output without one.
async fn launch(child: &mut Child, spec: &LaunchSpec) -> io::Result<Option<Launched>> {
    let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(io::Error::other("the child has no pipes"));
    };
    let spec = serde_json::to_vec(spec)?;
    match stdin.write_all(&spec).await {
        // It ended without reading; that it gave no answer says more.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
        written => written?,
    }
    drop(stdin);
    let mut answer = Vec::new();
    BufReader::new(stdout)
        .take(MAX_ANSWER_BYTES)
        .read_until(b'\n', &mut answer)
        .await?;
    if answer.is_empty() {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&answer)?))
}

/// Waits for the process to exit by itself within `bound` and returns how it did; else kills it.
async fn end(child: &mut Child, bound: Duration) -> Option<ExitStatus> {
    if let Ok(Ok(status)) = timeout(bound, child.wait()).await {
        return Some(status);
    }
    let _ = child.kill().await;
    None
}
