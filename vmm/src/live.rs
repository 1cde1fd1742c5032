//! Snapshots that the guest goes on beside: what is written to its memory is known.

use control::MemoryCopy;
use memory::{Armed, AtCut, Outcome, Tracker};
use snapshot::Draft;

use crate::{error::Error, machine::Machine};

/// Knows what is written to a machine's memory.
pub(crate) struct Live {
    tracker: Tracker,
    /// The snapshot in the store that has what was not written to since, by its id.
    base: Option<String>,
}

/// How the memory of `machine` is saved, as it was `asked` for: if by copy-on-write, as much as can be is done for that while the
/// guest runs. That takes a machine that goes on.
pub(crate) fn prepare(
    machine: &mut Machine,
    asked: Option<MemoryCopy>,
    goes_on: bool,
) -> Result<Option<Armed>, Error> {
    match asked {
        Some(MemoryCopy::StopAndCopy) => Ok(None),
        Some(MemoryCopy::CopyOnWrite) if !goes_on => Err(Error::NothingGoesOn),
        Some(MemoryCopy::CopyOnWrite) => arm(machine).map(Some),
        None if !goes_on => Ok(None),
        None => Ok(arm(machine)
            .inspect_err(|error| tracing::info!("the guest stands still to be saved: {error}"))
            .ok()),
    }
}

fn arm(machine: &mut Machine) -> Result<Armed, Error> {
    let live = match machine.live.take() {
        Some(live) => live,
        None => Live {
            tracker: machine.memory().track()?,
            base: None,
        },
    };
    let live = machine.live.insert(live);
    live.tracker.arm().map_err(Error::Host)
}

impl Live {
    /// What memory is now, for `draft`. The machine is held; `last` is what it was last in the store.
    pub(crate) fn cut(
        &self,
        draft: &Draft,
        last: Option<&str>,
        memory_bytes: u64,
    ) -> Result<AtCut, Error> {
        let is_parent = self.base.is_some() && self.base.as_deref() == last;
        let building = is_parent && draft.can_keep(memory_bytes, AtCut::UNIT_BYTES);
        self.tracker.cut(building).map_err(Error::Host)
    }

    /// The snapshot of `at_cut` is complete, and in the store by this id if it went there.
    pub(crate) fn saved(&mut self, at_cut: AtCut, stored: Option<&str>) {
        match stored {
            Some(id) => {
                at_cut.finish(Outcome::NewBase);
                self.base = Some(id.to_owned());
            }
            None => at_cut.finish(Outcome::SameBase),
        }
    }
}
