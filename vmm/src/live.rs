//! Snapshots that the guest goes on beside, at least until little of it is left to be saved: what is written to its memory is
//! known.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use control::MemoryCopy;
use memory::{AtCut, Elsewhere, Outcome, PAGE_BYTES, Tracker};
use snapshot::{Draft, Saving};

use crate::{beside::beside_guest, boot::VMCLOCK, error::Error, machine::Machine, pre_copy};

/// Knows what is written to a machine's memory.
pub(crate) struct Live {
    tracker: Tracker,
    /// The snapshot in the store that has what was not written to since, by its id.
    base: Option<String>,
}

/// What was done for a snapshot while the guest ran.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prepared {
    /// How its memory is saved.
    pub(crate) copy: MemoryCopy,
    /// How often memory was gone through.
    pub(crate) rounds: u32,
    /// Bytes that were copied.
    pub(crate) copied_bytes: u64,
}

/// A snapshot that is to be taken.
pub(crate) struct Plan<'a> {
    /// How memory is to be saved, if it was said.
    pub(crate) copy: Option<MemoryCopy>,
    pub(crate) goes_on: bool,
    /// What the machine was last in the store.
    pub(crate) last: Option<&'a str>,
    pub(crate) saving: &'a Saving,
    /// Set once the guest has ended itself.
    pub(crate) ending: &'a AtomicBool,
    /// How long the guest may stand still for its memory to be read.
    pub(crate) downtime: Option<Duration>,
    /// Whether it may read only so much in a second.
    pub(crate) is_slowed: bool,
}

/// Does for a snapshot of `machine` what can be done while the guest runs. There is nothing if it stands still until it is saved.
pub(crate) fn prepare(
    machine: &mut Machine,
    plan: &Plan<'_>,
    draft: &mut Draft,
) -> Result<Option<Prepared>, Error> {
    let prepared = match plan.copy {
        Some(MemoryCopy::StopAndCopy) => None,
        Some(MemoryCopy::CopyOnWrite) if !plan.goes_on => return Err(Error::NothingGoesOn),
        Some(MemoryCopy::CopyOnWrite) => Some(arm(machine, plan)?),
        Some(MemoryCopy::PreCopy) => Some(pre_copy(machine, plan, draft)?),
        None if !plan.goes_on => None,
        None => arm(machine, plan)
            .inspect_err(|error| tracing::info!("the guest stands still to be saved: {error}"))
            .ok(),
    };
    if prepared.is_some()
        && let Err(error) = expect_own_writes(machine)
    {
        tracing::debug!("a stop takes a fault more: {error}");
    }
    Ok(prepared)
}

/// What is written to while the guest stands still is not to take a fault then.
fn expect_own_writes(machine: &mut Machine) -> Result<(), Error> {
    let told_by = machine
        .memory()
        .layout()
        .image_ranges(VMCLOCK..VMCLOCK + PAGE_BYTES);
    let told_by: Vec<_> = told_by.collect();
    let tracker = &live(machine)?.tracker;
    told_by
        .iter()
        .try_for_each(|image| tracker.expect_write(image))
        .map_err(Error::Tracking)
}

fn arm(machine: &mut Machine, plan: &Plan<'_>) -> Result<Prepared, Error> {
    let armed = live(machine)?.tracker.arm(&|| plan.go_on());
    let armed = armed.map_err(|error| plan.ended().unwrap_or(Error::Tracking(error)))?;
    Ok(Prepared {
        copy: MemoryCopy::CopyOnWrite,
        rounds: armed.rounds,
        copied_bytes: 0,
    })
}

fn pre_copy(machine: &mut Machine, plan: &Plan<'_>, draft: &mut Draft) -> Result<Prepared, Error> {
    let memory_bytes = machine.memory().layout().bytes();
    let in_hand = machine.devices_in_hand();
    let live = live(machine)?;
    draft.begin_copies(memory_bytes)?;
    let building = live.is_building(draft, plan.last, memory_bytes);
    let rounds = beside_guest(|| pre_copy::copy(&live.tracker, draft, building, plan, &in_hand))?;
    Ok(Prepared {
        copy: MemoryCopy::PreCopy,
        rounds: rounds.count,
        copied_bytes: rounds.bytes,
    })
}

fn live(machine: &mut Machine) -> Result<&mut Live, Error> {
    let live = match machine.live.take() {
        Some(live) => live,
        None => Live {
            tracker: machine.memory().track()?,
            base: None,
        },
    };
    Ok(machine.live.insert(live))
}

impl Plan<'_> {
    /// Why there is nothing to save any more, if the guest is ending.
    pub(crate) fn ended(&self) -> Option<Error> {
        let ends = self.ending.load(Ordering::SeqCst);
        ends.then_some(Error::GuestEnds)
    }

    /// Whether to go on with it; if not, who takes the snapshot looks why.
    pub(crate) fn go_on(&self) -> io::Result<()> {
        match self.ended().is_some() || self.saving.is_cancelled() {
            true => Err(io::ErrorKind::Interrupted.into()),
            false => Ok(()),
        }
    }
}

impl Live {
    /// Whether `draft` takes from its parent what was not written to since.
    fn is_building(&self, draft: &Draft, last: Option<&str>, memory_bytes: u64) -> bool {
        let is_parent = self.base.is_some() && self.base.as_deref() == last;
        is_parent && draft.can_keep(memory_bytes, AtCut::UNIT_BYTES)
    }

    /// What memory is now, for `draft`. The machine is held; `last` is what it was last in the store.
    pub(crate) fn cut(
        &self,
        draft: &Draft,
        last: Option<&str>,
        memory_bytes: u64,
    ) -> Result<AtCut, Error> {
        let elsewhere = Elsewhere {
            base: self.is_building(draft, last, memory_bytes),
            copies: draft.has_copies(),
        };
        self.tracker.cut(elsewhere).map_err(Error::Tracking)
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
