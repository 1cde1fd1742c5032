//! One virtual processor.

use std::{ops::Deref, sync::Arc};

use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::{
    ClockStart, Error, GuestCpuid, HostTsc, MsrEntry, VcpuState, clock::ClockOf, error::Asked,
    kick::Bound, msrs, sregs,
};

/// CR0: protection and paging.
const CR0_PE_PG: u64 = 1 | 1 << 31;
/// CR4: physical address extension.
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
/// Offset of the local APIC's LVT for LINT0 and LINT1, and their delivery modes.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVER_NMI: u32 = 0x400;
const DELIVER_EXTINT: u32 = 0x700;
/// Fast string operations, which Linux expects a boot loader to have left on.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs on, all memory write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Who answers when the guest touches a port or an address that is no memory. A read that nobody
/// answers leaves the bytes as they are: all ones.
pub trait IoHandler {
    /// The guest reads `data.len()` bytes from `port`.
    fn port_in(&self, port: u16, data: &mut [u8]);
    /// The guest writes `data` to `port`.
    fn port_out(&self, port: u16, data: &[u8]);
    /// The guest reads `data.len()` bytes from the guest-physical address `gpa`.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    /// The guest writes `data` to the guest-physical address `gpa`.
    fn mmio_write(&self, gpa: u64, data: &[u8]);
}

/// Why a vCPU came back from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ran {
    /// It accessed a port; that has been answered.
    Port,
    /// It accessed an address that is no memory; that has been answered.
    Mmio,
    /// It was kicked. Everything earlier exits left undone is done: its state can be saved.
    Kicked,
    /// It met a third fault while it delivered a second one, or shut down.
    TripleFault,
}

/// The processor's state at the entry of a 64-bit kernel.
#[derive(Clone, Copy, Debug)]
pub struct BootRegisters {
    /// Address of its first instruction.
    pub entry: u64,
    /// Address of the boot parameters ("zero page").
    pub boot_params: u64,
    /// Address of the page tables' root, which map at least kernel and parameters one to one.
    pub page_table: u64,
    /// Address of the descriptor table.
    pub gdt: u64,
    /// Its descriptors; 2 is code and 3 is data, as Linux's boot protocol has it.
    pub gdt_entries: [u64; 4],
}

/// A virtual processor that no thread runs yet.
#[derive(Debug)]
pub struct Vcpu {
    pub(crate) id: u32,
    pub(crate) fd: VcpuFd,
    /// As it was set. KVM may show more when it is asked back: bits that mirror the guest's control
    /// registers, and, where it lets guests see the host's CPUID (KVM-PVM), the host's.
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    pub(crate) xsave_bytes: usize,
    pub(crate) msr_indices: Arc<[u32]>,
    pub(crate) host_tsc_khz: u32,
    pub(crate) clock: ClockOf,
    /// When its clock last went on, or will, if it was ever stopped.
    pub(crate) started: Option<HostTsc>,
    /// Its registers and pending events are those in the shared page, and KVM's when it is next entered.
    pub(crate) at_entry: bool,
}

/// A virtual processor and the thread that runs it.
#[derive(Debug)]
pub struct BoundVcpu {
    // Before the vCPU, so that kicks stop before its page is unmapped.
    bound: Bound,
    vcpu: Vcpu,
    /// When the kick came that it was brought back by, if it was by one.
    kicked: Option<HostTsc>,
    /// It has executed an instruction and then none, so that it neither halts nor waits to be started.
    runnable: bool,
    /// It is not to be in the guest when it is next run.
    comes_back: bool,
}

