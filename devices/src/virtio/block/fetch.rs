//! What a disk's reads want and is not on this host: it comes from whoever has it, on a thread that is there for as long as that takes.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Instant,
};

use branch_disk::Awaited;

use crate::sync::lock;

/// Fetches for one disk, a batch at a time.
pub(super) struct Fetch(Arc<Shared>);

struct Shared {
    is_under_way: Mutex<bool>,
    changed: Condvar,
    /// An eventfd that is signalled when a batch has come, or cannot.
    ended: Arc<OwnedFd>,
}

impl Fetch {
    /// One that has nothing to do yet, and signals `ended`, an eventfd, at the end of each batch.
    pub(super) fn new(ended: Arc<OwnedFd>) -> Self {
        Self(Arc::new(Shared {
            is_under_way: Mutex::new(false),
            changed: Condvar::new(),
            ended,
        }))
    }

    /// Begins to fetch what is `awaited`. Nothing may be under way. What could not be had is so again for who reads it.
    ///
    /// # Errors
    ///
    /// When the host has no thread for it.
    pub(super) fn begin(&self, awaited: Vec<Awaited>) -> io::Result<()> {
        *lock(&self.0.is_under_way) = true;
        let batch = Batch(Arc::clone(&self.0));
        let fetch = move || {
            for awaited in awaited {
                if let Err(error) = awaited.bring() {
                    tracing::debug!(?awaited, %error, "a part of a disk cannot be had");
                }
            }
            drop(batch);
        };
        let thread = thread::Builder::new().name("fetch".to_owned());
        thread.spawn(fetch).map(drop)
    }

    /// Whether a batch is under way.
    pub(super) fn is_under_way(&self) -> bool {
        *lock(&self.0.is_under_way)
    }

    /// Waits until none is; says whether that is so by `deadline`.
    pub(super) fn wait_until(&self, deadline: Instant) -> bool {
        let bound = deadline.saturating_duration_since(Instant::now());
        let is_under_way = lock(&self.0.is_under_way);
        let ended = |is_under_way: &mut bool| *is_under_way;
        let waited = self
            .0
            .changed
            .wait_timeout_while(is_under_way, bound, ended);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

/// A batch that is under way, whatever becomes of it.
struct Batch(Arc<Shared>);

impl Drop for Batch {
    fn drop(&mut self) {
        *lock(&self.0.is_under_way) = false;
        self.0.changed.notify_all();
        // It fails only where it has been signalled 2^64 times and nobody looked.
        let _ = rustix::io::write(&*self.0.ended, &1u64.to_ne_bytes());
    }
}
