//! The host's side of a balloon: what it wants, and what it knows.
//!
//! It is shared with who controls the machine, so that neither waits for the event loop, which hears of what is new by
//! descriptors.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use rustix::{
    event::{EventfdFlags, eventfd},
    time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    },
};

use super::Statistics;
use crate::sync::lock;

/// What is wanted of a balloon, and known of it.
#[derive(Debug)]
pub struct BalloonControl {
    state: Mutex<State>,
    /// Signalled when there are new statistics.
    told: Condvar,
    /// Readable once the target is another.
    pub(super) target_changed: OwnedFd,
    /// Readable once somebody wants statistics.
    pub(super) statistics_wanted: OwnedFd,
    /// Readable when it is time to ask for statistics.
    pub(super) statistics_due: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    target_pages: u32,
    actual_pages: u32,
    interval_s: u32,
    /// A driver is at work.
    driver: bool,
    statistics: Option<(Instant, Statistics)>,
    /// The driver has told statistics, and can be asked for others.
    tells: bool,
    /// How often the guest has told its statistics.
    tellings: u64,
}

/// How it stands with a balloon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalloonStatus {
    /// Whether the guest has a driver for it at work.
    pub driver: bool,
    /// Pages, of 4 KiB, that are to be in it.
    pub target_pages: u32,
    /// Pages that the driver says are in it.
    pub actual_pages: u32,
    /// Seconds between two times that the guest is asked for statistics; 0 if it is asked on demand only.
    pub statistics_interval_s: u32,
    /// What the guest has last told, and how long ago.
    pub statistics: Option<(Duration, Statistics)>,
}

impl BalloonControl {
    pub(super) fn new() -> io::Result<Self> {
        let event = || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            state: Mutex::default(),
            told: Condvar::new(),
            target_changed: event()?,
            statistics_wanted: event()?,
            statistics_due: timerfd_create(TimerfdClockId::Monotonic, flags)?,
        })
    }

    /// Has the balloon become one of `pages` pages of 4 KiB, as far as the guest goes along.
    pub fn set_target(&self, pages: u32) {
        self.state().target_pages = pages;
        signal(&self.target_changed);
    }

    /// Has the guest asked for statistics every `seconds`, from now on; 0 for on demand only.
    pub fn set_statistics_interval(&self, seconds: u32) {
        let mut state = self.state();
        state.interval_s = seconds;
        let every = Timespec {
            tv_sec: seconds.into(),
            tv_nsec: 0,
        };
        let timer = Itimerspec {
            it_interval: every,
            it_value: every,
        };
        // The descriptor is a timer, and the time is one: it cannot fail.
        if let Err(error) = timerfd_settime(
            self.statistics_due.as_fd(),
            TimerfdTimerFlags::empty(),
            &timer,
        ) {
            tracing::warn!(%error, "a balloon's statistics are told on demand only");
        }
    }

    /// How it stands with the balloon, by what is known.
    pub fn status(&self) -> BalloonStatus {
        status(&self.state())
    }

    /// As [`BalloonControl::status`], with statistics that the guest is asked for now: waits at most `patience` for them. A
    /// guest that stands still tells nothing; for one that has never told any, nobody waits.
    pub fn ask(&self, patience: Duration) -> BalloonStatus {
        let state = self.state();
        if !state.tells {
            return status(&state);
        }
        let before = state.tellings;
        signal(&self.statistics_wanted);
        let waited = self
            .told
            .wait_timeout_while(state, patience, |state| state.tellings == before);
        let (state, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        status(&state)
    }

    pub(super) fn set_driver(&self, driver: bool) {
        self.state().driver = driver;
    }

    /// Whether the driver can be asked for statistics.
    pub(super) fn set_tells(&self, tells: bool) {
        self.state().tells = tells;
    }

    pub(super) fn set_actual(&self, pages: u32) {
        self.state().actual_pages = pages;
    }

    pub(super) fn set_statistics(&self, statistics: Statistics) {
        let mut state = self.state();
        state.statistics = Some((Instant::now(), statistics));
        state.tells = true;
        state.tellings += 1;
        drop(state);
        self.told.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// Makes an eventfd readable.
fn signal(event: &OwnedFd) {
    // It fails only when its count is at the limit, and then it is readable anyway.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// Whether an eventfd or a timer is readable; it is not any more.
pub(super) fn take(event: &OwnedFd) -> bool {
    rustix::io::read(event, &mut [0; 8]).is_ok()
}

fn status(state: &State) -> BalloonStatus {
    let State {
        target_pages,
        actual_pages,
        interval_s,
        driver,
        statistics,
        tells: _,
        tellings: _,
    } = state;
    BalloonStatus {
        driver: *driver,
        target_pages: *target_pages,
        actual_pages: *actual_pages,
        statistics_interval_s: *interval_s,
        statistics: statistics
            .as_ref()
            .map(|(told, statistics)| (told.elapsed(), statistics.clone())),
    }
}
