//! How a VMM is ended from outside.

use std::{io, time::Duration};

use tokio::time::timeout;
use tracing::warn;

use crate::{
    Client, ClientError, DISK_BYTES_COME, DISKS_TO_COME, Metric, ProcessHandle, Record, Secret,
};

/// How long a killed process may take to be gone: the kernel has its memory to free.
const KILL_BOUND: Duration = Duration::from_secs(30);

/// How a VMM was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// It ended when it was asked to, or had ended before.
    OnRequest,
    /// It did not, and was killed.
    Killed,
}

/// Asks the VMM of `record` to stop, and kills it if it does not answer, or has not ended, within `grace`, or nothing of what its disks stand on
/// has come for so long.
///
/// # Errors
///
/// When it cannot be killed: it belongs to somebody else, or the kernel does not let go of it.
pub async fn stop(record: &Record, grace: Duration) -> io::Result<Stopped> {
    let Some(process) = record.process.open()? else {
        return Ok(Stopped::OnRequest);
    };
    match ask(record.process.pid, record.port, &record.secret, grace).await {
        Asked::Ends => end(record, &process, grace).await,
        Asked::Silent => kill(&process).await,
    }
}

/// What has come of it that a VMM was asked to stop.
pub(crate) enum Asked {
    /// It ends: it has been asked, or cannot be, because it is just ending by itself. It has disks to sync, and is given the time.
    Ends,
    /// It does not answer.
    Silent,
}

/// Asks the VMM on `port` to stop, and waits for its answer no longer than `grace`.
pub(crate) async fn ask(pid: u32, port: u16, secret: &Secret, grace: Duration) -> Asked {
    let asked = async { Client::connect(port, secret).await?.stop().await };
    match timeout(grace, asked).await {
        Ok(Ok(())) => Asked::Ends,
        Ok(Err(error)) if !is_silence(&error) => {
            warn!(pid, %error, "a VMM cannot be asked to stop");
            Asked::Ends
        }
        Ok(Err(_)) | Err(_) => {
            warn!(pid, "a VMM does not answer");
            Asked::Silent
        }
    }
}

/// Whether the VMM is there and says nothing, as one that is frozen.
fn is_silence(error: &ClientError) -> bool {
    match error {
        ClientError::Silent { .. } | ClientError::Deadline(_) => true,
        ClientError::Connect { .. }
        | ClientError::Handshake { .. }
        | ClientError::Lost(_)
        | ClientError::Refused(_) => false,
    }
}

/// Waits for a VMM that is to end by now, and kills it if it has not after `grace`.
///
/// # Errors
///
/// Those of [`stop`].
pub(crate) async fn end(
    record: &Record,
    process: &ProcessHandle,
    grace: Duration,
) -> io::Result<Stopped> {
    let mut coming = Coming::default();
    while !process.ended_within(grace).await? {
        if !coming.goes_on(record.port, &record.secret, grace).await {
            let pid = record.process.pid;
            warn!(pid, "a VMM did not end in time");
            return kill(process).await;
        }
    }
    Ok(Stopped::OnRequest)
}

/// What to do about a disk whose VMM was killed too early.
const LEFT: &str = "its disks stand on what has not all come from the store; restore the same snapshot with the same directory for them before they are used";

/// How often nothing may have come when it is looked: it may be that what came is made durable.
const QUIET: u32 = 3;

/// What is known of the disks of a machine that has ended and waits for them.
#[derive(Debug, Default)]
pub(crate) struct Coming {
    come: u64,
    missing: u64,
    quiet: u32,
}

impl Coming {
    /// Asks whether they may still come, and says what is to be done if not. Waits for an answer no longer than `bound`.
    pub(crate) async fn goes_on(&mut self, port: u16, secret: &Secret, bound: Duration) -> bool {
        let asked = async { Client::connect(port, secret).await?.metrics().await };
        let goes_on = match timeout(bound, asked).await {
            Ok(Ok(metrics)) => self.look(&metrics),
            _ => false,
        };
        if !goes_on && self.is_missing() {
            warn!(port, "{LEFT}");
        }
        goes_on
    }

    fn look(&mut self, metrics: &[Metric]) -> bool {
        let sum = |name: &str| -> u64 {
            let of_disks = metrics.iter().filter(|metric| metric.name == name);
            of_disks.map(|metric| metric.value).sum()
        };
        let come = sum(DISK_BYTES_COME);
        self.quiet = match come > self.come {
            true => 0,
            false => self.quiet + 1,
        };
        (self.come, self.missing) = (come, sum(DISKS_TO_COME));
        self.is_missing() && self.quiet <= QUIET
    }

    /// Whether one of them is not here, as far as is known.
    fn is_missing(&self) -> bool {
        self.missing > 0
    }
}

async fn kill(process: &ProcessHandle) -> io::Result<Stopped> {
    process.kill()?;
    if process.ended_within(KILL_BOUND).await? {
        Ok(Stopped::Killed)
    } else {
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the VMM was killed but its process is still there; see the kernel's log",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(come: u64, missing: u64) -> [Metric; 2] {
        [(DISK_BYTES_COME, come), (DISKS_TO_COME, missing)].map(|(name, value)| Metric {
            name: name.to_owned(),
            label: None,
            value,
        })
    }

    #[test]
    fn a_machine_has_the_time_that_its_disks_take_to_come() {
        let mut coming = Coming::default();
        for come in 0..100 {
            assert!(coming.look(&told(come, 1)));
        }
        for _ in 0..QUIET {
            assert!(coming.look(&told(99, 1)));
        }
        assert!(!coming.look(&told(99, 1)) && coming.is_missing());
        assert!(coming.look(&told(100, 2)));
        assert!(!coming.look(&told(101, 0)) && !coming.is_missing());
        // One that has no such disks has no more time than any.
        assert!(!Coming::default().look(&[]));
    }
}
