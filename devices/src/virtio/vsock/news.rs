//! What a driver is told after its machine was restored, and what it does not hear of before it knows: its connections are gone, and it
//! would take those that come for some of them.
//!
//! Linux ends all connections that it has by the time at which it handles the event, those that have come since among them, and
//! gives the event's buffer back then. It need not tell, so that the ring is looked at, soon and then less and less often.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use crate::rate_limit::Timer;

/// How long a driver that does not give the buffer back hears of no connections: it need not give it back.
const BOUND: Duration = Duration::from_secs(1);

/// How soon the ring is looked at for the first time. Each time after it takes twice as long.
const FIRST_LOOK: Duration = Duration::from_millis(1);

/// The news that a driver's connections are gone.
pub(super) struct News {
    /// It has not been put into a buffer yet.
    is_due: bool,
    hold: Option<Hold>,
    /// Becomes readable when the ring is to be looked at.
    timer: Timer,
}

/// Until when the driver hears of nothing else.
#[derive(Clone, Copy)]
enum Hold {
    /// Nobody has looked whether it has room for the event.
    Unseen,
    /// It has the event, and had made so many buffers available before.
    Put {
        available: u16,
        until: Instant,
        look: Duration,
    },
}

impl News {
    /// Nothing to tell.
    pub(super) fn none() -> io::Result<Self> {
        Ok(Self {
            is_due: false,
            hold: None,
            timer: Timer::new()?,
        })
    }

    /// There are. A queue for events that the driver does not use is not looked at, and holds nothing up.
    pub(super) fn arrive(&mut self, uses_events: bool) {
        self.is_due = true;
        self.hold = uses_events.then_some(Hold::Unseen);
    }

    /// They are nobody's.
    pub(super) fn forget(&mut self) {
        self.is_due = false;
        self.hold = None;
    }

    /// What becomes readable when the queue for events is worth a look.
    pub(super) fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Whether they are to be put into a buffer.
    pub(super) fn is_due(&self) -> bool {
        self.is_due
    }

    /// They were.
    pub(super) fn are_put(&mut self) {
        self.is_due = false;
    }

    /// Whether the driver is to hear of nothing else yet.
    pub(super) fn hold(&self) -> bool {
        self.hold.is_some()
    }

    /// The queue for events was looked at; before that, the driver had made `available` buffers available, modulo 2^16. Says whether it may
    /// hear of all else from now on: if it had no room, too, for it may never have any.
    pub(super) fn end_hold(&mut self, available: u16) -> bool {
        let now = Instant::now();
        let (put, until, look) = match self.hold {
            None => return false,
            Some(Hold::Unseen) => (available, now + BOUND, FIRST_LOOK),
            Some(Hold::Put {
                available,
                until,
                look,
            }) => (available, until, look * 2),
        };
        // Without a timer, nobody would look.
        let waits = !self.is_due && put == available && now < until;
        self.hold = (waits && self.timer.set(look).is_ok()).then_some(Hold::Put {
            available: put,
            until,
            look,
        });
        self.hold.is_none()
    }
}
