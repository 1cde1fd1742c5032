//! How a VMM is ended from outside.

use std::{io, time::Duration};

use tokio::time::timeout;
use tracing::warn;

use crate::{Client, ProcessHandle, Record};

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

/// Asks the VMM of `record` to stop, and kills it if it does not answer, or has not ended, within `grace`.
///
/// # Errors
///
/// When it cannot be killed: it belongs to somebody else, or the kernel does not let go of it.
pub async fn stop(record: &Record, grace: Duration) -> io::Result<Stopped> {
    let Some(process) = record.process.open()? else {
        return Ok(Stopped::OnRequest);
    };
    let asked = async {
        let client = Client::connect(record.port, &record.secret).await?;
        client.stop().await
    };
    match timeout(grace, asked).await {
        Ok(Ok(())) => {}
        // It may just be ending by itself, and is given the time for that: it has disks to sync.
        Ok(Err(error)) => warn!(pid = record.process.pid, %error, "a VMM cannot be asked to stop"),
        Err(_) => {
            warn!(pid = record.process.pid, "a VMM does not answer");
            return kill(&process).await;
        }
    }
    end(record, &process, grace).await
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
    if process.ended_within(grace).await? {
        return Ok(Stopped::OnRequest);
    }
    warn!(pid = record.process.pid, "a VMM did not end in time");
    kill(process).await
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