impl Vcpu {
    /// Its number, which is also its APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Makes it what the machine's vCPUs are: its CPUID, and local interrupts as a BIOS leaves them.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn initialise(&mut self, cpuid: &GuestCpuid) -> Result<(), Error> {
        self.set_cpuid(cpuid.of_vcpu(self.id))?;
        let mut lapic = self.fd.get_lapic().asked("read the local APIC")?;
        for (offset, mode) in [(LVT_LINT0, DELIVER_EXTINT), (LVT_LINT1, DELIVER_NMI)] {
            for (register, byte) in lapic.regs[offset..].iter_mut().zip(mode.to_le_bytes()) {
                *register = byte as i8;
            }
        }
        self.fd.set_lapic(&lapic).asked("set the local APIC")?;
        msrs::set(
            &self.fd,
            &[
                MsrEntry {
                    index: msrs::IA32_MISC_ENABLE,
                    value: MISC_ENABLE_FAST_STRING,
                },
                MsrEntry {
                    index: msrs::IA32_MTRR_DEF_TYPE,
                    value: MTRR_WRITE_BACK,
                },
            ],
        )
    }

    /// Shows it `cpuid`, as what it is restored from probably does: then that has not to be set, which takes KVM as long as all else of a vCPU.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn expect(&mut self, cpuid: &GuestCpuid) -> Result<(), Error> {
        self.set_cpuid(cpuid.of_vcpu(self.id))
    }

    /// Puts it at the entry of a 64-bit kernel (Documentation/arch/x86/boot.rst, "64-bit Boot
    /// Protocol"). Only the first vCPU boots; the others wait for its start-up interrupt.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn boot(&self, boot: &BootRegisters) -> Result<(), Error> {
        let mut special = sregs::get(&self.fd)?;
        let code = segment(boot.gdt_entries[2], 2);
        let data = segment(boot.gdt_entries[3], 3);
        special.cs = code;
        for register in [
            &mut special.ds,
            &mut special.es,
            &mut special.fs,
            &mut special.gs,
            &mut special.ss,
        ] {
            *register = data;
        }
        special.gdt.base = boot.gdt;
        special.gdt.limit = size_of_val(&boot.gdt_entries) as u16 - 1;
        special.cr0 |= CR0_PE_PG;
        special.cr3 = boot.page_table;
        special.cr4 |= CR4_PAE;
        special.efer |= EFER_LME_LMA;
        sregs::set(&self.fd, &special)?;
        let registers = kvm_regs {
            rip: boot.entry,
            rsi: boot.boot_params,
            // Bit 1 always is; interrupts are off.
            rflags: 1 << 1,
            ..Default::default()
        };
        self.fd.set_regs(&registers).asked("set the registers")?;
        // The x87 control word and MXCSR after reset, with all exceptions masked.
        let fpu = kvm_fpu {
            fcw: 0x37f,
            mxcsr: 0x1f80,
            ..Default::default()
        };
        self.fd.set_fpu(&fpu).asked("set the floating point unit")
    }

    pub(crate) fn set_cpuid(&mut self, entries: Vec<kvm_cpuid_entry2>) -> Result<(), Error> {
        let cpuid = CpuId::from_entries(&entries)
            .map_err(|_| Error::Missing("room for that much CPUID"))?;
        self.fd.set_cpuid2(&cpuid).asked("set the CPUID")?;
        self.cpuid = entries;
        Ok(())
    }

    /// Hands it to the calling thread, which alone can run it.
    pub fn bind(mut self) -> BoundVcpu {
        BoundVcpu {
            bound: Bound::new(self.fd.get_kvm_run()),
            vcpu: self,
            kicked: None,
            runnable: false,
            comes_back: false,
        }
    }
}

impl BoundVcpu {
    /// Runs the guest until it needs an answer, or is kicked.
    ///
    /// # Errors
    ///
    /// [`Error::Run`] when the vCPU cannot go on.
    pub fn run(&mut self, io: &impl IoHandler) -> Result<Ran, Error> {
        self.kicked = None;
        self.runnable &= std::mem::take(&mut self.comes_back);
        self.vcpu.at_entry = false;
        let ran = self.enter(io)?;
        self.runnable |= matches!(ran, Ran::Port | Ran::Mmio);
        Ok(ran)
    }

