//! Which requests of a disk have to wait for its limits, and those that wait until there is room for them.
//!
//! One that has to wait is taken off the ring, so that those behind it that the limit is not on go on: a limit on writes does not
//! hold up reads. Among reads, and among all others, the order stays as it was.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use crate::{
    RateLimit, StoppedClock,
    rate_limit::{Rates, Timer},
    sync::lock,
};

/// The most that a disk may do in a second. Bytes are those of reads and writes; whatever is asked of the disk is an operation.
/// Discards and zeroes have no bytes, for no data moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskLimits {
    /// Of all requests together.
    pub total: RateLimit,
    /// Of reads alone.
    pub reads: RateLimit,
    /// Of writes alone, and of flushes, discards and zeroes with them.
    pub writes: RateLimit,
}

/// What of a disk's limits a request is under beside the total.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Read,
    Write,
}

/// Whether a request may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    Granted,
    /// A limit is used up.
    Refused,
    /// One before it, that goes the same way, was refused.
    Queued,
}

/// A request that waits.
#[derive(Debug)]
struct Waiting {
    head: u16,
    /// `None` of one that nobody has looked at since it was restored, or that need not wait for a limit.
    way: Option<Way>,
    /// It was counted as a read of so many bytes, and waits for something else.
    admitted: Option<u64>,
}

/// A request that has waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) head: u16,
    /// As a read of so many bytes it may go on.
    pub(super) admitted: Option<u64>,
}

/// Holds a disk to its [`DiskLimits`].
pub(super) struct Throttle {
    /// Shared with who changes them. A round has those that it began with.
    limits: Arc<Mutex<DiskLimits>>,
    /// Whether this round has any.
    limited: bool,
    total: Rates,
    reads: Rates,
    writes: Rates,
    /// Becomes readable when one of those that wait may go on.
    timer: Timer,
    stopped_clock: Option<StoppedClock>,
    /// In the order in which they came.
    waiting: VecDeque<Waiting>,
    /// Where in `waiting` this round has come to.
    next: usize,
    /// Whether a read had to wait in this round, and whether a write had.
    stopped: [bool; 2],
    /// How long it takes until one of them may go on.
    soonest: Duration,
}

impl Throttle {
    /// One that limits nothing yet.
    pub(super) fn new() -> io::Result<Self> {
        let none = || Rates::new(RateLimit::default());
        Ok(Self {
            limits: Arc::default(),
            limited: false,
            total: none(),
            reads: none(),
            writes: none(),
            timer: Timer::new()?,
            stopped_clock: None,
            waiting: VecDeque::new(),
            next: 0,
            stopped: [false; 2],
            soonest: Duration::MAX,
        })
    }

    pub(super) fn limits(&self) -> &Arc<Mutex<DiskLimits>> {
        &self.limits
    }

    /// Has these limits, of which nothing is used up.
    pub(super) fn set_limits(&mut self, limits: DiskLimits) {
        *lock(&self.limits) = limits;
        // Of a limit that is not there, nothing stays.
        self.keep_to(DiskLimits::default());
        self.keep_to(limits);
    }

    /// Has these limits from now on. Of those that it has already, what is used up stays so.
    fn keep_to(&mut self, limits: DiskLimits) {
        let DiskLimits {
            total,
            reads,
            writes,
        } = limits;
        self.limited = limits != DiskLimits::default();
        self.total.change(total);
        self.reads.change(reads);
        self.writes.change(writes);
    }

    /// Takes the time from `clock`.
    pub(super) fn stop_clock(&mut self, clock: &StoppedClock) {
        self.stopped_clock = Some(clock.clone());
    }

    /// What becomes readable when the queue is worth a look.
    pub(super) fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// A round begins, with the limits of now. Those that wait are looked at again, the first ones first.
    pub(super) fn begin_round(&mut self) {
        let limits = *lock(&self.limits);
        self.keep_to(limits);
        self.next = 0;
        self.stopped = [false; 2];
        self.soonest = Duration::MAX;
    }

    /// Takes the next one that waits, unless one before it has to wait on.
    pub(super) fn due(&mut self) -> Option<Due> {
        while let Some(waiting) = self.waiting.get(self.next) {
            if waiting.way.is_none_or(|way| !self.stopped[way as usize]) {
                let waiting = self.waiting.remove(self.next)?;
                let Waiting { head, admitted, .. } = waiting;
                return Some(Due { head, admitted });
            }
            self.next += 1;
        }
        None
    }

    /// Whether a request of `bytes` may go on, and counts it if so. If it is refused, the timer is set, and all others that go
    /// this way are queued until the next round.
    pub(super) fn admits(&mut self, way: Way, bytes: u64) -> Admission {
        if self.stopped[way as usize] {
            return Admission::Queued;
        }
        if !self.limited {
            return Admission::Granted;
        }
        let now = self.now();
        let alone = match way {
            Way::Read => &mut self.reads,
            Way::Write => &mut self.writes,
        };
        let wait = self.total.wait(now).max(alone.wait(now));
        let soonest = self.soonest.min(wait);
        // A timer that cannot be set is no reason to stand still for ever.
        if wait.is_zero() || self.timer.set(soonest).is_err() {
            self.total.charge(now, bytes);
            alone.charge(now, bytes);
            return Admission::Granted;
        }
        self.soonest = soonest;
        self.stopped[way as usize] = true;
        Admission::Refused
    }

    /// Has the request with this head wait, where this round has come to. There are never more than the queue has entries, for no more
    /// is taken off its ring.
    pub(super) fn put_off(&mut self, head: u16, way: Way) {
        self.insert(Waiting {
            head,
            way: Some(way),
            admitted: None,
        });
    }

    /// Has the read of so many bytes with this head, which may go on, wait for the next round, in the same place.
    pub(super) fn put_back(&mut self, head: u16, bytes: u64) {
        self.insert(Waiting {
            head,
            way: None,
            admitted: Some(bytes),
        });
    }

    fn insert(&mut self, waiting: Waiting) {
        self.waiting.insert(self.next, waiting);
        self.next += 1;
    }

    /// The heads of those that wait, in the order in which they came.
    pub(super) fn waiting(&self) -> Vec<u16> {
        self.waiting.iter().map(|waiting| waiting.head).collect()
    }

    /// Has those with these heads wait, and no others.
    pub(super) fn set_waiting(&mut self, heads: &[u16]) {
        let waiting = |head: &u16| Waiting {
            head: *head,
            way: None,
            admitted: None,
        };
        self.waiting = heads.iter().map(waiting).collect();
        self.begin_round();
    }

    fn now(&self) -> Instant {
        let stopped = self.stopped_clock.as_ref();
        stopped.map_or_else(Instant::now, StoppedClock::now)
    }
}
