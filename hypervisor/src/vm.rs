//! The virtual machine: memory slots, in-kernel interrupt controllers, event file descriptors.

use std::sync::Arc;

use kvm_bindings::{
    KVM_PIT_SPEAKER_DUMMY, KVMIO, kvm_pit_config, kvm_reinject_control, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use memory::MachineMemory;
use vmm_sys_util::{eventfd::EventFd, ioctl::ioctl_with_ref, ioctl_io_nr};

use crate::{Error, GuestCpuid, MachineClock, Vcpu, clock::ClockOf, error::Asked, msrs};

ioctl_io_nr!(KVM_REINJECT_CONTROL, KVMIO, 0x71);

/// The most vCPUs a machine can have.
pub const MAX_VCPUS: u32 = 32;

/// Three pages that Intel hosts need for real mode and, behind them, one for its page table; in
/// the hole below 4 GiB where no device and no memory is.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Where a guest's write signals an event file descriptor instead of leaving the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoEvent {
    /// Guest-physical address of the register.
    pub gpa: u64,
    /// The 32-bit value that has to be written.
    pub value: u32,
}

/// A virtual machine.
#[derive(Debug)]
pub struct Vm {
    pub(crate) fd: VmFd,
    pub(crate) cpuid: GuestCpuid,
    pub(crate) msr_indices: Arc<[u32]>,
    pub(crate) xsave_bytes: usize,
    /// kvmclock as it was when it was stopped, until it goes on.
    pub(crate) stopped_clock: Option<MachineClock>,
}

impl Vm {
    /// A machine with `memory` and room for `vcpus` vCPUs.
    ///
    /// Memory slots are set before the interrupt controllers and the timer exist: each slot set
    /// later costs milliseconds, because KVM waits for all readers of its slot and bus tables.
    ///
    /// # Errors
    ///
    /// [`Error::Open`] and [`Error::Missing`] when the host will not do, [`Error::VcpuCount`], or
    /// when KVM refuses.
    pub fn new(memory: &MachineMemory, vcpus: u32) -> Result<Self, Error> {
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(Error::VcpuCount(vcpus));
        }
        let kvm =
            Kvm::new().map_err(|e| Error::Open(std::io::Error::from_raw_os_error(e.errno())))?;
        check_capabilities(&kvm)?;
        let fd = kvm.create_vm().asked("create a machine")?;
        map_memory(&fd, memory)?;
        fd.set_tss_address(TSS_ADDRESS)
            .asked("place the task state")?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .asked("place the identity map")?;
        fd.create_irq_chip()
            .asked("create the interrupt controllers")?;
        let timer = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(timer).asked("create the interval timer")?;
        Ok(Self {
            cpuid: GuestCpuid::new(&kvm, vcpus)?,
            msr_indices: msrs::saved_indices(&kvm)?.into(),
            xsave_bytes: usize::try_from(fd.check_extension_int(Cap::Xsave2)).unwrap_or(0),
            fd,
            stopped_clock: None,
        })
    }

    /// The CPUID that the machine's vCPUs have when they boot on this host.
    pub fn cpuid(&self) -> &GuestCpuid {
        &self.cpuid
    }

    /// Has ticks of the interval timer be lost that a guest has no time for: after a hold they would come in a burst. It is for
    /// before the first hold, and need not be before the guest runs: KVM waits here, some 13 ms, for all readers of its lists.
    /// (Documentation/virt/kvm/api.rst, `KVM_REINJECT_CONTROL`, which kvm-ioctls does not have.)
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    #[allow(unsafe_code)]
    pub fn drop_missed_ticks(&self) -> Result<(), Error> {
        let control = kvm_reinject_control {
            pit_reinject: 0,
            ..Default::default()
        };
        // SAFETY: the kernel reads the structure, which outlives the call.
        match unsafe { ioctl_with_ref(&self.fd, KVM_REINJECT_CONTROL(), &control) } {
            0 => Ok(()),
            _ => Err(Error::Kvm {
                what: "drop missed ticks",
                source: std::io::Error::last_os_error(),
            }),
        }
    }

    /// Creates vCPU `id`.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn create_vcpu(&self, id: u32) -> Result<Vcpu, Error> {
        let fd = self.fd.create_vcpu(u64::from(id)).asked("create a vCPU")?;
        let host_tsc_khz = fd.get_tsc_khz().asked("tell the TSC's rate")?;
        Ok(Vcpu {
            id,
            fd,
            cpuid: Vec::new(),
            xsave_bytes: self.xsave_bytes,
            msr_indices: Arc::clone(&self.msr_indices),
            host_tsc_khz,
            clock: ClockOf::default(),
            started: None,
            at_entry: false,
        })
    }

    /// An event file descriptor that raises an edge on interrupt line `gsi` when it is signalled.
    ///
    /// # Errors
    ///
    /// When the host has no file descriptor left, or KVM refuses.
    pub fn irqfd(&self, gsi: u32) -> Result<EventFd, Error> {
        let event =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| Error::Kvm {
                what: "raise interrupts by events",
                source,
            })?;
        self.fd
            .register_irqfd(&event, gsi)
            .asked("raise interrupts by events")?;
        Ok(event)
    }

    /// Has the guest's writes of `io.value` to `io.gpa` signal `event`.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn ioeventfd(&self, event: &EventFd, io: IoEvent) -> Result<(), Error> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(io.gpa), io.value)
            .asked("signal events on writes")
    }
}

fn check_capabilities(kvm: &Kvm) -> Result<(), Error> {
    if kvm.get_api_version() != 12 {
        return Err(Error::Missing("the API of version 12"));
    }
    let needed = [
        (Cap::UserMemory, "user memory slots"),
        (Cap::Irqchip, "in-kernel interrupt controllers"),
        (Cap::Pit2, "the in-kernel interval timer"),
        (Cap::Irqfd, "interrupts by event file descriptor"),
        (Cap::Ioeventfd, "event file descriptors for writes"),
        (Cap::ImmediateExit, "immediate_exit"),
        (Cap::SyncRegs, "registers that KVM_RUN sets"),
        (Cap::AdjustClock, "an adjustable kvmclock"),
        (Cap::Xsave2, "KVM_GET_XSAVE2"),
    ];
    match needed.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        None => Ok(()),
        Some((_, name)) => Err(Error::Missing(name)),
    }
}

#[allow(unsafe_code)]
fn map_memory(fd: &VmFd, memory: &MachineMemory) -> Result<(), Error> {
    for (slot, (region, host)) in (0..).zip(memory.host_addresses()) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.gpa,
            memory_size: region.bytes,
            userspace_addr: host,
            flags: 0,
        };
        // SAFETY: the region is mapped, writable and never unmapped (see `MachineMemory`), and the
        // slots do not overlap, because the layout's regions do not.
        unsafe { fd.set_user_memory_region(region) }.asked("map the guest's memory")?;
    }
    Ok(())
}
