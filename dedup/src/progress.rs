//! How far long work is, for whoever waits for it.

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that are done, of those there are to do. May be looked at, and advanced, by any thread.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
}

impl Progress {
    /// Begins anew, with `total` bytes to do.
    pub fn begin(&self, total: u64) {
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    /// Tells that so many more bytes are done.
    pub fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that are done.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Bytes that there are to do; 0 before it is known.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }
}
