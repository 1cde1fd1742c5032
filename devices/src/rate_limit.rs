//! How much a device may do in a second.
//!
//! The generic cell rate algorithm (ITU-T I.371, appendix I): what was admitted is worth some time at the
//! rate, and the next is admitted unless that lies more than a burst ahead. There is no bucket to be
//! refilled, and no remainder to be lost. What is larger than a burst is admitted whole, and paid for by
//! the wait after it.

use std::{
    io,
    num::NonZeroU64,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

use crate::sync::lock;

/// How much may be done at once after a time in which nothing was.
const BURST: Duration = Duration::from_millis(100);

/// The most that one direction of a device may do; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes in a second.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Packets or requests in a second.
    pub operations_per_second: Option<NonZeroU64>,
}

/// A [`RateLimit`] as it is saved; 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Versionize)]
pub struct SavedRateLimit {
    bytes_per_second: u64,
    operations_per_second: u64,
}

impl From<RateLimit> for SavedRateLimit {
    fn from(limit: RateLimit) -> Self {
        let RateLimit {
            bytes_per_second,
            operations_per_second,
        } = limit;
        let or_zero = |rate: Option<NonZeroU64>| rate.map_or(0, NonZeroU64::get);
        Self {
            bytes_per_second: or_zero(bytes_per_second),
            operations_per_second: or_zero(operations_per_second),
        }
    }
}

impl From<SavedRateLimit> for RateLimit {
    fn from(saved: SavedRateLimit) -> Self {
        let SavedRateLimit {
            bytes_per_second,
            operations_per_second,
        } = saved;
        Self {
            bytes_per_second: NonZeroU64::new(bytes_per_second),
            operations_per_second: NonZeroU64::new(operations_per_second),
        }
    }
}

#[cfg(test)]
impl SavedRateLimit {
    /// One in which no two numbers are alike.
    pub(crate) fn example(number: u64) -> Self {
        Self {
            bytes_per_second: number << 20,
            operations_per_second: number,
        }
    }
}

/// Holds one direction of a device to its [`RateLimit`].
pub(crate) struct Limiter {
    rates: Rates,
    timer: Timer,
}

impl Limiter {
    /// `None` if nothing is limited.
    pub(crate) fn new(limit: RateLimit) -> io::Result<Option<Self>> {
        if limit == RateLimit::default() {
            return Ok(None);
        }
        Ok(Some(Self {
            rates: Rates::new(limit),
            timer: Timer::new()?,
        }))
    }

    /// Whether one more may be done at `now`. If not, [`Limiter::timer`] becomes readable when it may.
    pub(crate) fn admits(&mut self, now: Instant) -> bool {
        let wait = self.rates.wait(now);
        // A timer that cannot be set is no reason to stand still for ever.
        wait.is_zero() || self.timer.set(wait).is_err()
    }

    /// Counts one that was done at `now` and had `bytes`.
    pub(crate) fn charge(&mut self, now: Instant, bytes: u64) {
        self.rates.charge(now, bytes);
    }

    /// What becomes readable when there may be more.
    pub(crate) fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

/// What of a [`RateLimit`] is used up.
#[derive(Debug)]
pub(crate) struct Rates {
    bytes: Option<Pace>,
    operations: Option<Pace>,
}

impl Rates {
    /// Nothing is used up.
    pub(crate) fn new(limit: RateLimit) -> Self {
        let RateLimit {
            bytes_per_second,
            operations_per_second,
        } = limit;
        Self {
            bytes: bytes_per_second.map(Pace::new),
            operations: operations_per_second.map(Pace::new),
        }
    }

    /// Keeps to `limit` from now on. Of a rate that is another than it was, nothing is used up, for what was admitted at another
    /// is neither to be paid for at this one nor to be waited for any more. Of one that is the same, what is used up stays so: nobody
    /// gets another burst by saying it again.
    pub(crate) fn change(&mut self, limit: RateLimit) {
        let RateLimit {
            bytes_per_second,
            operations_per_second,
        } = limit;
        for (pace, rate) in [
            (&mut self.bytes, bytes_per_second),
            (&mut self.operations, operations_per_second),
        ] {
            if pace.as_ref().map(|pace| pace.rate) != rate {
                *pace = rate.map(Pace::new);
            }
        }
    }

