//! A machine that was held goes on, and its clocks with it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use control::GuestClock;
use hypervisor::ClockStart;
use memory::PAGE_BYTES;

use super::Machine;
use crate::{
    boot::{GENERATION, VMCLOCK},
    error::Error,
    vcpus::{self, Vcpus},
    vmclock::{self, Disruption},
};

/// What the vCPUs have to get ready in, once the instant is appointed at which guest time goes on: a few wake-ups of a
/// thread. Whoever is late has the guest see that time pass.
pub(super) const CLOCK_LEAD: Duration = Duration::from_micros(200);
/// vCPUs that have waited for longer are woken up before the instant is appointed: their CPUs may have gone to sleep, too. Who stands still for less
/// need not wait for that.
const ASLEEP: Duration = Duration::from_millis(5);
/// The lead for each vCPU of a machine that goes on from when it was saved: its guest has seen no time of this process's yet, and who
/// forks waits for it.
const FIRST_LEAD: Duration = Duration::from_micros(50);

/// When a machine's clocks were stopped, in the world's time.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cut {
    /// It was held in this process.
    Held { unix_ns: u64 },
    /// It was saved, maybe elsewhere, and has not run since.
    Saved { unix_ns: u64 },
}

impl Cut {
    pub(super) fn now() -> Self {
        Self::Held {
            unix_ns: since_unix(0).as_nanos() as u64,
        }
    }

    pub(super) fn unix_ns(self) -> u64 {
        let (Self::Held { unix_ns } | Self::Saved { unix_ns }) = self;
        unix_ns
    }
}

/// What has passed since so many nanoseconds after 1970. Two hosts' clocks may differ, but guest time never goes back.
fn since_unix(unix_ns: u64) -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH + Duration::from_nanos(unix_ns))
        .unwrap_or_default()
}

impl Machine {
    /// Lets it run; one that runs goes on. Its clocks go on from where they stood, or from where they would be by now.
    /// When this fails, the machine is in no known state, unless it is for lack of a page: then it stands still as before.
    pub(crate) fn run(&mut self, clock: GuestClock) -> Result<(), Error> {
        let lead = match self.restored {
            true => CLOCK_LEAD.min(FIRST_LEAD * self.vcpu_count),
            false => CLOCK_LEAD,
        };
        self.run_after(lead, clock, Vcpus::run)
    }

    /// As [`Machine::run`]; `lead` is for the vCPUs to get ready in, and `tell` tells them.
    pub(super) fn run_after(
        &mut self,
        lead: Duration,
        clock: GuestClock,
        tell: impl FnOnce(&mut Vcpus, ClockStart) -> Result<(), vcpus::Error>,
    ) -> Result<(), Error> {
        if self.is_running() {
            return Ok(());
        }
        self.end_stall()?;
        // This thread must not hang in a page of theirs.
        self.need(VMCLOCK..GENERATION + PAGE_BYTES)?;
        if self.restored {
            let devices = &self.counters.devices;
            devices.resume();
            // Not before it runs: one that is only saved again is the same.
            devices.generation.renew(self.memory.guest())?;
            vmclock::tell(self.memory.guest(), Disruption::Copied)?;
        } else if clock == GuestClock::StandStill {
            self.tell_of_hold()?;
        }
        if !self.restored && self.held_since.elapsed() > ASLEEP {
            // To be woken up may take them longer than the lead, which the guest would see.
            let woken = self.vcpus.wake();
            self.lost |= woken.is_err();
            woken?;
        }
        let start = match (clock, self.cut) {
            (GuestClock::StandStill, _) => self.clock.start(lead, Duration::ZERO),
            (GuestClock::Follow, Cut::Held { .. }) => self.clock.never_stopped(lead),
            (GuestClock::Follow, Cut::Saved { unix_ns }) => {
                let passed = since_unix(unix_ns) + lead;
                self.clock.start(lead, passed)
            }
        };
        self.start(start, tell)?;
        self.restored = false;
        self.told = false;
        self.quiesced = None;
        Ok(())
    }

    /// Has the guest see, once, that its clocks have stood still.
    pub(super) fn tell_of_hold(&mut self) -> Result<(), Error> {
        if !self.told {
            vmclock::tell(self.memory.guest(), Disruption::Held)?;
            self.told = true;
        }
        Ok(())
    }

    fn start(
        &mut self,
        start: ClockStart,
        tell: impl FnOnce(&mut Vcpus, ClockStart) -> Result<(), vcpus::Error>,
    ) -> Result<(), Error> {
        // Before any vCPU can enter the guest, which none does before the start.
        let started = self
            .vm
            .start_clock(start)
            .map_err(Error::from)
            .and_then(|()| Ok(tell(&mut self.vcpus, start)?));
        self.lost |= started.is_err();
        started
    }

    pub(super) fn let_run_after_failure(&mut self, start: ClockStart) {
        // Not waited for: the one that did not come back in time need not be quicker to hear of this.
        let go = |vcpus: &mut Vcpus, start| {
            vcpus.go(start);
            Ok(())
        };
        if let Err(error) = self.start(start, go) {
            tracing::error!("the machine cannot go on after a pause that failed: {error}");
        }
    }
}
