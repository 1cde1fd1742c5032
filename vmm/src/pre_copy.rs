//! Memory is copied while the guest writes to it, over and over, until little of it is left for when the guest stands still.
//!
//! That is how live migration works (Clark et al., NSDI 2005), and how VNsnap (Kangarlou, Xu and Eugster, 2008) saves machines.

use std::time::{Duration, Instant};

use devices::InHand;
use memory::{AtCut, Tracker};
use snapshot::Draft;

use crate::{error::Error, live::Plan};

/// With at most so many granules left the guest is stopped: to copy them is not worth another round.
const FEW: usize = 32;
/// A guest that writes about as fast as it is copied is not caught up with.
const MAX_ROUNDS: u32 = 30;
/// How often it is looked whether the snapshot is still wanted while a device is waited for.
const INTERVAL: Duration = Duration::from_millis(100);

/// What was copied.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rounds {
    /// How often memory was gone through.
    pub(crate) count: u32,
    /// Bytes that were copied, some more than once.
    pub(crate) bytes: u64,
}

/// How fast memory is copied.
#[derive(Clone, Copy)]
struct Rate {
    bytes: u64,
    took: Duration,
}

impl Rate {
    /// How long so many bytes take; as good as for ever, if nothing is known.
    fn time_for(self, bytes: u64) -> Duration {
        let ns = u128::from(bytes) * self.took.as_nanos() / u128::from(self.bytes.max(1));
        Duration::from_nanos(ns.try_into().unwrap_or(u64::MAX))
    }
}

/// Copies memory to `draft` in rounds, each of what was written to in the one before, until little is left or hardly less than
/// before; if `building`, without what is in the base. What was copied is not to be read at the cut.
///
/// If the machine is not to go on, what is left keeps it standing still. If it may do so for a limited time only, there are rounds until what is left takes half of
/// that; when that cannot be reached, this fails.
pub(crate) fn copy(
    tracker: &Tracker,
    draft: &Draft,
    building: bool,
    plan: &Plan<'_>,
    in_hand: &InHand,
) -> Result<Rounds, Error> {
    tracker.begin_copies().map_err(Error::Tracking)?;
    let limit = plan.downtime.filter(|_| !plan.goes_on);
    let mut rounds = Rounds::default();
    let mut last = usize::MAX;
    let mut rate: Option<Rate> = None;
    loop {
        let left = tracker.to_copy(building, &|| plan.go_on());
        let left = left.map_err(|error| plan.ended().unwrap_or(Error::Tracking(error)))?;
        rounds.count += 1;
        let takes = rate.map(|rate| rate.time_for(left.len() as u64 * AtCut::UNIT_BYTES));
        let is_last = rounds.count == MAX_ROUNDS;
        match next(left.len(), last, is_last, limit.zip(takes)) {
            Next::Copy => {}
            Next::Stop => return Ok(rounds),
            Next::GiveUp => return Err(Error::StandsTooLong),
        }
        // A request that began before its pages were protected may write to them by what the kernel holds of them, which nobody notices.
        while !in_hand.is_done_within(INTERVAL) {
            let goes_on = plan.go_on();
            goes_on.map_err(|error| plan.ended().unwrap_or(Error::Tracking(error)))?;
        }
        let begun = Instant::now();
        let copied = round(tracker, draft, &left, plan)?;
        // What was slowed on purpose, or was nothing, says nothing of how fast the last of it goes.
        if copied > 0 && !plan.is_slowed {
            rate = Some(Rate {
                bytes: copied,
                took: begun.elapsed(),
            });
        }
        rounds.bytes += copied;
        last = left.len();
        tracing::debug!(
            round = rounds.count,
            listed = left.len(),
            copied,
            "memory was copied"
        );
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Copy what is left.
    Copy,
    /// Stop the guest for it.
    Stop,
    /// Leave it: the guest would stand still for too long.
    GiveUp,
}

/// With so many granules left, and so many before. Of a limited time to stand still, it comes with what it is thought to take, if that is known.
fn next(left: usize, last: usize, is_last: bool, limit: Option<(Duration, Duration)>) -> Next {
    let fits = limit.is_some_and(|(limit, takes)| takes <= limit / 2);
    if left <= FEW || fits {
        return Next::Stop;
    }
    let shrinks = left <= last - last / 4;
    if shrinks && !is_last {
        return Next::Copy;
    }
    match limit {
        Some((limit, takes)) if takes > limit => Next::GiveUp,
        _ => Next::Stop,
    }
}

/// Copies the granules at these offsets; returns how many bytes were.
fn round(tracker: &Tracker, draft: &Draft, offsets: &[u64], plan: &Plan<'_>) -> Result<u64, Error> {
    let read = |offset, content: &mut [u8]| {
        plan.go_on()?;
        tracker.copy(offset, content)
    };
    let copied = draft.copy(offsets, AtCut::UNIT_BYTES, read, plan.saving);
    let copied = copied.map_err(|error| plan.ended().unwrap_or_else(|| error.into()))?;
    Ok(copied * AtCut::UNIT_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_guest_is_stopped_when_little_is_left_or_copying_gains_nothing() {
        assert_eq!(next(FEW + 1, usize::MAX, false, None), Next::Copy);
        assert_eq!(next(FEW, usize::MAX, false, None), Next::Stop);
        assert_eq!(next(750, 1000, false, None), Next::Copy);
        assert_eq!(next(751, 1000, false, None), Next::Stop);
        assert_eq!(next(750, 1000, true, None), Next::Stop);
    }

    #[test]
    fn a_guest_that_may_not_stand_still_for_so_long_is_not_stopped() {
        let next = |left, is_last, takes| next(left, 1000, is_last, Some((10 * MS, takes)));
        assert_eq!(next(1000, false, 5 * MS), Next::Stop);
        assert_eq!(next(500, false, 6 * MS), Next::Copy);
        // It may take longer than is thought, but not less than it may.
        assert_eq!(next(1000, false, 10 * MS), Next::Stop);
        assert_eq!(next(1000, false, 11 * MS), Next::GiveUp);
        assert_eq!(next(500, true, 11 * MS), Next::GiveUp);
        assert_eq!(next(FEW, true, 11 * MS), Next::Stop);
    }
}
