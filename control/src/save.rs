//! How a machine is saved from outside and ends with that.

use std::time::Duration;

use tracing::warn;

use crate::{AfterSnapshot, Record, stop::end};

/// How long a machine that is saved and ends may take to be gone.
const END_BOUND: Duration = Duration::from_secs(30);

/// Waits for `saving`, which has the VMM of `record` save its machine, and if that is to end `then`, until its process has: what
/// it used, disks and network devices, is free for the one that goes on from the snapshot. A VMM waits a moment for clients that
/// are still connected, so `saving` owns its [`Client`](crate::Client).
///
/// # Errors
///
/// Those of `saving`. The snapshot is complete even if the process cannot be seen to end, which is logged.
pub async fn saved<T, E>(
    record: &Record,
    then: AfterSnapshot,
    saving: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let ends = matches!(then, AfterSnapshot::Halt);
    // Opened before, so that it is this process that is waited for.
    let process = ends.then(|| record.process.open());
    let report = saving.await?;
    let ended = match process {
        None | Some(Ok(None)) => Ok(()),
        Some(Ok(Some(process))) => end(record, &process, END_BOUND).await.map(drop),
        Some(Err(error)) => Err(error),
    };
    if let Err(error) = ended {
        warn!(pid = record.process.pid, %error, "a machine was saved and may not have ended");
    }
    Ok(report)
}
