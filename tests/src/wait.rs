//! Waiting for something to become true, with a bound that only a hang reaches.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Guests in an emulated machine are some fifty times slower than on hardware.
pub const PATIENCE: Duration = Duration::from_secs(180);

const INTERVAL: Duration = Duration::from_millis(5);

/// Calls `look` until it finds something.
///
/// # Errors
///
/// After [`PATIENCE`], with `what` was waited for.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if begun.elapsed() > PATIENCE {
            bail!("waited {PATIENCE:?} in vain for {what}");
        }
        sleep(INTERVAL);
    }
}
