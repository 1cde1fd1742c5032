//! How VMM processes are started.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};

use futures::future::join_all;
use rustix::io::Errno;
use tokio::{process::Child, time::timeout};

use crate::{
    Errand, Failure, HotImage, LaunchSpec, Registry, RegistryError, Secret, Shape,
    started::{EXIT_BOUND, Made, Started, end},
    stop::{Asked, Coming, ask},
};

/// How many logs and consoles of ended VMMs are kept.
const KEPT_LOGS: usize = 128;

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

impl Spawned {
    /// Asks the VMM, whose clients know `secret`, to stop, and kills it if it does not answer, or has not ended, within `grace`, or nothing of
    /// what its disks stand on has come for so long; says how it ended. It need not be in the registry.
    ///
    /// # Errors
    ///
    /// When it cannot be waited for.
    pub async fn stop(&mut self, secret: &Secret, grace: Duration) -> io::Result<ExitStatus> {
        let grace = match ask(self.pid, self.port, secret, grace).await {
            Asked::Ends => grace,
            Asked::Silent => Duration::ZERO,
        };
        let mut coming = Coming::default();
        while timeout(grace, self.child.wait()).await.is_err() {
            if !coming.goes_on(self.port, secret, grace).await {
                break;
            }
        }
        end(&mut self.child, Duration::ZERO).await;
        self.child.wait().await
    }
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
    /// The host is short of something, as a rule.
    #[error(
        "no process can be started; raise the limits of processes and of open files, or end some machines"
    )]
    Host(#[source] io::Error),
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

impl SpawnError {
    /// `program` could not be started.
    pub(crate) fn of_start(program: &Path, source: io::Error) -> Self {
        let short = [Errno::AGAIN, Errno::MFILE, Errno::NFILE, Errno::NOMEM];
        match Errno::from_io_error(&source) {
            Some(errno) if short.contains(&errno) => Self::Host(source),
            _ => Self::Program {
                path: program.to_owned(),
                source,
            },
        }
    }

    /// Whether a file system, or what somebody may have of one, is full.
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::Log { source, .. } => is_full(source),
            Self::Registry(error) => error.is_no_space(),
            _ => false,
        }
    }
}

pub(crate) fn is_full(error: &io::Error) -> bool {
    let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
    full.contains(&error.kind())
}

/// Starts the VMM program `program` with `spec`, whose origin is no fork, and waits until it serves, though not longer than
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
    let registry = open_pruned(&spec.registry)?;
    let started = Started::new(program, &registry, log)?;
    started.run(spec.clone(), None, deadline).await
}

/// Starts a VMM for each of `specs` on `image`, all at once: all of them serve when this returns, or none is left. None runs before
/// all are made, so that of those that cannot all be there no guest has done anything. Each step may take as long as `deadline`.
///
/// # Errors
///
/// The first [`SpawnError`].
pub async fn fork(
    program: &Path,
    image: &HotImage,
    specs: Vec<LaunchSpec>,
    deadline: Duration,
) -> Result<Vec<Spawned>, SpawnError> {
    let Some(first) = specs.first() else {
        return Ok(Vec::new());
    };
    let registry = open_pruned(&first.registry)?;
    let start = || Started::new(program, &registry, Log::File);
    fork_in(start, image, specs, deadline).await
}

/// As [`fork`], in processes that `start` gives.
pub(crate) async fn fork_in(
    start: impl Fn() -> Result<Started, SpawnError>,
    image: &HotImage,
    specs: Vec<LaunchSpec>,
    deadline: Duration,
) -> Result<Vec<Spawned>, SpawnError> {
    if let [spec] = &specs[..] {
        let forked = start()?.run(spec.clone(), Some(image), deadline).await?;
        return Ok(vec![forked]);
    }
    let secrets: Vec<_> = specs.iter().map(|spec| spec.secret.clone()).collect();
    let makes = specs
        .into_iter()
        .map(async |spec| start()?.make(spec, image, deadline).await);
    let made = match all(join_all(makes).await) {
        Ok(made) => made,
        Err((made, error)) => {
            join_all(made.into_iter().flatten().map(Made::call_off)).await;
            return Err(error);
        }
    };
    let begins = made.into_iter().map(|made| made.begin(deadline));
    match all(join_all(begins).await) {
        Ok(forked) => Ok(forked),
        Err((forked, error)) => {
            let both = forked.into_iter().zip(secrets);
            let stops = both.filter_map(|(forked, secret)| {
                let mut forked = forked?;
                Some(async move { forked.stop(&secret, EXIT_BOUND).await })
            });
            join_all(stops).await;
            Err(error)
        }
    }
}

/// All of `results`, or those that there are, each in its place, and the first error.
fn all<T>(results: Vec<Result<T, SpawnError>>) -> Result<Vec<T>, (Vec<Option<T>>, SpawnError)> {
    let mut failed = None;
    let mut there = Vec::new();
    for result in results {
        there.push(match result {
            Ok(one) => Some(one),
            Err(error) => {
                failed = failed.or(Some(error));
                None
            }
        });
    }
    match failed {
        None => Ok(there.into_iter().flatten().collect()),
        Some(error) => Err((there, error)),
    }
}

/// Has a process of `program` do `errand`, which is to write a saved machine into `memory`.
pub(crate) async fn make_image(
    program: &Path,
    registry: &Path,
    errand: &Errand,
    memory: BorrowedFd<'_>,
    deadline: Duration,
) -> Result<Shape, SpawnError> {
    let started = Started::new(program, &open_pruned(registry)?, Log::File)?;
    started.write_image(errand, memory, deadline).await
}

pub(crate) fn open_pruned(registry: &Path) -> Result<Registry, SpawnError> {
    let registry = Registry::open(registry)?;
    registry.prune(KEPT_LOGS)?;
    Ok(registry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_is_short_of_is_not_the_program() {
        let of = |errno: Errno| SpawnError::of_start(Path::new("/vmm"), errno.into());
        for errno in [Errno::AGAIN, Errno::MFILE, Errno::NFILE, Errno::NOMEM] {
            assert!(matches!(of(errno), SpawnError::Host(_)), "{errno}");
        }
        for errno in [Errno::NOENT, Errno::ACCESS, Errno::NOEXEC] {
            assert!(matches!(of(errno), SpawnError::Program { .. }), "{errno}");
        }
        let log = |errno: Errno| SpawnError::Log {
            dir: "/run".into(),
            source: errno.into(),
        };
        assert!(log(Errno::NOSPC).is_no_space() && log(Errno::DQUOT).is_no_space());
        assert!(!log(Errno::IO).is_no_space() && !of(Errno::NOENT).is_no_space());
        let registry = |errno: Errno| RegistryError::Io {
            path: "/run".into(),
            source: errno.into(),
        };
        assert!(SpawnError::from(registry(Errno::NOSPC)).is_no_space());
        assert!(!registry(Errno::ACCESS).is_no_space());
    }
}
