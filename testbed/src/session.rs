//! One place to run programs that need a real KVM, wherever that is.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::job::{Job, Output};
use crate::kvm::Level;
use crate::l1::{self, L1};

/// A machine with a KVM that boots stock kernels: this one, or an L1.
///
/// Paths mean the same in both, except that in L1 `/tmp` starts empty, and that what is written there
/// outside of the share is gone when the session ends.
pub enum Session {
    /// Commands run on this machine.
    Native,
    /// Commands run in an emulated machine.
    Nested(Box<L1>),
}

impl Session {
    /// Opens a session at `level` with the directory `share`, which must exist.
    /// Two sessions are two different machines at level [`Level::Nested`] only.
    ///
    /// # Errors
    /// [`Breakdown`](l1::Breakdown) when L1 does not come up.
    pub fn open(level: Level, share: &Path) -> Result<Self> {
        match level {
            Level::Native => Ok(Self::Native),
            Level::Nested => Ok(Self::Nested(Box::new(L1::boot(&l1::Options::new(share))?))),
        }
    }

    /// How long opening took, when there was something to boot.
    #[must_use]
    pub fn boot_time(&self) -> Option<Duration> {
        match self {
            Self::Native => None,
            Self::Nested(l1) => Some(l1.boot_time()),
        }
    }

    /// Runs `job` and waits for it.
    ///
    /// # Errors
    /// When it cannot be started; [`Breakdown`](l1::Breakdown) when its machine breaks down. A job that fails or runs out of time is no error.
    pub fn run(&mut self, job: &Job) -> Result<Output> {
        match self {
            Self::Native => run_here(job),
            Self::Nested(l1) => l1.run(job),
        }
    }

    /// Ends the session in good order.
    ///
    /// # Errors
    /// [`Breakdown`](l1::Breakdown) when L1 does not power off.
    pub fn close(self) -> Result<()> {
        match self {
            Self::Native => Ok(()),
            Self::Nested(l1) => l1.shutdown(),
        }
    }
}

fn run_here(job: &Job) -> Result<Output> {
    // timeout(1) leads a process group of its own, which Ctrl-C does not reach: let it go with its parent.
    let mut child = Command::new("setpriv")
        .args(["--pdeathsig", "TERM", "sh", "-c"])
        .arg(job.script())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run setpriv, of util-linux")?;
    let stdout = child.stdout.take().context("the output is not piped")?;
    let stderr = child.stderr.take().context("the errors are not piped")?;
    let (stdout, stderr) = std::thread::scope(|scope| {
        let stderr = scope.spawn(|| copy(stderr, job.echo.then(std::io::stderr)));
        let stdout = copy(stdout, job.echo.then(std::io::stdout));
        let stderr = stderr
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (stdout, stderr)
    });
    let status = child.wait().context("cannot wait for a command")?;
    Ok(Output {
        status: shell_status(status),
        stdout: stdout?,
        stderr: stderr?,
    })
}

fn copy(mut from: impl Read, mut echo: Option<impl Write>) -> Result<String> {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let count = from
            .read(&mut buffer)
            .context("cannot read a command's output")?;
        if count == 0 {
            return Ok(String::from_utf8_lossy(&all).into_owned());
        }
        all.extend_from_slice(&buffer[..count]);
        if let Some(echo) = &mut echo {
            echo.write_all(&buffer[..count])
                .and_then(|()| echo.flush())
                .context("cannot pass output on")?;
        }
    }
}

fn shell_status(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(-1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_native_job_gives_status_output_and_errors() {
        let directory = tempfile::tempdir().unwrap();
        let job = Job::shell("pwd; echo \"$WORD\" >&2; exit 3")
            .env("WORD", "it's")
            .directory(directory.path());
        let output = Session::Native.run(&job).unwrap();
        assert_eq!(output.status, 3);
        assert_eq!(
            output.stdout.trim(),
            directory.path().canonicalize().unwrap().to_str().unwrap()
        );
        assert_eq!(output.stderr, "it's\n");
    }

    #[test]
    fn a_native_job_ends_when_its_time_is_up() {
        let job = Job::new(["sleep", "600"]).timeout(Duration::from_secs(1));
        assert_eq!(Session::Native.run(&job).unwrap().status, 124);
    }
}
