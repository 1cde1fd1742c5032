//! Counters that can be read while a device works.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The sum of what was added.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters of one device. They count since the process started and are not saved.
pub trait Metrics: Send + Sync {
    /// Name and value of each; names carry their unit unless they count events.
    fn list(&self) -> Vec<(&'static str, u64)>;
}
