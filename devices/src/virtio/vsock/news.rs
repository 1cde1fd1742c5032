//! What a driver is told after its machine was restored, and what it does not hear of before it knows: its connections are gone, and it
//! would take those that come for some of them.
//!
//! Linux ends all connections that it has by the time at which it handles the event, those that have come since among them, and
//! gives the event's buffer back then. It need not tell, so that the ring is looked at, soon and then less and less often. A buffer
//! of an event that lay there when the machine was saved may be taken for it: then a connection may end with the others.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use crate::rate_limit::Timer;

/// How long a driver that does not give the buffer back hears of no connections, for it need not give it back: so much of the time in
/// which its machine runs.
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
    /// It has the event.
    Put {
        /// Buffers that it had made available before, modulo 2^16.
        available: u16,
        next: Look,
    },
}

/// When the ring is looked at.
#[derive(Clone, Copy)]
struct Look {
    at: Instant,
    /// How long that is after the one before.
    wait: Duration,
    /// How long there will be more after it.
    left: Duration,
}

impl Look {
    fn first(now: Instant) -> Self {
        Self {
            at: now + FIRST_LOOK,
            wait: FIRST_LOOK,
            left: BOUND - FIRST_LOOK,
        }
    }

    /// The one after this; `None` if this is the last.
    fn next(self, now: Instant) -> Option<Self> {
        let wait = (self.wait * 2).min(self.left);
        (!wait.is_zero()).then(|| Self {
            at: now + wait,
            wait,
            left: self.left - wait,
        })
    }
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

    /// The driver uses the queue for events no more, so that nobody looks at it: it hears of everything.
    pub(super) fn let_go(&mut self) {
        self.hold = None;
    }

    /// What becomes readable when it is worth a look whether the driver may hear of more.
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
    pub(super) fn look(&mut self, available: u16) -> bool {
        let now = Instant::now();
        let (put, next) = match self.hold {
            None => return false,
            // It may never have room.
            Some(Hold::Unseen) if self.is_due => (available, None),
            Some(Hold::Unseen) => (available, Some(Look::first(now))),
            Some(Hold::Put { available, next }) if now < next.at => (available, Some(next)),
            Some(Hold::Put { available, next }) => (available, next.next(now)),
        };
        let next = next.filter(|_| put == available);
        // Without a timer, nobody would look.
        let next = next.filter(|next| {
            self.timer
                .set(next.at.saturating_duration_since(now))
                .is_ok()
        });
        self.hold = next.map(|next| Hold::Put {
            available: put,
            next,
        });
        self.hold.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_come_to_an_end_after_the_bound() {
        let start = Instant::now();
        let looks: Vec<Look> =
            std::iter::successors(Some(Look::first(start)), |look| look.next(look.at)).collect();
        assert_eq!(looks.last().unwrap().at - start, BOUND);
        assert!(looks.len() < 15, "{}", looks.len());
        assert!(looks.iter().all(|look| !look.wait.is_zero()));
    }

    #[test]
    fn a_driver_that_has_its_queue_looked_at_again_and_again_gains_nothing() {
        let mut news = News::none().unwrap();
        news.arrive(true);
        news.are_put();
        let begun = Instant::now();
        let mut rounds = 0;
        while !news.look(7) {
            rounds += 1;
        }
        assert!(rounds > 100 && begun.elapsed() >= BOUND);
        assert!(!news.hold() && !news.look(7));
    }
}
