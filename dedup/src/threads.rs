//! Running the same work on several threads.

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