    /// How long to wait at `now` for the next; zero if not at all.
    pub(crate) fn wait(&self, now: Instant) -> Duration {
        let paces = self.bytes.iter().chain(&self.operations);
        paces.map(|pace| pace.wait(now)).max().unwrap_or_default()
    }

    /// Counts one that was done at `now` and had `bytes`.
    pub(crate) fn charge(&mut self, now: Instant, bytes: u64) {
        for (pace, amount) in [(&mut self.bytes, bytes), (&mut self.operations, 1)] {
            if let Some(pace) = pace {
                pace.charge(now, amount);
            }
        }
    }
}

/// Tells when a wait is over.
#[derive(Debug)]
pub(crate) struct Timer(OwnedFd);

impl Timer {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Has it become readable once, after `wait`, and not when it was to before.
    pub(crate) fn set(&self, wait: Duration) -> io::Result<()> {
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: wait.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: wait.subsec_nanos().into(),
            },
        };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A clock that goes on only when it is told to. For tests and fuzzers.
#[derive(Clone, Debug)]
pub struct StoppedClock(Arc<Mutex<Instant>>);

impl StoppedClock {
    /// One that shows the time at which it is made.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    /// Has it go on, as far as it can.
    pub fn pass(&self, time: Duration) {
        let mut now = lock(&self.0);
        *now = now.checked_add(time).unwrap_or(*now);
    }

    pub(crate) fn now(&self) -> Instant {
        *lock(&self.0)
    }
}

impl Default for StoppedClock {
    fn default() -> Self {
        Self::new()
    }
}

/// One rate.
#[derive(Debug)]
struct Pace {
    /// Units in a second.
    rate: NonZeroU64,
    /// Until when the rate has been used up.
    paid: Option<Instant>,
}

impl Pace {
    /// Nothing is used up.
    fn new(rate: NonZeroU64) -> Self {
        Self { rate, paid: None }
    }

    /// How long to wait at `now` for the next; zero if not at all.
    fn wait(&self, now: Instant) -> Duration {
        let ahead = self.paid.map(|paid| paid.saturating_duration_since(now));
        ahead.unwrap_or_default().saturating_sub(BURST)
    }

