//! Memory is copied while the guest writes to it, over and over, until little of it is left for when the guest stands still.
//!
//! That is how live migration works (Clark et al., NSDI 2005), and how VNsnap (Kangarlou, Xu and Eugster, 2008) saves machines.

use std::{io, sync::atomic::Ordering};

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

/// Copies memory to `draft` in rounds, each of what was written to in the one before, until little is left or hardly less than
/// before; if `building`, without what is in the base. What was copied is not to be read at the cut.
pub(crate) fn copy(
    tracker: &Tracker,
    draft: &Draft,
    building: bool,
    plan: &Plan<'_>,
) -> Result<Rounds, Error> {
    tracker.begin_copies().map_err(Error::Host)?;
    let mut rounds = Rounds::default();
    let mut last = usize::MAX;
    loop {
        let left = tracker.to_copy(building).map_err(Error::Host)?;
        rounds.count += 1;
        let shrinks = left.len() <= last - last / 4;
        if left.len() <= FEW || !shrinks || rounds.count == MAX_ROUNDS {
            return Ok(rounds);
        }
        let ends = || plan.ending.load(Ordering::SeqCst);
        let read = |offset, content: &mut [u8]| match ends() {
            // There will be nothing to save.
            true => Err(io::ErrorKind::Interrupted.into()),
            false => tracker.copy(offset, content),
        };
        let copied = draft.copy(&left, AtCut::UNIT_BYTES, read, plan.saving);
        let copied = copied.map_err(|error| match ends() {
            true => Error::GuestEnds,
            false => error.into(),
        })?;
        rounds.bytes += copied * AtCut::UNIT_BYTES;
        last = left.len();
        tracing::debug!(
            round = rounds.count,
            listed = left.len(),
            copied,
            "memory was copied"
        );
    }
}
