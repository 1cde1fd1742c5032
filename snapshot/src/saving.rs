//! A snapshot that is being written, for who watches it: how far it is, how fast it may be, and whether it is still wanted.

use std::{
    io,
    num::NonZeroU64,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use dedup::Progress;

/// How long a snapshot that may not be faster sleeps at a time: it looks in between whether it is still wanted.
const NAP: Duration = Duration::from_millis(50);

/// What is known of the snapshot that is being written, or was last. May be looked at and cancelled by any thread.
#[derive(Debug, Default)]
pub struct Saving {
    progress: Progress,
    cancelled: AtomicBool,
    pace: Mutex<Option<Pace>>,
}

/// So many bytes in a second, from the first on.
#[derive(Clone, Copy, Debug)]
struct Pace {
    bytes_per_second: NonZeroU64,
    begun: Instant,
    bytes: u64,
}

impl Pace {
    fn new(bytes_per_second: NonZeroU64) -> Self {
        Self {
            bytes_per_second,
            begun: Instant::now(),
            bytes: 0,
        }
    }

    /// When so many bytes more may be done.
    fn due(&mut self, bytes: u64) -> Instant {
        self.bytes = self.bytes.saturating_add(bytes);
        let ns = u128::from(self.bytes) * 1_000_000_000 / u128::from(self.bytes_per_second.get());
        self.begun + Duration::from_nanos(ns.try_into().unwrap_or(u64::MAX))
    }
}

impl Saving {
    /// Begins another, which is wanted and may read so many bytes in a second.
    pub fn restart(&self, bytes_per_second: Option<NonZeroU64>) {
        *self.pace() = bytes_per_second.map(Pace::new);
        self.begin(0);
        self.cancelled.store(false, Ordering::SeqCst);
    }

    /// Has it not be taken, unless it is complete already.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    /// Whether it is not wanted any more.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// How far it is.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Begins with a part of it, of so many bytes.
    pub(crate) fn begin(&self, bytes: u64) {
        self.progress.begin(bytes);
        // What was not read meanwhile is not caught up with.
        if let Some(pace) = &mut *self.pace() {
            *pace = Pace::new(pace.bytes_per_second);
        }
    }

    /// Tells that so many more bytes were read; returns when more may be.
    ///
    /// # Errors
    ///
    /// When it is not wanted any more.
    pub(crate) fn advance(&self, bytes: u64) -> io::Result<()> {
        self.progress.advance(bytes);
        let due = self.pace().as_mut().map(|pace| pace.due(bytes));
        loop {
            if self.is_cancelled() {
                return Err(io::Error::other("the snapshot was cancelled"));
            }
            let left = due.map(|due| due.saturating_duration_since(Instant::now()));
            match left.filter(|left| !left.is_zero()) {
                Some(left) => thread::sleep(left.min(NAP)),
                None => return Ok(()),
            }
        }
    }

    fn pace(&self) -> MutexGuard<'_, Option<Pace>> {
        // It is a few numbers, each set alone.
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_due_goes_with_what_was_done() {
        let begun = Instant::now();
        let mut pace = Pace {
            begun,
            ..Pace::new(NonZeroU64::new(1000).unwrap())
        };
        assert_eq!(pace.due(500), begun + Duration::from_millis(500));
        assert_eq!(pace.due(1500), begun + Duration::from_secs(2));
        // No number of bytes is too large to be waited for.
        assert!(pace.due(u64::MAX) > begun);
    }

    #[test]
    fn what_is_cancelled_ends_also_while_it_waits() {
        let saving = Saving::default();
        saving.restart(NonZeroU64::new(1));
        thread::scope(|scope| {
            let waits = scope.spawn(|| saving.advance(1 << 40));
            thread::sleep(NAP / 2);
            saving.cancel();
            waits.join().unwrap().unwrap_err();
        });
        saving.advance(0).unwrap_err();
        saving.restart(None);
        saving.advance(1 << 40).unwrap();
    }
}
