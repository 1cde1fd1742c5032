//! Waiting for something to become true, with a bound that only a hang reaches.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Guests in an emulated machine are some fifty times slower than on hardware.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Between two looks at least.
const INTERVAL: Duration = Duration::from_millis(5);
/// At most: who waits for long takes no time from the guest that it waits for, with which it may have to share one emulated CPU.
const LONG_INTERVAL: Duration = Duration::from_millis(500);

/// Calls `look` until it finds something.
///
/// # Errors
///
/// After [`PATIENCE`], with `what` was waited for.
pub fn until<T>(what: &str, look: impl FnMut() -> Option<T>) -> Result<T> {
    within(PATIENCE, what, look)
}

/// The same for what takes longer than all else.
///
/// # Errors
///
/// After `bound`, with `what` was waited for.
pub fn within<T>(bound: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        let waited = begun.elapsed();
        if waited > bound {
            bail!("waited {bound:?} in vain for {what}");
        }
        sleep((waited / 100).clamp(INTERVAL, LONG_INTERVAL));
    }
}
