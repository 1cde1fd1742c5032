//! A machine that goes back to the snapshot it was made of, in its process: by undoing what it has done since.
//!
//! That takes memory which is mapped from the snapshot's, and disks that can go back, too. What is outside of the machine stays
//! as it is: nothing that a guest has sent comes back, and what is on its way to it comes to the machine that it was.

use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use control::{Confinement, GuestClock, ResetReport};
use hypervisor::{ClockPlan, VcpuState, VmState};
use memory::{BroughtBack, MachineMemory, Original};
use saved_state::{Container, SavedState};

use super::{BOUNDS, Cut, Machine};
use crate::{disks, error::Error, vcpus::Vcpus};

/// What vCPUs have to get ready in: they have just been told something, and are awake. Whoever is late has the guest see that
/// time pass, and whoever resets a machine thousands of times a second would rather that than wait.
const LEAD: Duration = Duration::from_micros(10);

/// What a machine was made of.
pub(super) struct Baseline {
    state: Container,
    /// Where its disks may lie.
    confinement: Option<Confinement>,
    /// How its clocks go on from there.
    clock: ClockPlan,
    ready: Option<Ready>,
}

/// What is made of it before the first reset.
struct Ready {
    vcpus: Arc<[VcpuState]>,
    vm: VmState,
    memory: Original,
}

impl Baseline {
    /// Of a machine that is made of `state`; `None` if `memory` has nothing that it could go back to.
    pub(super) fn new(
        state: Container,
        memory: &MachineMemory,
        confinement: Option<&Confinement>,
        clock: ClockPlan,
    ) -> Option<Self> {
        memory.has_image().then(|| Self {
            state,
            confinement: confinement.cloned(),
            clock,
            ready: None,
        })
    }

    fn make_ready(&mut self, memory: &MachineMemory) -> Result<(), Error> {
        if self.ready.is_some() {
            return Ok(());
        }
        let vcpus = 0..self.state.header.vcpus;
        let vcpus = vcpus.map(|id| self.state.get(VcpuState::KIND, id)?.decode());
        self.ready = Some(Ready {
            vcpus: vcpus.collect::<Result<_, _>>()?,
            vm: self.state.get(VmState::KIND, 0)?.decode()?,
            memory: memory.original()?,
        });
        Ok(())
    }
}

/// How a machine goes on that is reset.
#[derive(Clone, Copy, Debug)]
struct Onward {
    /// What its clocks have done since it was saved.
    clock: GuestClock,
    /// The run that it is in.
    run: Option<NonZeroU32>,
}

impl Machine {
    /// Has it be what it was when it was made. If it ran it goes on from there, with `clock` for what its clocks have done since it
    /// was saved; else it stays held. When this fails, it is as it was, or lost.
    pub(crate) fn reset(
        &mut self,
        clock: GuestClock,
        ending: &AtomicBool,
    ) -> Result<ResetReport, Error> {
        let onward = Onward { clock, run: None };
        self.reset_and(self.is_running().then_some(onward), ending)
    }

    /// As [`Machine::reset`], but that it goes on, whether it ran or not, in the run of this number.
    pub(crate) fn reset_to_run(
        &mut self,
        number: NonZeroU32,
        clock: GuestClock,
        ending: &AtomicBool,
    ) -> Result<ResetReport, Error> {
        let run = Some(number);
        self.reset_and(Some(Onward { clock, run }), ending)
    }

    /// As [`Machine::reset`], but that it is held, whether it ran or not.
    pub(crate) fn reset_to_hold(&mut self, ending: &AtomicBool) -> Result<ResetReport, Error> {
        self.reset_and(None, ending)
    }

    fn reset_and(
        &mut self,
        onward: Option<Onward>,
        ending: &AtomicBool,
    ) -> Result<ResetReport, Error> {
        let begun = Instant::now();
        disks::undoable(&self.disks)?;
        let baseline = self.baseline.as_mut().ok_or(Error::NothingToGoBackTo)?;
        baseline.make_ready(&self.memory)?;
        // A guest that has switched itself off waits for its end, which is behind this in the queue.
        if ending.load(Ordering::SeqCst) {
            return Err(Error::GuestEnds);
        }
        // In runs, threads that wait awake would take the CPUs that the others wake up on.
        let awake = onward.is_some_and(|how| how.run.is_none());
        let gone_back = self.go_back(awake).and_then(|memory| {
            match onward {
                // One that has ended meanwhile goes nowhere.
                Some(_) if ending.load(Ordering::SeqCst) => return Ok(None),
                Some(onward) => self.go_onward(onward)?,
                None => {}
            }
            Ok(Some(memory))
        });
        let memory = gone_back.map_err(|error| {
            self.lost = true;
            Error::ResetFailed(Box::new(error))
        })?;
        let memory = memory.ok_or(Error::GuestEnds)?;
        let took = begun.elapsed().as_micros() as u64;
        let counts = &self.counters.machine;
        counts.resets.add(1);
        counts.last_reset_us.set(took);
        Ok(ResetReport {
            dirty_pages: memory.dirty_pages,
            total_us: took,
        })
    }

    fn go_onward(&mut self, Onward { clock, run }: Onward) -> Result<(), Error> {
        let Some(number) = run else {
            return self.run_after(LEAD, clock, Vcpus::run);
        };
        self.counters.devices.run.begin(number);
        self.run_after(LEAD, clock, |vcpus, start| {
            vcpus.go(start);
            Ok(())
        })
    }

    /// Stops it, if it runs, and undoes what it has done. If `awake`, it is told to run at once, and its threads wait for that without sleeping.
    fn go_back(&mut self, awake: bool) -> Result<BroughtBack, Error> {
        // Before the vCPUs, unlike in a hold: what they still ask of a device is undone with the rest.
        if self.quiesced.is_none() {
            self.quiesced = self.event_loop.halt();
        }
        let Self {
            vm,
            disks,
            vcpus,
            event_loop,
            counters,
            quiesced,
            baseline,
            ..
        } = self;
        let Some(Baseline {
            state,
            confinement,
            clock,
            ready: Some(ready),
        }) = baseline
        else {
            return Err(Error::NothingToGoBackTo);
        };
        vcpus.stop(awake)?;
        if quiesced.is_none() {
            *quiesced = Some(event_loop.quiesce(BOUNDS.devices)?);
        }
        // As it is programmed now, the timer would go on to interrupt, also vCPUs that have been reset.
        vm.restore(&ready.vm)?;
        vcpus.reset(&ready.vcpus)?;
        // What is written to its memory is its own affair from here on, and its next snapshot builds on none.
        self.live = None;
        self.stored_as = None;
        disks::undo(disks, confinement.as_ref())?;
        // Once more, after the vCPUs, as when it was made: a controller delivers to the local APICs as it is set.
        vm.restore(&ready.vm)?;
        counters.devices.reset(state)?;
        // Last: until here, KVM has written to where the guest had told it to, like how long a vCPU was kept from running.
        let memory = ready.memory.bring_back().map_err(Error::BringBack)?;
        self.clock = *clock;
        self.cut = Cut::Saved {
            unix_ns: state.header.created_unix_ns,
        };
        self.held_since = Instant::now();
        self.restored = true;
        Ok(memory)
    }
}
