//! A VMM process that does errands.

use std::{
    env,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::UnixStream,
    process::{Child, ChildStdout, Command},
    time::timeout,
};

use crate::{
    Errand, HotImage, LaunchSpec, Launched, Log, Registry, Shape, SpawnError, Spawned, errand,
};

/// The environment variable that says which messages a program of fermata's writes to standard error: levels by where they
/// come from, like `info,tarpc=warn`.
pub const LOG_VARIABLE: &str = "FERMATA_LOG";

/// The longest answer that is read.
const MAX_ANSWER_BYTES: u64 = 64 << 10;

/// How long a VMM that has failed, or is not wanted any more, may take to exit.
pub(crate) const EXIT_BOUND: Duration = Duration::from_secs(5);

/// A VMM process that waits for an errand. If this is dropped instead, it ends.
#[derive(Debug)]
pub(crate) struct Started {
    program: PathBuf,
    pid: u32,
    child: Child,
    /// Its standard input.
    errands: UnixStream,
    /// Its standard output.
    answers: BufReader<ChildStdout>,
}

/// One whose machine is made and stands still. If this is dropped before it begins, it ends.
pub(crate) struct Made(Started);

impl Started {
    /// Starts `program`.
    pub(crate) fn new(program: &Path, registry: &Registry, log: Log) -> Result<Self, SpawnError> {
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
        let failed = |source| SpawnError::of_start(program, source);
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(SpawnError::Host)?;
        ours.set_nonblocking(true).map_err(SpawnError::Host)?;
        let errands = UnixStream::from_std(ours).map_err(SpawnError::Host)?;
        let mut child = command
            .current_dir("/")
            // An arena for each of its few threads would be pages of its own and no gain.
            .env("MALLOC_ARENA_MAX", "1")
            .process_group(0)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        // A child that has not been waited for has an id.
        let pid = child.id().unwrap_or_default();
        if let Some(file) = unnamed {
            file.persist(registry.log_of(pid))
                .map_err(|e| log_error(e.error))?;
        }
        let answers = child.stdout.take();
        let answers =
            answers.ok_or_else(|| SpawnError::Host(io::Error::other("the child has no pipe")))?;
        Ok(Self {
            program: program.to_owned(),
            pid,
            child,
            errands,
            answers: BufReader::new(answers),
        })
    }

    /// Has it prepare for a machine of this size; if there is an image, for forks of that.
    pub(crate) async fn prepare(
        self,
        shape: Shape,
        image: Option<&HotImage>,
        deadline: Duration,
    ) -> Result<Self, SpawnError> {
        let errand = Errand::Prepare(shape);
        match self.ask(&errand, image.map(AsFd::as_fd), deadline).await? {
            (this, Launched::Prepared) => Ok(this),
            (this, other) => Err(this.unexpected(other).await),
        }
    }

