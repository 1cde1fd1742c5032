//! A machine whose memory comes while it runs, and that stands still for lack of a page.
//!
//! Whoever touches a page that has not come waits in the kernel. Where the page cannot be had, the machine is held, as far as it can
//! be: a vCPU that waits for the page comes back when it is kicked (from Linux 6.2 on), a thread that touches memory for a device does not. So a hold
//! may end half-way. Who waits has done nothing that could be wrong, and comes to rest when the page is there.

use std::{ops::Range, time::Duration};

use control::{LaunchSpec, UseWorkingSet};
use snapshot::{Lost, OnDemand, Snapshot};

use super::{Bounds, Listeners, Machine, going_on::CLOCK_LEAD, host_pages};
use crate::{
    error::Error,
    frame::{Frame, Restored},
};

/// How long a machine that lacks a page may take to stand still. Who takes longer waits for the page.
const BOUNDS: Bounds = Bounds {
    vcpus: Duration::from_secs(2),
    devices: Duration::from_secs(2),
};

/// Who keeps a machine from standing still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stalled {
    /// A vCPU. All have been told to.
    InVcpu,
    /// A device. All vCPUs are held.
    InDevice,
}

impl Stalled {
    /// What vCPUs need to get ready in, to go on after that.
    pub(super) fn lead(self) -> Duration {
        match self {
            Self::InVcpu => Duration::ZERO,
            Self::InDevice => CLOCK_LEAD,
        }
    }
}

/// What has the memory of `saved`, which comes on demand if `spec` says so, with who brings it then: `prepared`, if that is there and
/// for it, or another.
pub(super) fn load(
    saved: &Snapshot,
    prepared: Option<Frame>,
    vcpus: u32,
    spec: &LaunchSpec,
    listeners: &Listeners,
) -> Result<(Frame, Option<OnDemand>), Error> {
    let bytes = saved.state.header.memory_bytes;
    let prepared = match prepared {
        Some(frame) if frame.is_for(vcpus, bytes) && !spec.hugepages => Some(frame),
        Some(frame) => {
            frame.put_away();
            None
        }
        None => None,
    };
    if spec.on_demand {
        let (frame, arriving) = on_demand(saved, prepared, vcpus, spec, listeners)?;
        return Ok((frame, Some(arriving)));
    }
    if let Some(frame) = prepared
        && (frame.restored != Restored::Nothing || saved.load_over(&frame.memory)?)
    {
        return Ok((frame, None));
    }
    let memory = saved.load_into(host_pages(spec))?;
    Ok((Frame::new(memory, vcpus)?, None))
}

fn on_demand(
    saved: &Snapshot,
    prepared: Option<Frame>,
    vcpus: u32,
    spec: &LaunchSpec,
    listeners: &Listeners,
) -> Result<(Frame, OnDemand), Error> {
    if spec.hugepages {
        return Err(Error::HugeOnDemand);
    }
    let working_set = match spec.working_set {
        UseWorkingSet::Bring => snapshot::UseWorkingSet::Bring,
        UseWorkingSet::Record => snapshot::UseWorkingSet::Record,
        UseWorkingSet::Ignore => snapshot::UseWorkingSet::Ignore,
    };
    let lost = listeners.lost.clone();
    let on_loss = Box::new(move |page: &Lost| lost(page));
    let Some(frame) = prepared else {
        let (memory, arriving) = saved.load_on_demand(None, working_set, on_loss)?;
        return Ok((Frame::new(memory, vcpus)?, arriving));
    };
    let (memory, arriving) = saved.load_on_demand(Some(frame.memory), working_set, on_loss)?;
    Ok((Frame { memory, ..frame }, arriving))
}

impl Machine {
    /// Has the rest of its memory and its disks come, too, which takes CPUs that it had to itself to start. What it touches from now on
    /// may be recorded first.
    pub(crate) fn bring_the_rest(&self) -> Result<(), Error> {
        self.bringing.bring_the_rest()?;
        if let Some(arriving) = &self.counters.arriving {
            arriving.bring_the_rest(self.is_running())?;
        }
        Ok(())
    }

    /// Holds it for lack of a page, as far as it can be.
    pub(crate) fn stall(&mut self) {
        if !self.is_running() {
            return;
        }
        if let Err((stalled, error)) = self.stand_still(BOUNDS, false) {
            tracing::warn!("not all of the machine stands still: {error}");
            self.stalled = Some(stalled);
        }
    }

    /// Whether it was held for lack of a page, and not all of it stands still.
    pub(crate) fn is_stalled(&self) -> bool {
        self.stalled.is_some()
    }

    /// Tries again to have the pages that could not be had.
    pub(crate) fn retry(&self) -> Result<(), Lost> {
        let arriving = self.counters.arriving.as_ref();
        arriving.map_or(Ok(()), OnDemand::retry)
    }

    /// Has the pages at `gpas` come.
    pub(super) fn need(&self, gpas: Range<u64>) -> Result<(), Lost> {
        let arriving = self.counters.arriving.as_ref();
        arriving.map_or(Ok(()), |arriving| arriving.need(gpas))
    }

    /// Has those stand still who could not for lack of a page, which is there now.
    pub(super) fn end_stall(&mut self) -> Result<(), Error> {
        if self.stalled.is_none() {
            return Ok(());
        }
        self.stand_still(BOUNDS, false).map_err(|(stalled, error)| {
            self.stalled = Some(stalled);
            // Another page, most likely.
            self.counters.lost().map_or(error, Error::Lost)
        })
    }
}
