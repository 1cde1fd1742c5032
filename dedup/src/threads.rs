//! Running the same work on several threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// Runs `work` on `count` threads at once, this one included, and waits for all of them. Gives the first error.
pub(crate) fn on(count: usize, work: impl Fn() -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let mut others = Vec::new();
        for _ in 1..count {
            let spawned = std::thread::Builder::new()
                .name("dedup".into())
                .spawn_scoped(scope, &work);
            others.push(spawned.map_err(Error::io("start a thread"))?);
        }
        let mine = if count > 0 { work() } else { Ok(()) };
        others.into_iter().fold(mine, |all, other| {
            let result = other
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            all.and(result)
        })
    })
}

/// As [`on`], with items that threads share: each takes the next one by what `work` gets. When one has failed there are no more of
/// them, for whatever the others did would be in vain.
pub(crate) fn share<I: Iterator + Send>(
    count: usize,
    items: I,
    work: impl Fn(&dyn Fn() -> Option<I::Item>) -> Result<()> + Sync,
) -> Result<()> {
    let items = Mutex::new(items);
    let failed = AtomicBool::new(false);
    let next = || {
        let mut items = items.lock().unwrap_or_else(PoisonError::into_inner);
        (!failed.load(Ordering::Relaxed))
            .then(|| items.next())
            .flatten()
    };
    on(count, || {
        work(&next).inspect_err(|_| failed.store(true, Ordering::Relaxed))
    })
}
