//! The saved state of a vCPU.

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, Xsave, kvm_cpuid_entry2,
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sync_regs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::SyncReg;
use saved_state::{Kind, SavedState};
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

use crate::{
    Error, HostTsc, MsrEntry, Vcpu, VcpuClock,
    abi::{from_bytes, to_bytes},
    clock::ClockOf,
    cpuid,
    error::Asked,
    msrs, sregs,
};

/// Everything KVM keeps of one vCPU. What is a structure of KVM's is held as its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Versionize)]
pub struct VcpuState {
    /// The vCPU's number.
    pub id: u32,
    /// `struct kvm_cpuid_entry2`, one after the other.
    pub cpuid: Vec<u8>,
    /// `struct kvm_mp_state`.
    pub mp_state: Vec<u8>,
    /// `struct kvm_regs`.
    pub regs: Vec<u8>,
    /// `struct kvm_sregs2`.
    pub sregs: Vec<u8>,
    /// `struct kvm_xsave`, with as much behind it as the host's CPU has (`KVM_CAP_XSAVE2`).
    pub xsave: Vec<u8>,
    /// `struct kvm_xcrs`.
    pub xcrs: Vec<u8>,
    /// `struct kvm_debugregs`.
    pub debug_regs: Vec<u8>,
    /// `struct kvm_lapic_state`.
    pub lapic: Vec<u8>,
    /// Every model-specific register that the host lists, memory types and machine check banks, which
    /// it does not list; the clock's apart, and those of features that the guest is not shown.
    pub msrs: Vec<MsrEntry>,
    /// `struct kvm_vcpu_events`.
    pub events: Vec<u8>,
    /// The time stamp counter.
    pub clock: VcpuClock,
}

impl VcpuState {
    /// Whether its local APIC's timer counts down from when a vCPU is restored from this, not from when that runs: one that is no deadline
    /// of the time stamp counter. What is no local APIC's state has none.
    pub fn timer_counts_down(&self) -> bool {
        from_bytes("local APIC", &self.lapic).is_ok_and(|lapic| counts_down(&lapic))
    }
}

impl SavedState for VcpuState {
    const KIND: Kind = Kind(*b"VCPU");
}

impl VcpuState {
    pub(crate) fn cpuid_entries(&self) -> Result<Vec<kvm_cpuid_entry2>, Error> {
        let (entries, rest) = self.cpuid.as_chunks::<{ size_of::<kvm_cpuid_entry2>() }>();
        if !rest.is_empty() || entries.len() > KVM_MAX_CPUID_ENTRIES {
            return Err(Error::SavedSize {
                what: "CPUID",
                found: self.cpuid.len(),
                expected: entries.len() * size_of::<kvm_cpuid_entry2>(),
            });
        }
        entries
            .iter()
            .map(|entry| from_bytes("CPUID", entry))
            .collect()
    }
}

/// When the last of a state becomes KVM's.
#[derive(Clone, Copy, Debug)]
enum How {
    /// At once.
    Now,
    /// Registers and pending events when the guest is next entered: KVM takes them over before all else (`KVM_CAP_SYNC_REGS` in
    /// Documentation/virt/kvm/api.rst), in the same order.
    AtEntry {
        /// The run state is what it is to be.
        runnable: bool,
    },
}

