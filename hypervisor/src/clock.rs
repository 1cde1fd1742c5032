//! The guest's clocks: the time stamp counter of each vCPU, and kvmclock.
//!
//! Both stand still from save to start. All vCPUs keep the offsets they had to one another: each gets
//! its counter by `KVM_VCPU_TSC_OFFSET` from one and the same
//! delta, because writing the counters one after the other would set them apart.

use kvm_bindings::{kvm_clock_data, kvm_cpuid_entry2};
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

use crate::{Error, MsrEntry, Vcpu, error::Asked, msrs, tsc_offset};

/// How far the host's rate may be off before a guest's counter needs scaling: KVM's own tolerance.
const TOLERANCE_PPM: u64 = 250;

/// A vCPU's time stamp counter, as saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Versionize)]
pub struct VcpuClock {
    /// Its rate in kHz.
    pub tsc_khz: u32,
    /// Its offset from the host's, in its own ticks, modulo 2^64.
    pub tsc_offset: u64,
    /// Its value when it was saved.
    pub tsc: u64,
    /// The counter's value at which the local APIC's timer is due; 0 when it is not armed.
    pub deadline: u64,
}

/// kvmclock, as saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Versionize)]
pub struct MachineClock {
    /// Nanoseconds since the machine was booted, in guest time.
    pub kvmclock_ns: u64,
}

/// What is to be added to every saved offset, in guest ticks modulo 2^64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscDelta(u64);

/// How the counters of a restored machine go on as if no time had passed.
#[derive(Clone, Copy, Debug)]
pub struct ClockPlan {
    /// What to add were the clocks started at `planned_at`.
    delta: u64,
    /// The host's counter at the time of planning.
    planned_at: u64,
    guest_khz: u32,
    host_khz: u32,
}

impl ClockPlan {
    /// Plans for a machine whose first vCPU, already restored, is `first`. `None` when its clock
    /// runs already.
    ///
    /// # Errors
    ///
    /// When KVM refuses to tell the counter.
    pub fn new(first: &Vcpu) -> Result<Option<Self>, Error> {
        let Some(saved) = first.saved_clock else {
            return Ok(None);
        };
        let offset_now = tsc_offset::get(&first.fd)?;
        // In this order: what passes between the two makes the guest's counter go forward, not back.
        let now = msrs::get_one(&first.fd, msrs::IA32_TSC)?;
        let planned_at = host_tsc();
        // The offset that would show the saved value now, less the one that was saved.
        let wanted = offset_now.wrapping_add(saved.tsc).wrapping_sub(now);
        Ok(Some(Self {
            delta: wanted.wrapping_sub(saved.tsc_offset),
            planned_at,
            guest_khz: saved.tsc_khz,
            host_khz: first.host_tsc_khz,
        }))
    }

    /// The delta for clocks that start now.
    pub fn start_now(&self) -> TscDelta {
        let host_ticks = u128::from(host_tsc().wrapping_sub(self.planned_at));
        let ticks = host_ticks * u128::from(self.guest_khz) / u128::from(self.host_khz.max(1));
        TscDelta(self.delta.wrapping_sub(ticks as u64))
    }
}

impl Vcpu {
    pub(crate) fn save_clock(&self) -> Result<VcpuClock, Error> {
        match self.saved_clock {
            Some(clock) => Ok(clock),
            None => Ok(VcpuClock {
                tsc_khz: self.fd.get_tsc_khz().asked("tell the TSC's rate")?,
                tsc_offset: tsc_offset::get(&self.fd)?,
                tsc: msrs::get_one(&self.fd, msrs::IA32_TSC)?,
                deadline: msrs::get_one(&self.fd, msrs::IA32_TSC_DEADLINE)?,
            }),
        }
    }

    /// Gives the vCPU the rate that `clock` was saved with, unless the host's is as good.
    pub(crate) fn restore_tsc_rate(&self, clock: &VcpuClock) -> Result<(), Error> {
        let host = u64::from(self.host_tsc_khz);
        let guest = u64::from(clock.tsc_khz);
        if host.abs_diff(guest) * 1_000_000 <= host * TOLERANCE_PPM {
            return Ok(());
        }
        let Err(refused) = self.fd.set_tsc_khz(clock.tsc_khz) else {
            return Ok(());
        };
        if self.has_invariant_tsc() {
            return Err(Error::TscRate {
                guest: clock.tsc_khz,
                host: self.host_tsc_khz,
            });
        }
        // A guest that was not promised an invariant counter keeps time by kvmclock, which tells
        // it the new rate.
        tracing::warn!(
            vcpu = self.id,
            guest_khz = clock.tsc_khz,
            host_khz = self.host_tsc_khz,
            "the guest's TSC changes its rate, because this host cannot scale it: {refused}"
        );
        Ok(())
    }

    pub(crate) fn start_clock(&mut self, delta: TscDelta) -> Result<(), Error> {
        let Some(clock) = self.saved_clock.take() else {
            return Ok(());
        };
        tsc_offset::set(&self.fd, clock.tsc_offset.wrapping_add(delta.0))?;
        // After the counter that it is compared with. Zero says that no timer was armed.
        if clock.deadline == 0 {
            return Ok(());
        }
        let deadline = MsrEntry {
            index: msrs::IA32_TSC_DEADLINE,
            value: clock.deadline,
        };
        msrs::set(&self.fd, &[deadline])
    }

    fn has_invariant_tsc(&self) -> bool {
        let promised =
            |entry: &kvm_cpuid_entry2| entry.function == 0x8000_0007 && entry.edx & (1 << 8) != 0;
        self.cpuid.iter().any(promised)
    }
}

impl MachineClock {
    pub(crate) fn from_kvm(clock: &kvm_clock_data) -> Self {
        Self {
            kvmclock_ns: clock.clock,
        }
    }

    /// Without `KVM_CLOCK_REALTIME`: the clock goes on from where it stood.
    pub(crate) fn to_kvm(self) -> kvm_clock_data {
        let Self { kvmclock_ns } = self;
        kvm_clock_data {
            clock: kvmclock_ns,
            ..Default::default()
        }
    }
}

/// The host's time stamp counter.
#[allow(unsafe_code)]
fn host_tsc() -> u64 {
    // SAFETY: every x86_64 processor has the instruction, and it only reads.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_start_sets_the_counter_further_back() {
        let plan = ClockPlan {
            delta: 1_000,
            planned_at: host_tsc(),
            guest_khz: 1,
            host_khz: 1,
        };
        let TscDelta(first) = plan.start_now();
        let TscDelta(second) = plan.start_now();
        assert!(1_000u64.wrapping_sub(second) >= 1_000u64.wrapping_sub(first));
    }
}