    fn charge(&mut self, now: Instant, amount: u64) {
        let worth = u128::from(amount) * 1_000_000_000 / u128::from(self.rate.get());
        let worth = Duration::from_nanos(u64::try_from(worth).unwrap_or(u64::MAX));
        let from = self.paid.map_or(now, |paid| paid.max(now));
        self.paid = Some(from.checked_add(worth).unwrap_or(from));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn limiter(bytes: u64, operations: u64) -> Limiter {
        let limit = RateLimit {
            bytes_per_second: NonZeroU64::new(bytes),
            operations_per_second: NonZeroU64::new(operations),
        };
        Limiter::new(limit).unwrap().unwrap()
    }

    #[test]
    fn no_limit_is_no_limiter() {
        assert!(Limiter::new(RateLimit::default()).unwrap().is_none());
    }

    #[test]
    fn after_a_burst_there_is_a_wait_of_what_was_too_much() {
        let now = Instant::now();
        let mut limiter = limiter(1000, 0);
        limiter.charge(now, 100);
        assert!(limiter.admits(now), "a burst is a tenth of a second's");
        limiter.charge(now, 500);
        assert!(!limiter.admits(now + Duration::from_millis(499)));
        assert!(limiter.admits(now + Duration::from_millis(500)));
    }

    #[test]
    fn the_stricter_of_two_limits_holds() {
        let now = Instant::now();
        let mut limiter = limiter(1_000_000, 10);
        limiter.charge(now, 1);
        limiter.charge(now, 1);
        assert!(!limiter.admits(now + Duration::from_millis(99)));
        assert!(limiter.admits(now + Duration::from_millis(100)));
    }

    #[test]
    fn the_timer_tells_when_there_may_be_more() {
        let now = Instant::now();
        let mut limiter = limiter(0, 100);
        for _ in 0..20 {
            limiter.charge(now, 1);
        }
        assert!(!limiter.admits(now));
        let mut event = [PollFd::new(&limiter.timer, PollFlags::IN)];
        assert_eq!(poll(&mut event, None).unwrap(), 1);
        assert!(limiter.admits(Instant::now()));
    }

    #[test]
    fn of_a_rate_that_is_another_nothing_is_used_up_and_of_the_other_it_stays_so() {
        let now = Instant::now();
        let limit = |bytes, operations| RateLimit {
            bytes_per_second: NonZeroU64::new(bytes),
            operations_per_second: NonZeroU64::new(operations),
        };
        let mut rates = Rates::new(limit(1000, 10));
        rates.charge(now, 9_100);
        rates.charge(now, 0);
        assert_eq!(rates.wait(now), Duration::from_secs(9));
        for bytes in [10_000, 100, 0] {
            let mut changed = Rates::new(limit(1000, 10));
            changed.charge(now, 9_100);
            changed.charge(now, 0);
            changed.change(limit(bytes, 10));
            assert_eq!(
                changed.wait(now),
                Duration::from_millis(100),
                "two operations"
            );
        }
        rates.change(limit(1000, 0));
        assert_eq!(rates.wait(now), Duration::from_secs(9));
        rates.change(limit(0, 0));
        assert_eq!(rates.wait(now), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn no_amount_overflows(rate in 1u64.., amounts in prop::collection::vec(any::<u64>(), 1..8)) {
            let now = Instant::now();
            let mut limiter = limiter(rate, rate);
            for amount in amounts {
                limiter.charge(now, amount);
                limiter.admits(now);
            }
        }

        /// Whatever the sizes, over a long time the rate is what was asked for, but for one burst and the
        /// last one admitted.
        #[test]
        fn in_the_long_run_the_rate_is_kept(
            rate in 1_000u64..1_000_000,
            sizes in prop::collection::vec(1u64..10_000, 200),
        ) {
            let begin = Instant::now();
            let mut now = begin;
            let mut limiter = limiter(rate, 0);
            let (mut done, mut last) = (0, 0);
            for size in sizes {
                let wait = limiter.rates.bytes.as_ref().unwrap().wait(now);
                now += wait;
                prop_assert!(limiter.admits(now));
                limiter.charge(now, size);
                done += size;
                last = size;
            }
            let may = (now - begin + BURST).as_nanos() * u128::from(rate) / 1_000_000_000;
            prop_assert!(u128::from(done - last) <= may + 200);
        }

        /// From each change on, the rate is what it is then, but for a burst and the last one admitted; to say the same again is no
        /// change.
        #[test]
        fn from_a_change_on_the_new_rate_is_kept(
            changes in prop::collection::vec(
                (1_000u64..1_000_000, prop::collection::vec((1u64..10_000, any::<bool>()), 1..40)),
                1..8,
            ),
        ) {
            let limit = |rate| RateLimit {
                bytes_per_second: NonZeroU64::new(rate),
                operations_per_second: None,
            };
            let mut now = Instant::now();
            let mut rates = Rates::new(RateLimit::default());
            for (rate, sizes) in changes {
                rates.change(limit(rate));
                let begin = now;
                let (mut done, mut last) = (0, 0);
                for (size, again) in sizes {
                    if again {
                        rates.change(limit(rate));
                    }
                    now += rates.wait(now);
                    rates.charge(now, size);
                    done += size;
                    last = size;
                }
                let may = (now - begin + BURST).as_nanos() * u128::from(rate) / 1_000_000_000;
                prop_assert!(u128::from(done - last) <= may + 200);
            }
        }
    }
}