impl Vcpu {
    /// Reads its state. It must not be running; a state that was restored and has not run yet is
    /// read back as it was. A clock that was stopped is read as it was at `stopped`, when the machine's last one was.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn save(&self, stopped: HostTsc) -> Result<VcpuState, Error> {
        // Exhaustive, so that a new field is either saved or said not to be.
        let Self {
            id,
            fd,
            cpuid,
            xsave_bytes: _,
            msr_indices,
            host_tsc_khz: _,
            clock: _,
            started: _,
            at_entry,
        } = self;
        if *at_entry {
            // They are set once more then, to the same.
            self.set_now()?;
        }
        let intel = cpuid::vendor(cpuid) == "GenuineIntel";
        // First, because KVM takes in pending INIT and start-up interrupts when it is asked this.
        let mp_state = fd.get_mp_state().asked("read the run state")?;
        // Then these, because asking for them can deliver a pending exception's address to CR2 or DR6.
        let events = fd.get_vcpu_events().asked("read the pending events")?;
        Ok(VcpuState {
            id: *id,
            cpuid: cpuid.iter().flat_map(to_bytes).collect(),
            mp_state: to_bytes(&mp_state),
            regs: to_bytes(&fd.get_regs().asked("read the registers")?),
            sregs: to_bytes(&sregs::get(fd)?),
            xsave: self.get_xsave()?,
            xcrs: to_bytes(&fd.get_xcrs().asked("read the extended control registers")?),
            debug_regs: to_bytes(&fd.get_debug_regs().asked("read the debug registers")?),
            lapic: to_bytes(&fd.get_lapic().asked("read the local APIC")?),
            msrs: msrs::get(fd, &msrs::of_guest(msr_indices, cpuid))?
                .into_iter()
                .map(|entry| msrs::settable(entry, intel))
                .collect(),
            events: to_bytes(&events),
            clock: self.save_clock(stopped)?,
        })
    }

    /// Makes it what it was when `state` was saved, but for the clock, which waits to be started.
    ///
    /// # Errors
    ///
    /// When the state is not one of this architecture, or KVM refuses it.
    pub fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        if state.id != self.id() {
            return Err(Error::OtherVcpu {
                found: state.id,
                expected: self.id(),
            });
        }
        // What the vCPU has decides what can be set, so CPUID is first.
        let cpuid = state.cpuid_entries()?;
        if cpuid != self.cpuid {
            self.set_cpuid(cpuid)?;
        }
        self.restore_tsc_rate(&state.clock)?;
        self.set_state(state, &state.msrs, How::Now)
    }

    /// Makes a vCPU that was restored from `state` what it was then, whatever it has done since; its clock waits to be started, as it
    /// did then. CPUID and the rate of its counter are as they were: no guest changes them. Each of the requests counts here: under
    /// another hypervisor, each may take as long as a page takes to be faulted in. So what KVM takes over as it enters the guest is left
    /// to that, and the run state is left alone if it is `runnable` for certain and is to be.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub(crate) fn reset(&mut self, state: &VcpuState, runnable: bool) -> Result<(), Error> {
        let mp_state: kvm_mp_state = from_bytes("run state", &state.mp_state)?;
        let started = matches!(
            mp_state.mp_state,
            KVM_MP_STATE_RUNNABLE | KVM_MP_STATE_HALTED
        );
        if !started {
            // KVM takes in start-up interrupts when it is asked this. Else one could come to a vCPU that waits for another.
            self.fd.get_mp_state().asked("read the run state")?;
        }
        // Of pages that the host has brought since, that guest has never heard: KVM forgets them. And the timer must not be armed
        // when the local APIC is set, which would arm it anew.
        let off = [msrs::KVM_ASYNC_PF, msrs::IA32_TSC_DEADLINE];
        let off = off.map(|index| MsrEntry { index, value: 0 });
        let msrs = [&off[..], &state.msrs].concat();
        // One that waits to be started is not entered, and KVM takes nothing over.
        let how = match started {
            true => How::AtEntry {
                runnable: runnable && mp_state.mp_state == KVM_MP_STATE_RUNNABLE,
            },
            false => How::Now,
        };
        self.set_state(state, &msrs, how)
    }

    /// Sets all of `state` that a guest can change, and `all_msrs`, which its registers are among.
    fn set_state(
        &mut self,
        state: &VcpuState,
        all_msrs: &[MsrEntry],
        how: How,
    ) -> Result<(), Error> {
        let VcpuState {
            id: _,
            cpuid: _,
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debug_regs,
            lapic,
            msrs: _,
            events,
            clock,
        } = state;
        let now = matches!(how, How::Now);
        let fd = &self.fd;
        // The local APIC's place and mode are among the special registers.
        sregs::set(fd, &from_bytes("special registers", sregs)?)?;
        let regs: kvm_regs = from_bytes("registers", regs)?;
        if now {
            fd.set_regs(&regs).asked("set the registers")?;
        }
        let xcrs: kvm_xcrs = from_bytes("extended control registers", xcrs)?;
        fd.set_xcrs(&xcrs)
            .asked("set the extended control registers")?;
        self.set_xsave(xsave)?;
        let debug_regs: kvm_debugregs = from_bytes("debug registers", debug_regs)?;
        fd.set_debug_regs(&debug_regs)
            .asked("set the debug registers")?;
        // What was saved by who saved more than the guest has.
        let had = |entry: &MsrEntry| msrs::has(&self.cpuid, entry.index);
        let msrs: Vec<_> = all_msrs.iter().copied().filter(had).collect();
        msrs::set(fd, &msrs)?;
        let lapic: kvm_lapic_state = from_bytes("local APIC", lapic)?;
        fd.set_lapic(&lapic).asked("set the local APIC")?;
        if counts_down(&lapic) {
            // KVM drops the count where the timer's mode changes to or from that of deadlines. By now it has not changed.
            fd.set_lapic(&lapic).asked("set the local APIC")?;
        }
        if !matches!(how, How::AtEntry { runnable: true }) {
            let mp_state: kvm_mp_state = from_bytes("run state", mp_state)?;
            fd.set_mp_state(mp_state).asked("set the run state")?;
        }
        let events: kvm_vcpu_events = from_bytes("pending events", events)?;
        if now {
            fd.set_vcpu_events(&events)
                .asked("set the pending events")?;
        } else {
            let shared = self.fd.sync_regs_mut();
            (shared.regs, shared.events) = (regs, events);
        }
        for part in [SyncReg::Register, SyncReg::VcpuEvents] {
            match now {
                true => self.fd.clear_sync_dirty_reg(part),
                false => self.fd.set_sync_dirty_reg(part),
            }
        }
        self.at_entry = !now;
        self.clock = ClockOf::Restored(*clock);
        Ok(())
    }

    /// Sets what KVM would take over when the guest is entered.
    fn set_now(&self) -> Result<(), Error> {
        let kvm_sync_regs { regs, events, .. } = self.fd.sync_regs();
        self.fd.set_regs(&regs).asked("set the registers")?;
        self.fd
            .set_vcpu_events(&events)
            .asked("set the pending events")
    }

    /// The extended state, as large as this host's CPU has it.
    #[allow(unsafe_code)]
    fn get_xsave(&self) -> Result<Vec<u8>, Error> {
        let mut area = self.xsave_area()?;
        // SAFETY: the area has the size that KVM reports for this host (`KVM_CAP_XSAVE2`).
        unsafe { self.fd.get_xsave2(&mut area) }.asked("read the extended state")?;
        let fixed = to_bytes(&area.as_fam_struct_ref().xsave.region);
        let more = area.as_slice().iter().flat_map(|word| word.to_ne_bytes());
        Ok(fixed.into_iter().chain(more).collect())
    }

    /// Sets the extended state. What was saved on a smaller CPU is followed by zeros; what a larger
    /// one saved must be zero where this one has nothing.
    #[allow(unsafe_code)]
    fn set_xsave(&self, saved: &[u8]) -> Result<(), Error> {
        let size_error = || Error::SavedSize {
            what: "extended state",
            found: saved.len(),
            expected: self.xsave_bytes,
        };
        let (words, rest) = saved.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(size_error());
        }
        let mut area = self.xsave_area()?;
        let mut words = words.iter().map(|word| u32::from_ne_bytes(*word));
        // SAFETY: only words are stored; the length stays as it was made.
        let fixed = unsafe { &mut area.as_mut_fam_struct().xsave.region };
        for word in fixed {
            *word = words.next().ok_or_else(size_error)?;
        }
        for word in area.as_mut_slice() {
            *word = words.next().unwrap_or(0);
        }
        if words.any(|word| word != 0) {
            return Err(size_error());
        }
        // SAFETY: the area has the size that KVM reports for this host.
        unsafe { self.fd.set_xsave2(&area) }.asked("set the extended state")
    }

    fn xsave_area(&self) -> Result<Xsave, Error> {
        let words = self
            .xsave_bytes
            .saturating_sub(size_of::<kvm_xsave>())
            .div_ceil(4);
        Xsave::new(words).map_err(|_| Error::Missing("memory for the extended state"))
    }
}

