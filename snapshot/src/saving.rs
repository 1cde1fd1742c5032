//! A snapshot that is being written, for who watches it: how far it is, how fast it may be, and whether it is still wanted.

use std::{
    io,
    num::NonZeroU64,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use dedup::Progress;

/// How long a snapshot that may not be faster sleeps at a time: it looks in between whether it is still wanted.
const NAP: Duration = Duration::from_millis(50);

/// No single read is waited for longer, whatever the numbers say.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// What is known of the snapshot that is being written, or was last. May be looked at and cancelled by any thread.
#[derive(Debug, Default)]
pub struct Saving {
    progress: Progress,
    /// A [`Stage`].
    stage: AtomicU8,
    pace: Mutex<Option<Pace>>,
    /// By when the guest, which stands still, has to go on.
    due: Mutex<Option<Instant>>,
    /// Whether that has passed.
    late: AtomicBool,
}

/// Whether a snapshot can still be cancelled.
#[repr(u8)]
enum Stage {
    Wanted = 0,
    Cancelled = 1,
    /// Something of it may be seen already.
    Completing = 2,
}

/// So many bytes in a second.
#[derive(Clone, Copy, Debug)]
struct Pace {
    bytes_per_second: NonZeroU64,
    /// When more may be done.
    next: Instant,
}

impl Pace {
    fn new(bytes_per_second: NonZeroU64) -> Self {
        Self {
            bytes_per_second,
            next: Instant::now(),
        }
    }

    /// When more may be done than these bytes, which are. Time in which less was done than might have been is not caught up with.
    fn after(&mut self, bytes: u64, now: Instant) -> Instant {
        let ns = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second.get());
        let takes = Duration::from_nanos(ns.try_into().unwrap_or(u64::MAX)).min(LONGEST);
        let earliest = now.checked_sub(NAP).unwrap_or(now);
        self.next = self.next.max(earliest) + takes;
        self.next
    }
}

impl Saving {
    /// Begins another, which is wanted and may read so many bytes in a second.
    pub fn restart(&self, bytes_per_second: Option<NonZeroU64>) {
        *self.pace() = bytes_per_second.map(Pace::new);
        self.stand_still(None);
        self.late.store(false, Ordering::SeqCst);
        self.begin(0);
        self.stage.store(Stage::Wanted as u8, Ordering::SeqCst);
    }

    /// Has the rest of it be as fast as can be.
    pub fn unlimit(&self) {
        *self.pace() = None;
    }

    /// The guest stands still, and has to go on by then, or it does not stand still any more.
    pub fn stand_still(&self, until: Option<Instant>) {
        *self.due.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }

    /// Whether the guest still may stand still, if it does.
    pub fn is_in_time(&self) -> bool {
        let due = *self.due.lock().unwrap_or_else(PoisonError::into_inner);
        let is_late = due.is_some_and(|due| Instant::now() > due);
        self.late.fetch_or(is_late, Ordering::SeqCst);
        !is_late
    }

    /// Whether it failed because the guest would have stood still for too long.
    pub fn is_late(&self) -> bool {
        self.late.load(Ordering::SeqCst)
    }

    /// Has it not be taken; says whether it is not.
    pub fn cancel(&self) -> bool {
        self.go_to(Stage::Cancelled) || self.is_cancelled()
    }

    /// Whether it is not wanted any more.
    pub fn is_cancelled(&self) -> bool {
        self.stage.load(Ordering::SeqCst) == Stage::Cancelled as u8
    }

    /// Has it be complete, which nobody can keep it from any more; says whether somebody has.
    #[must_use = "a snapshot that was cancelled is not completed"]
    pub fn complete(&self) -> bool {
        self.go_to(Stage::Completing)
    }

    /// Whether something of it may be seen, whatever has become of it.
    pub fn may_be_seen(&self) -> bool {
        self.stage.load(Ordering::SeqCst) == Stage::Completing as u8
    }

