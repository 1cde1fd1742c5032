//! A machine that stands still, to be saved or looked at.

use std::time::{Duration, Instant};

use branch_disk::LayerRef;
use control::GuestClock;
use hypervisor::{Vm, cpu_identity};
use memory::{AtCut, MachineMemory};
use saved_state::{Container, Header, SnapshotId};
use snapshot::Draft;

use super::{Cut, Machine};
use crate::{
    disks::{self, AttachedDisk, Cuts},
    error::Error,
    state::{DiskState, MachineState},
    stored_disks::StoredAs,
    urgent::Urgent,
};

/// A machine that is held. Dropped, it lets the machine go on if it ran before.
#[must_use = "the machine goes on when this is dropped"]
pub(crate) struct Held<'a> {
    pub(super) machine: &'a mut Machine,
    /// The calling thread's, while the machine stands still for what takes no longer than that can be.
    pub(super) urgent: Option<Urgent>,
    /// Whether it ran before.
    pub(super) ran: bool,
    /// What its clocks have done meanwhile, if it goes on.
    pub(super) clock: GuestClock,
}

impl Held<'_> {
    /// What comes now takes longer than others should wait for a CPU.
    pub(crate) fn take_time(&mut self) {
        self.urgent = None;
    }

    /// Leaves the machine held.
    pub(crate) fn keep(mut self) {
        self.ran = false;
    }

    /// Has its clocks do this if it goes on; else they stand still.
    pub(crate) fn with_clock(mut self, clock: GuestClock) -> Self {
        self.clock = clock;
        self
    }

    /// Lets the machine go on, whether it ran before or not; tells for how long it stood still.
    pub(crate) fn let_go(mut self) -> (Result<(), Error>, Duration) {
        self.ran = false;
        let gone_on = self.machine.run(self.clock);
        // While this thread has its priority: without, it may wait for a CPU behind the guest that goes on.
        let stood_still = self.since().elapsed();
        (gone_on, stood_still)
    }

    /// Since when it has been standing still.
    pub(crate) fn since(&self) -> Instant {
        self.machine.held_since
    }

    /// Its memory.
    pub(crate) fn memory(&self) -> &MachineMemory {
        &self.machine.memory
    }

    /// Everything of it but its memory and the content of its disks, which is what `cuts` says, as the snapshot `id`.
    pub(crate) fn save(&mut self, id: SnapshotId, cuts: &Cuts) -> Result<Container, Error> {
        // Exhaustive, so that a new field is either saved or said not to be.
        let Machine {
            vm,
            memory,
            vcpu_count,
            disks,
            vcpus,
            event_loop: _,
            counters,
            quiesced: _,
            held_since: _,
            stalled: _,
            clock,
            cut,
            restored: _,
            told: _,
            lost: _,
            stored_as: _,
            live: _,
            merging: _,
            baseline: _,
            bringing: _,
        } = &mut *self.machine;
        let mut container = Container::new(header(id, vm, memory, *vcpu_count, *cut));
        let disks: Result<_, _> = (disks.iter().enumerate())
            .map(|(index, disk)| disk_state(disk, cuts.layer(index)))
            .collect();
        container.put(0, &MachineState { disks: disks? })?;
        for state in vcpus.save(clock.stopped())? {
            container.put(state.id, &state)?;
        }
        container.put(0, &vm.save()?)?;
        counters.devices.save(&mut container)?;
        Ok(container)
    }

    /// Its disks.
    pub(crate) fn disks(&self) -> &[AttachedDisk] {
        self.machine.disks()
    }

    /// What its memory is now, for `draft`, while it goes on. `last` is what it was last in the store.
    pub(crate) fn cut(&mut self, draft: &Draft, last: Option<&StoredAs>) -> Result<AtCut, Error> {
        // After the cut, to write that would take a fault, for which the guest waits.
        if self.clock == GuestClock::StandStill && !self.machine.restored {
            self.machine.tell_of_hold()?;
        }
        let Machine { live, memory, .. } = &*self.machine;
        let live = live
            .as_ref()
            .ok_or(Error::Tracking(std::io::ErrorKind::NotFound.into()))?;
        let last = last.map(|last| last.id.as_str());
        live.cut(draft, last, memory.layout().bytes())
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.ran
            && let Err(error) = self.machine.run(self.clock)
        {
            tracing::error!("the machine cannot go on: {error}");
        }
    }
}

fn disk_state(disk: &AttachedDisk, ended: Option<&LayerRef>) -> Result<DiskState, Error> {
    let config = &disk.config;
    let state = match (ended, disks::read_layer(disk)) {
        (Some(layer), _) => Ok(DiskState::of_layer(config, layer)),
        (None, Some(read)) => DiskState::of_read_layer(config, read),
        (None, None) => DiskState::of(config),
    };
    state.map_err(|source| Error::DiskSync {
        path: config.path.display().to_string(),
        source,
    })
}

fn header(id: SnapshotId, vm: &Vm, memory: &MachineMemory, vcpus: u32, cut: Cut) -> Header {
    Header {
        id,
        release: crate::RELEASE.to_owned(),
        created_unix_ns: cut.unix_ns(),
        host_cpu: cpu_identity(vm.cpuid()),
        vcpus,
        memory_bytes: memory.layout().bytes(),
    }
}