/// Whether the timer of a local APIC is one that counts down (Intel SDM volume 3, "APIC Timer").
fn counts_down(lapic: &kvm_lapic_state) -> bool {
    const LVT_TIMER: usize = 0x320;
    const INITIAL_COUNT: usize = 0x380;
    const MODE: u32 = 0b11 << 17;
    const DEADLINE: u32 = 0b10 << 17;
    let register =
        |at: usize| u32::from_le_bytes(std::array::from_fn(|i| lapic.regs[at + i] as u8));
    register(LVT_TIMER) & MODE != DEADLINE && register(INITIAL_COUNT) != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi;

    #[test]
    fn every_version_is_encoded_as_in_its_golden_file() {
        let msr = |index| MsrEntry {
            index,
            value: u64::from(index) << 32,
        };
        let state = VcpuState {
            id: 31,
            cpuid: abi::pattern::<[kvm_cpuid_entry2; 2]>(1),
            mp_state: abi::pattern::<kvm_mp_state>(2),
            regs: abi::pattern::<kvm_regs>(3),
            sregs: abi::pattern::<sregs::Sregs2>(4),
            // What it has is the host's.
            xsave: (0..100).collect(),
            xcrs: abi::pattern::<kvm_xcrs>(5),
            debug_regs: abi::pattern::<kvm_debugregs>(6),
            lapic: abi::pattern::<kvm_lapic_state>(7),
            msrs: vec![msr(0x174), msr(0xc000_0080)],
            events: abi::pattern::<kvm_vcpu_events>(8),
            clock: VcpuClock {
                tsc_khz: 2_500_000,
                tsc_offset: u64::MAX - 9,
                tsc: 10 << 32,
                deadline: 11 << 32,
            },
        };
        golden::check_sections(&[&[state]]);
    }
}