    /// Goes on to a stage, if it is still wanted.
    fn go_to(&self, stage: Stage) -> bool {
        let (wanted, order) = (Stage::Wanted as u8, Ordering::SeqCst);
        let gone = self
            .stage
            .compare_exchange(wanted, stage as u8, order, order);
        gone.is_ok()
    }

    /// How far it is.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Begins with a part of it, of so many bytes.
    pub(crate) fn begin(&self, bytes: u64) {
        self.progress.begin(bytes);
    }

    /// Tells that so many more bytes are done, which did not have to be read from the machine.
    ///
    /// # Errors
    ///
    /// When it is not wanted any more, or the guest would stand still for too long.
    pub(crate) fn pass(&self, bytes: u64) -> io::Result<()> {
        self.progress.advance(bytes);
        if self.is_cancelled() {
            return Err(io::Error::other("the snapshot was cancelled"));
        }
        match self.is_in_time() {
            true => Ok(()),
            false => Err(io::Error::other("the guest has stood still for too long")),
        }
    }

    /// Tells that so many more bytes were read; returns when more may be.
    ///
    /// # Errors
    ///
    /// As of [`Saving::pass`].
    pub(crate) fn advance(&self, bytes: u64) -> io::Result<()> {
        let now = Instant::now();
        let due = self.pace().as_mut().map(|pace| pace.after(bytes, now));
        self.pass(bytes)?;
        loop {
            let left = due.map(|due| due.saturating_duration_since(Instant::now()));
            match left.filter(|left| !left.is_zero()) {
                Some(left) => thread::sleep(left.min(NAP)),
                None => return Ok(()),
            }
            self.pass(0)?;
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
    fn what_is_done_takes_its_time_and_no_time_is_caught_up_with() {
        let mut pace = Pace::new(NonZeroU64::new(1000).unwrap());
        let begun = pace.next;
        let (half, second) = (Duration::from_millis(500), Duration::from_secs(1));
        assert_eq!(pace.after(500, begun), begun + half);
        assert_eq!(pace.after(1500, begun), begun + 2 * second);
        let late = begun + 60 * second;
        assert_eq!(pace.after(1000, late), late - NAP + second);
        // No number of bytes is too large to be waited for.
        for _ in 0..100 {
            pace.after(u64::MAX, late);
        }
    }

    #[test]
    fn a_snapshot_is_cancelled_or_completed_and_never_both() {
        let saving = Saving::default();
        assert!(saving.cancel() && saving.cancel() && saving.is_cancelled());
        assert!(!saving.complete() && !saving.may_be_seen());
        saving.restart(None);
        assert!(saving.complete());
        assert!(!saving.cancel() && !saving.is_cancelled() && saving.may_be_seen());
        saving.advance(1).unwrap();
    }

    #[test]
    fn what_is_not_limited_any_more_does_not_wait() {
        let saving = Saving::default();
        saving.restart(NonZeroU64::new(1));
        saving.unlimit();
        saving.advance(1 << 40).unwrap();
    }

    #[test]
    fn what_takes_longer_than_the_guest_may_stand_still_ends_and_says_so() {
        let saving = Saving::default();
        let now = Instant::now();
        saving.stand_still(Some(now + Duration::from_secs(600)));
        saving.advance(1).unwrap();
        saving.stand_still(Some(now));
        saving.advance(1).unwrap_err();
        assert!(saving.is_late() && !saving.is_cancelled());
        saving.stand_still(None);
        saving.advance(1).unwrap();
        saving.restart(None);
        assert!(!saving.is_late());
    }

    #[test]
    fn what_is_cancelled_ends_also_while_it_waits() {
        let saving = Saving::default();
        saving.restart(NonZeroU64::new(1));
        thread::scope(|scope| {
            let waits = scope.spawn(|| saving.advance(1 << 40));
            thread::sleep(NAP / 2);
            assert!(saving.cancel());
            waits.join().unwrap().unwrap_err();
        });
        saving.advance(0).unwrap_err();
        saving.restart(None);
        saving.advance(1 << 40).unwrap();
    }
}
