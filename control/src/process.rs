//! A process that is not mistaken for a later one with the same id.

use std::{fs, io, os::fd::OwnedFd, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};

/// A process id together with the time at which the process began: ids are reused, the pair is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// The process id.
    pub pid: u32,
    /// When it began, in clock ticks since the host booted (field 22 of proc_pid_stat(5)).
    pub start_ticks: u64,
}

impl ProcessId {
    /// This very process.
    ///
    /// # Errors
    ///
    /// When `/proc` is not mounted.
    pub fn current() -> io::Result<Self> {
        Self::alive(std::process::id())?
            .ok_or_else(|| io::Error::other("/proc does not show this process; mount it"))
    }

    /// The process that has the id `pid` now, if there is one that has not ended.
    ///
    /// # Errors
    ///
    /// When `/proc` cannot be read for another reason.
    pub fn alive(pid: u32) -> io::Result<Option<Self>> {
        let stat = match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat,
            // ESRCH: it ended between open and read.
            Err(e)
                if e.kind() == io::ErrorKind::NotFound
                    || e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) =>
            {
                return Ok(None);
            }
            Err(e) => return Err(e),
        };
        parse_stat(&stat)
            .map(|(ended, start_ticks)| (!ended).then_some(Self { pid, start_ticks }))
            .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat cannot be understood")))
    }

    /// Whether this process has not ended.
    ///
    /// # Errors
    ///
    /// Those of [`ProcessId::alive`].
    pub fn is_alive(&self) -> io::Result<bool> {
        Ok(Self::alive(self.pid)? == Some(*self))
    }

    /// A handle through which it can be waited for and killed; `None` if it has ended.
    ///
    /// # Errors
    ///
    /// When the kernel gives no pidfd.
    pub fn open(&self) -> io::Result<Option<ProcessHandle>> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        // Looked at after the handle is open: if it is the right one now, the handle is its.
        Ok(self.is_alive()?.then_some(ProcessHandle(pidfd)))
    }
}

/// A pidfd (pidfd_open(2)).
#[derive(Debug)]
pub struct ProcessHandle(OwnedFd);

impl ProcessHandle {
    /// Kills the process, which cannot resist.
    ///
    /// # Errors
    ///
    /// When it belongs to somebody else.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.0, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Waits until the process has ended, though not longer than `bound`; says whether it has.
    ///
    /// # Errors
    ///
    /// When the process is out of file descriptors.
    pub async fn ended_within(&self, bound: Duration) -> io::Result<bool> {
        let process = self.0.try_clone()?;
        let bound = Timespec::try_from(bound).map_err(io::Error::other)?;
        // A thread that polls, because to hand tokio a descriptor takes unsafe code.
        tokio::task::spawn_blocking(move || {
            let mut fds = [PollFd::new(&process, PollFlags::IN)];
            Ok(rustix::io::retry_on_intr(|| poll(&mut fds, Some(&bound)))? > 0)
        })
        .await?
    }
}

/// Of the contents of `/proc/<pid>/stat`: whether the process has ended and waits to be reaped, and
/// when it began.
fn parse_stat(stat: &str) -> Option<(bool, u64)> {
    // The second field is the name in parentheses, which may itself hold blanks and parentheses.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    // Field 3 is taken; field 22 is the nineteenth of the rest.
    let start_ticks = fields.nth(18)?.parse().ok()?;
    Some((matches!(state, "Z" | "X" | "x"), start_ticks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) R 1 (b)) S 1 7 7 0 -1 4 1 2 3 4 5 6 7 8 20 0 1 0 4711 9 9";
        assert_eq!(parse_stat(stat), Some((false, 4711)));
        assert_eq!(parse_stat(&stat.replace(") S", ") Z")), Some((true, 4711)));
        assert_eq!(parse_stat("7 (a) S 1"), None);
    }

    #[test]
    fn this_process_is_alive_and_one_that_began_at_another_time_is_not() {
        let own = ProcessId::current().unwrap();
        assert!(own.is_alive().unwrap());
        let earlier = ProcessId {
            start_ticks: own.start_ticks - 1,
            ..own
        };
        assert!(!earlier.is_alive().unwrap());
        assert!(earlier.open().unwrap().is_none());
    }

    #[tokio::test]
    async fn a_child_is_waited_for_and_killed() {
        let mut child = tokio::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let id = ProcessId::alive(child.id().unwrap()).unwrap().unwrap();
        let handle = id.open().unwrap().unwrap();
        assert!(!handle.ended_within(Duration::ZERO).await.unwrap());
        handle.kill().unwrap();
        assert!(handle.ended_within(Duration::from_secs(60)).await.unwrap());
        assert!(!id.is_alive().unwrap(), "a zombie has ended");
        child.wait().await.unwrap();
        handle.kill().unwrap();
    }
}
