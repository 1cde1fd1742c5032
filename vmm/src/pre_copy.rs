//! Memory is copied while the guest writes to it, over and over, until little of it is left for when the guest stands still.
//!
//! That is how live migration works (Clark et al., NSDI 2005), and how VNsnap (Kangarlou, Xu and Eugster, 2008) saves machines.

use std::time::{Duration, Instant};

use memory::{AtCut, Tracker};
use snapshot::Draft;

use crate::{error::Error, live::Plan};

/// With at most so many granules left the guest is stopped: to copy them is not worth another round.
const FEW: usize = 32;
/// A guest that writes about as fast as it is copied is not caught up with.
const MAX_ROUNDS: u32 = 30;

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
) -> Result<Rounds, Error> {
    tracker.begin_copies().map_err(Error::Host)?;
    let limit = plan.downtime.filter(|_| !plan.goes_on);
    let mut rounds = Rounds::default();
    let mut last = usize::MAX;
    let mut rate: Option<Rate> = None;
    loop {
        let left = tracker.to_copy(building, &|| plan.go_on());
        let left = left.map_err(|error| plan.ended().unwrap_or(Error::Host(error)))?;
        rounds.count += 1;
        let shrinks = left.len() <= last - last / 4;
        let takes = rate.map(|rate| rate.time_for(left.len() as u64 * AtCut::UNIT_BYTES));
        let fits = |limit: Duration| takes.is_some_and(|takes| takes <= limit / 2);
        if left.len() <= FEW || limit.is_some_and(fits) {
            return Ok(rounds);
        }
        if !shrinks || rounds.count == MAX_ROUNDS {
            return match limit.zip(takes) {
                Some((limit, takes)) if takes > limit => Err(Error::StandsTooLong),
                _ => Ok(rounds),
            };
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
