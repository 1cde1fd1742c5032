//! A command to run in a session, and what came of it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};

/// The exit status by which timeout(1) says that the time was up.
const TIMED_OUT: i32 = 124;
/// How long a command has between SIGTERM and SIGKILL once its time is up.
pub(crate) const KILL_AFTER: Duration = Duration::from_secs(10);

/// A command, its surroundings and its bound.
#[derive(Clone, Debug)]
pub struct Job {
    argv: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    directory: Option<PathBuf>,
    pub(crate) timeout: Duration,
    pub(crate) echo: bool,
}

impl Job {
    /// Runs `argv` for at most a minute, in the session's own directory, in silence.
    pub fn new(argv: impl IntoIterator<Item: Into<OsString>>) -> Self {
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            environment: Vec::new(),
            directory: None,
            timeout: Duration::from_secs(60),
            echo: false,
        }
    }

    /// Runs `command` by the shell.
    #[must_use]
    pub fn shell(command: &str) -> Self {
        Self::new(["sh", "-c", command])
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Starts in `directory`.
    #[must_use]
    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Ends the command, with all its process group, when it has not ended after `timeout`; whole seconds.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Also passes the output on to this process's own, as it comes.
    #[must_use]
    pub fn echo(mut self) -> Self {
        self.echo = true;
        self
    }

    /// The whole job as a shell script: it means the same here and inside L1.
    pub(crate) fn script(&self) -> OsString {
        let mut script = Vec::new();
        if let Some(directory) = &self.directory {
            script.extend_from_slice(b"cd ");
            quote(directory.as_os_str(), &mut script);
            script.extend_from_slice(b" || exit\n");
        }
        for (name, value) in &self.environment {
            script.extend_from_slice(b"export ");
            script.extend_from_slice(name.as_bytes());
            script.push(b'=');
            quote(value, &mut script);
            script.push(b'\n');
        }
        let timeout = format!(
            "exec timeout --kill-after={} {}",
            KILL_AFTER.as_secs(),
            self.timeout.as_secs().max(1)
        );
        script.extend_from_slice(timeout.as_bytes());
        for argument in &self.argv {
            script.push(b' ');
            quote(argument, &mut script);
        }
        script.push(b'\n');
        OsString::from_vec(script)
    }
}

/// In single quotes nothing but the single quote itself means anything to a shell.
fn quote(word: &OsStr, script: &mut Vec<u8>) {
    script.push(b'\'');
    for &byte in word.as_bytes() {
        match byte {
            b'\'' => script.extend_from_slice(br"'\''"),
            _ => script.push(byte),
        }
    }
    script.push(b'\'');
}

/// What came of a [`Job`].
#[derive(Clone, Debug)]
pub struct Output {
    /// As the shell has it: 128 and the number for a signal, 124 when the time was up.
    pub status: i32,
    /// Standard output; what is not UTF-8 is replaced.
    pub stdout: String,
    /// Standard error; what is not UTF-8 is replaced.
    pub stderr: String,
}

impl Output {
    /// The output, if the command succeeded.
    ///
    /// # Errors
    /// When it did not; with the status and what the command said.
    pub fn success(self) -> Result<Self> {
        match self.status {
            0 => Ok(self),
            TIMED_OUT => bail!(
                "the command ran out of time\n{}{}",
                self.stdout,
                self.stderr
            ),
            status => bail!(
                "the command ended with status {status}\n{}{}",
                self.stdout,
                self.stderr
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_survives_quotes_and_spaces() {
        let job = Job::new(["printf", "%s|", "it's", "a b", "$HOME"])
            .env("GREETING", "hi 'there'")
            .directory("/tmp")
            .timeout(Duration::from_secs(5));
        assert_eq!(
            job.script().to_str().unwrap(),
            "cd '/tmp' || exit\nexport GREETING='hi '\\''there'\\'''\n\
             exec timeout --kill-after=10 5 'printf' '%s|' 'it'\\''s' 'a b' '$HOME'\n"
        );
    }

    #[test]
    fn a_failure_carries_what_was_said() {
        let output = Output {
            status: 3,
            stdout: "out\n".into(),
            stderr: "err\n".into(),
        };
        let message = output.success().unwrap_err().to_string();
        assert!(
            message.contains('3') && message.contains("out") && message.contains("err"),
            "{message}"
        );
    }
}
