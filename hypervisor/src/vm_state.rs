//! The saved state of what KVM keeps once a machine.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use saved_state::{Kind, SavedState};
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

use crate::{
    Error, MachineClock, Vm,
    abi::{from_bytes, to_bytes},
    error::Asked,
};

/// The in-kernel interrupt controllers, the interval timer and the clock. What is a structure of
/// KVM's is held as its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Versionize)]
pub struct VmState {
    /// `struct kvm_irqchip` of the first 8259A.
    pub pic_master: Vec<u8>,
    /// `struct kvm_irqchip` of the second 8259A.
    pub pic_slave: Vec<u8>,
    /// `struct kvm_irqchip` of the I/O APIC.
    pub ioapic: Vec<u8>,
    /// `struct kvm_pit_state2`.
    pub pit: Vec<u8>,
    /// kvmclock.
    pub clock: MachineClock,
}

impl SavedState for VmState {
    const KIND: Kind = Kind(*b"KVM ");
}

impl Vm {
    /// Reads its state. No vCPU may be running, and no device either.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn save(&self) -> Result<VmState, Error> {
        // Exhaustive, so that a new field is either saved or said not to be.
        let Self {
            fd: _,
            cpuid: _,
            msr_indices: _,
            xsave_bytes: _,
            stopped_clock: _,
        } = self;
        Ok(VmState {
            pic_master: self.save_chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: self.save_chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: self.save_chip(KVM_IRQCHIP_IOAPIC)?,
            pit: self.save_pit()?,
            clock: self.save_clock()?,
        })
    }

    /// Makes it what it was when `state` was saved, but for the clock, which waits to be started.
    ///
    /// # Errors
    ///
    /// When the state is not one of this architecture, or KVM refuses it.
    pub fn restore(&mut self, state: &VmState) -> Result<(), Error> {
        let VmState {
            pic_master,
            pic_slave,
            ioapic,
            pit,
            clock,
        } = state;
        self.restore_chip(KVM_IRQCHIP_PIC_MASTER, pic_master)?;
        self.restore_chip(KVM_IRQCHIP_PIC_SLAVE, pic_slave)?;
        self.restore_chip(KVM_IRQCHIP_IOAPIC, ioapic)?;
        let pit: kvm_pit_state2 = from_bytes("interval timer", pit)?;
        self.fd.set_pit2(&pit).asked("set the interval timer")?;
        self.stopped_clock = Some(*clock);
        Ok(())
    }

    fn save_pit(&self) -> Result<Vec<u8>, Error> {
        let mut pit = self.fd.get_pit2().asked("read the interval timer")?;
        // The host's time at which a count began means nothing elsewhere; KVM begins each count
        // anew when it is set.
        for channel in &mut pit.channels {
            channel.count_load_time = 0;
        }
        Ok(to_bytes(&pit))
    }

    fn save_chip(&self, chip_id: u32) -> Result<Vec<u8>, Error> {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        self.fd
            .get_irqchip(&mut chip)
            .asked("read an interrupt controller")?;
        Ok(to_bytes(&chip))
    }

    fn restore_chip(&self, chip_id: u32, saved: &[u8]) -> Result<(), Error> {
        let mut chip: kvm_irqchip = from_bytes("interrupt controller", saved)?;
        chip.chip_id = chip_id;
        self.fd
            .set_irqchip(&chip)
            .asked("set an interrupt controller")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi;

    #[test]
    fn every_version_is_encoded_as_in_its_golden_file() {
        let chip = |first| abi::pattern::<kvm_irqchip>(first);
        let state = VmState {
            pic_master: chip(1),
            pic_slave: chip(2),
            ioapic: chip(3),
            pit: abi::pattern::<kvm_pit_state2>(4),
            clock: MachineClock {
                kvmclock_ns: 0x0102_0304_0506_0708,
            },
        };
        golden::check_sections(&[&[state]]);
    }
}