    /// Whether it has not ended.
    pub(crate) fn lives(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Has it make a machine and let that run. If this is dropped before, it ends when it has made it.
    pub(crate) async fn run(
        self,
        spec: LaunchSpec,
        image: Option<&HotImage>,
        deadline: Duration,
    ) -> Result<Spawned, SpawnError> {
        let errand = Errand::Run(Box::new(spec));
        let (this, launched) = self.ask(&errand, image.map(AsFd::as_fd), deadline).await?;
        this.ready(launched).await
    }

    /// Has it make a machine of `image` that stands still.
    pub(crate) async fn make(
        self,
        spec: LaunchSpec,
        image: &HotImage,
        deadline: Duration,
    ) -> Result<Made, SpawnError> {
        let errand = Errand::Make(Box::new(spec));
        match self.ask(&errand, Some(image.as_fd()), deadline).await? {
            (this, Launched::Made) => Ok(Made(this)),
            (this, other) => Err(this.unexpected(other).await),
        }
    }

    /// Has it do `errand`, which is to write an image into `memory`, and end.
    pub(crate) async fn write_image(
        self,
        errand: &Errand,
        memory: BorrowedFd<'_>,
        deadline: Duration,
    ) -> Result<Shape, SpawnError> {
        match self.ask(errand, Some(memory), deadline).await? {
            (mut this, Launched::Written(shape)) => {
                end(&mut this.child, EXIT_BOUND).await;
                Ok(shape)
            }
            (this, other) => Err(this.unexpected(other).await),
        }
    }

    async fn ready(self, launched: Launched) -> Result<Spawned, SpawnError> {
        match launched {
            Launched::Ready { port } => Ok(Spawned {
                pid: self.pid,
                port,
                child: self.child,
            }),
            other => Err(self.unexpected(other).await),
        }
    }

    /// The process answered what belongs to another errand.
    async fn unexpected(mut self, launched: Launched) -> SpawnError {
        end(&mut self.child, Duration::ZERO).await;
        SpawnError::Protocol {
            path: self.program,
            source: io::Error::other(format!("it answered {launched:?}")),
        }
    }

    /// Gives it `errand`, and returns it with what it answers within `deadline`, unless that is a failure, after which it is gone.
    async fn ask(
        mut self,
        errand: &Errand,
        with: Option<BorrowedFd<'_>>,
        deadline: Duration,
    ) -> Result<(Self, Launched), SpawnError> {
        let said = match timeout(deadline, self.exchange(errand, with)).await {
            Ok(Ok(Some(launched))) if !matches!(launched, Launched::Failed(_)) => {
                return Ok((self, launched));
            }
            other => other,
        };
        let Self {
            program: path,
            pid,
            mut child,
            errands,
            answers,
        } = self;
        // Nobody listens any more, which ends one that goes on talking.
        drop((errands, answers));
        let bound = said.as_ref().map_or(Duration::ZERO, |_| EXIT_BOUND);
        let status = end(&mut child, bound).await;
        Err(match (said, status) {
            (Err(_), _) => SpawnError::Deadline { pid, deadline },
            (Ok(Ok(Some(Launched::Failed(failure)))), _) => SpawnError::Refused(failure),
            (Ok(Ok(_)), Some(status)) => SpawnError::Died { pid, status },
            (Ok(Ok(_)), None) => SpawnError::Protocol {
                path,
                source: io::ErrorKind::UnexpectedEof.into(),
            },
            (Ok(Err(source)), _) => SpawnError::Protocol { path, source },
        })
    }

    /// Hands over the errand and reads the answer: `None` if the process closed its output without one.
    async fn exchange(
        &mut self,
        errand: &Errand,
        with: Option<BorrowedFd<'_>>,
    ) -> io::Result<Option<Launched>> {
        match errand::give(&mut self.errands, errand, with).await {
            // It ended without reading; that it gave no answer says more.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::BrokenPipe
                        | io::ErrorKind::NotConnected
                        | io::ErrorKind::ConnectionReset
                ) => {}
            given => given?,
        }
        let mut answer = Vec::new();
        (&mut self.answers)
            .take(MAX_ANSWER_BYTES)
            .read_until(b'\n', &mut answer)
            .await?;
        if answer.is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&answer)?))
    }
}

impl Made {
    /// Lets the machine run.
    pub(crate) async fn begin(self, deadline: Duration) -> Result<Spawned, SpawnError> {
        let (started, launched) = self.0.ask(&Errand::Begin, None, deadline).await?;
        started.ready(launched).await
    }

    /// Has it end, with what there is of the machine.
    pub(crate) async fn call_off(self) {
        let Started {
            mut child, errands, ..
        } = self.0;
        drop(errands);
        end(&mut child, EXIT_BOUND).await;
    }
}

/// Waits for the process to exit by itself within `bound` and returns how it did; else kills it.
pub(crate) async fn end(child: &mut Child, bound: Duration) -> Option<ExitStatus> {
    if let Ok(Ok(status)) = timeout(bound, child.wait()).await {
        return Some(status);
    }
    let _ = child.kill().await;
    None
}
