//! What a disk's reads want and is not on this host: it comes from whoever has it, on threads that are there for as long as that takes.

use std::{
    io,
    iter::Enumerate,
    mem,
    os::fd::OwnedFd,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Instant,
    vec,
};

use branch_disk::Awaited;

use crate::sync::lock;

/// How many pieces are fetched at once: who is far away takes its time for each.
pub(super) const THREADS: usize = 4;

/// Fetches for one disk, a batch at a time.
pub(super) struct Fetch(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// An eventfd that is signalled when a batch has come, or cannot.
    ended: Arc<OwnedFd>,
}

#[derive(Default)]
struct State {
    is_under_way: bool,
    /// Of the batch that is under way, nothing more is to be begun.
    is_to_end: bool,
    missing: Missing,
}

/// What of a batch has not come, by its place in the batch.
#[derive(Debug, Default)]
pub(super) struct Missing {
    /// What was not tried, since the batch was to end early.
    pub(super) untried: Vec<usize>,
    /// What could not be had.
    pub(super) failed: Vec<usize>,
}

impl Fetch {
    /// One that has nothing to do yet, and signals `ended`, an eventfd, at the end of each batch.
    pub(super) fn new(ended: Arc<OwnedFd>) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::default(),
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
        *lock(&self.0.state) = State {
            is_under_way: true,
            ..State::default()
        };
        let threads = awaited.len().min(THREADS);
        let batch = Arc::new(Batch {
            shared: Arc::clone(&self.0),
            left: Mutex::new(awaited.into_iter().enumerate()),
        });
        for nth in 0..threads {
            let batch = Arc::clone(&batch);
            let thread = thread::Builder::new().name("fetch".to_owned());
            match thread.spawn(move || batch.fetch()) {
                Ok(_) => {}
                Err(error) if nth == 0 => return Err(error),
                // The others do all of it.
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// Whether a batch is under way.
    pub(super) fn is_under_way(&self) -> bool {
        lock(&self.0.state).is_under_way
    }

    /// Has the batch that is under way, if any is, begin nothing more: each of its threads ends what it is at, or a first piece.
    pub(super) fn end_early(&self) {
        lock(&self.0.state).is_to_end = true;
    }

    /// What of the last batch has not come. It is said once.
    pub(super) fn take_missing(&self) -> Missing {
        mem::take(&mut lock(&self.0.state).missing)
    }

    /// Waits until none is; says whether that is so by `deadline`.
    pub(super) fn wait_until(&self, deadline: Instant) -> bool {
        let bound = deadline.saturating_duration_since(Instant::now());
        let state = lock(&self.0.state);
        let goes_on = |state: &mut State| state.is_under_way;
        let waited = self.0.changed.wait_timeout_while(state, bound, goes_on);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

/// A batch that is under way, whatever becomes of it.
struct Batch {
    shared: Arc<Shared>,
    left: Mutex<Enumerate<vec::IntoIter<Awaited>>>,
}

impl Batch {
    /// Fetches one piece after the other until none is left. Whatever else is wanted, something comes of each batch.
    fn fetch(&self) {
        let mut has_begun = false;
        while let Some((place, awaited)) = self.next() {
            if mem::replace(&mut has_begun, true) && self.leaves(place) {
                continue;
            }
            if let Err(error) = awaited.bring() {
                tracing::debug!(?awaited, %error, "a part of a disk cannot be had");
                lock(&self.shared.state).missing.failed.push(place);
            }
        }
    }

    fn next(&self) -> Option<(usize, Awaited)> {
        lock(&self.left).next()
    }

    /// Whether the piece with this place is left untried.
    fn leaves(&self, place: usize) -> bool {
        let state = &mut *lock(&self.shared.state);
        if state.is_to_end {
            state.missing.untried.push(place);
        }
        state.is_to_end
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        lock(&self.shared.state).is_under_way = false;
        self.shared.changed.notify_all();
        // It fails only where it has been signalled 2^64 times and nobody looked.
        let _ = rustix::io::write(&*self.shared.ended, &1u64.to_ne_bytes());
    }
}