    fn enter(&mut self, io: &impl IoHandler) -> Result<Ran, Error> {
        match self.vcpu.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                data.fill(0xff);
                port_in(io, port, data, self.bound.port_access_bytes());
                Ok(Ran::Port)
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                port_out(io, port, data, self.bound.port_access_bytes());
                Ok(Ran::Port)
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                data.fill(0xff);
                io.mmio_read(gpa, data);
                Ok(Ran::Mmio)
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                io.mmio_write(gpa, data);
                Ok(Ran::Mmio)
            }
            Ok(VcpuExit::Shutdown) => Ok(Ran::TripleFault),
            Ok(other) => {
                let reason = format!("{other:?}");
                Err(self.cannot_run(reason))
            }
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                self.kicked = Some(self.bound.rearm());
                Ok(Ran::Kicked)
            }
            Err(e) => Err(self.cannot_run(e.to_string())),
        }
    }

    /// Has the next [`BoundVcpu::run`] finish what the last exit began, and come back without having been in the guest, as if the vCPU had
    /// been kicked. Unlike a kick it takes no signal, and may miss one: both are then one.
    pub fn come_back(&mut self) {
        self.comes_back = true;
        self.bound.disarm();
    }

    /// Tells the guest's watchdogs that it was held (`KVM_KVMCLOCK_CTRL`), before it runs again. A
    /// guest without kvmclock has no way to be told, which is no error. One that goes on from when it was saved, and for which no time has
    /// passed by `start`, has nothing to be told.
    pub fn excuse_hold(&self, start: &ClockStart) {
        if matches!(self.vcpu.clock, ClockOf::Restored(_)) && start.stood_still() {
            return;
        }
        if let Err(e) = self.vcpu.fd.kvmclock_ctrl() {
            tracing::debug!(
                vcpu = self.vcpu.id,
                "the guest has no kvmclock to mark: {e}"
            );
        }
    }

    /// Stops its clock, if it runs, as of the kick that it was brought back by, if it was; says when that was.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn stop_clock(&mut self) -> Result<HostTsc, Error> {
        self.vcpu
            .stop_clock(self.kicked.unwrap_or_else(HostTsc::now))
    }

    /// Has a clock that was stopped go on from [`ClockStart::wait`] on; does nothing to one that runs.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn start_clock(&mut self, start: ClockStart) -> Result<(), Error> {
        self.vcpu.start_clock(start)
    }

    /// As [`Vcpu::save`]. KVM may take in an INIT for that, with which it waits to be started.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn save(&mut self, stopped: HostTsc) -> Result<VcpuState, Error> {
        self.runnable = false;
        self.vcpu.save(stopped)
    }

    /// Makes a vCPU that was restored from `state` what it was then, whatever it has done since, but for its clock, which waits to be
    /// started as it did then. It must not be in the guest; its clock need not have been stopped.
    ///
    /// # Errors
    ///
    /// When KVM refuses; the vCPU is in no known state then.
    pub fn reset(&mut self, state: &VcpuState) -> Result<(), Error> {
        self.vcpu.reset(state, self.runnable)
    }

    fn cannot_run(&self, reason: String) -> Error {
        Error::Run {
            id: self.vcpu.id,
            reason,
        }
    }
}

impl Deref for BoundVcpu {
    type Target = Vcpu;

    fn deref(&self) -> &Vcpu {
        &self.vcpu
    }
}

/// Has `io` answer reads of `port` into `data`, each of `size` bytes: one after the other, as the guest makes them. Ports beside it are not read.
fn port_in(io: &impl IoHandler, port: u16, data: &mut [u8], size: usize) {
    for access in data.chunks_mut(size.max(1)) {
        io.port_in(port, access);
    }
}

/// As [`port_in`], for writes.
fn port_out(io: &impl IoHandler, port: u16, data: &[u8], size: usize) {
    for access in data.chunks(size.max(1)) {
        io.port_out(port, access);
    }
}

/// The segment register that descriptor `index` with the bits `descriptor` loads (Intel SDM volume
/// 3, "Segment Descriptors").
fn segment(descriptor: u64, index: u16) -> kvm_segment {
    let bits = |at: u32, count: u32| ((descriptor >> at) & ((1 << count) - 1)) as u8;
    let pages = bits(55, 1);
    let limit = ((descriptor & 0xffff) | (descriptor >> 32 & 0xf_0000)) as u32;
    kvm_segment {
        base: (descriptor >> 16 & 0xff_ffff) | (descriptor >> 32 & 0xff00_0000),
        limit: if pages == 1 {
            limit << 12 | 0xfff
        } else {
            limit
        },
        selector: index * 8,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: pages,
        unusable: 0,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Answers with how many accesses there were, and keeps what they were.
    #[derive(Default)]
    struct Accesses(RefCell<Vec<(u16, Vec<u8>)>>);

    impl IoHandler for Accesses {
        fn port_in(&self, port: u16, data: &mut [u8]) {
            let mut accesses = self.0.borrow_mut();
            data.fill(accesses.len() as u8);
            accesses.push((port, data.to_vec()));
        }
        fn port_out(&self, port: u16, data: &[u8]) {
            self.0.borrow_mut().push((port, data.to_vec()));
        }
        fn mmio_read(&self, _gpa: u64, _data: &mut [u8]) {}
        fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
    }

    #[test]
    fn string_instructions_make_one_access_after_the_other() {
        let mut data = [0xff; 6];
        for (size, read) in [
            (1, [0, 1, 2, 3, 4, 5]),
            (2, [0, 0, 1, 1, 2, 2]),
            (6, [0; 6]),
        ] {
            let io = Accesses::default();
            port_in(&io, 0x60, &mut data, size);
            assert_eq!(data, read);
            port_out(&io, 0x61, &data, size);
            let expected = [0x60, 0x61].map(|port| {
                let accesses = read.chunks(size);
                accesses.map(move |access| (port, access.to_vec()))
            });
            let expected: Vec<_> = expected.into_iter().flatten().collect();
            assert_eq!(*io.0.borrow(), expected);
        }
    }
}
