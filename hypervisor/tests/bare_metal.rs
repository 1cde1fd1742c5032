//! A few bytes of long-mode code on this host's own KVM: the state of a machine survives a save and
//! a restore into another one.
//!
//! Without `/dev/kvm` there is nothing to test with, and the tests say so and pass; the machines
//! that the project is built on have it.

#![allow(clippy::unwrap_used)] // a test that cannot go on should stop

use std::sync::{
    Mutex,
    atomic::{AtomicU32, Ordering},
};
use std::time::{Duration, Instant};

use hypervisor::{
    BootRegisters, BoundVcpu, ClockPlan, CpuTemplate, CpuidChange, Error, GuestCpuid, HostTsc,
    IoHandler, Kick, MsrChange, MsrEntry, Ran, Register, Vcpu, VcpuState, Vm, VmState,
    install_kick_handler,
};
use memory::{Layout, MIN_MEMORY_BYTES, MachineMemory};
use saved_state::Section;
use vm_memory::{Bytes, GuestAddress};

const CODE: u64 = 0x10_0000;
const GDT: u64 = 0x1000;
const PML4: u64 = 0x2000;
const PDPT: u64 = 0x3000;
const PD: u64 = 0x4000;

/// Counts in EAX and writes the count to port 0x10: `inc eax; out 0x10, eax; jmp`.
const COUNTER: [u8; 6] = [0xff, 0xc0, 0xe7, 0x10, 0xeb, 0xfa];
/// The same without the port: it spins.
const SPINNER: [u8; 4] = [0xff, 0xc0, 0xeb, 0xfc];

/// Reads 8 bytes from port 0x60 at once, then writes 4 of them to port 0x10:
/// `mov edi, 0x180000; mov ecx, 8; mov edx, 0x60; rep insb; mov eax, [rdi - 6]; out 0x10, eax; hlt`.
const STRING_READER: [u8; 23] = [
    0xbf, 0, 0, 0x18, 0, 0xb9, 8, 0, 0, 0, 0xba, 0x60, 0, 0, 0, 0xf3, 0x6c, 0x8b, 0x47, 0xfa, 0xe7,
    0x10, 0xf4,
];

const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

#[derive(Default)]
struct Counted {
    last: AtomicU32,
    seen: Mutex<Vec<u32>>,
}

impl IoHandler for Counted {
    fn port_in(&self, _port: u16, _data: &mut [u8]) {}
    fn port_out(&self, port: u16, data: &[u8]) {
        assert_eq!(port, 0x10);
        let count = u32::from_le_bytes(data.try_into().unwrap());
        self.last.store(count, Ordering::SeqCst);
        self.seen.lock().unwrap().push(count);
    }
    fn mmio_read(&self, _gpa: u64, _data: &mut [u8]) {}
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
}

fn memory_with(code: &[u8]) -> MachineMemory {
    let memory = MachineMemory::zeroed(Layout::new(MIN_MEMORY_BYTES).unwrap()).unwrap();
    let guest = memory.guest();
    guest.write_slice(code, GuestAddress(CODE)).unwrap();
    for (i, entry) in GDT_ENTRIES.iter().enumerate() {
        guest
            .write_obj(*entry, GuestAddress(GDT + 8 * i as u64))
            .unwrap();
    }
    guest.write_obj(PDPT | 3, GuestAddress(PML4)).unwrap();
    guest.write_obj(PD | 3, GuestAddress(PDPT)).unwrap();
    // One page of 2 MiB, present and writable.
    guest.write_obj(0x83u64, GuestAddress(PD)).unwrap();
    memory
}

fn boot_registers() -> BootRegisters {
    BootRegisters {
        entry: CODE,
        boot_params: 0,
        page_table: PML4,
        gdt: GDT,
        gdt_entries: GDT_ENTRIES,
    }
}

/// Whether there is nothing to test with; where `FERMATA_KVM` says `required`, that is a failure.
fn no_kvm() -> bool {
    let Err(error) = std::fs::File::open("/dev/kvm") else {
        return false;
    };
    let required = std::env::var_os("FERMATA_KVM").is_some_and(|value| value == "required");
    assert!(!required, "cannot open /dev/kvm: {error}");
    eprintln!("cannot open /dev/kvm, so nothing was tested: {error}");
    true
}

/// A vCPU that spins, with its machine.
fn spinner() -> (MachineMemory, Vm, Vcpu) {
    let memory = memory_with(&SPINNER);
    let vm = Vm::new(&memory, 1).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.initialise(vm.cpuid()).unwrap();
    vcpu.boot(&boot_registers()).unwrap();
    (memory, vm, vcpu)
}

/// A vCPU that has counted to 1000, with its machine. The last `out` is answered but not finished.
fn counted() -> (MachineMemory, Vm, BoundVcpu, Counted) {
    install_kick_handler().unwrap();
    let memory = memory_with(&COUNTER);
    let vm = Vm::new(&memory, 1).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.initialise(vm.cpuid()).unwrap();
    vcpu.boot(&boot_registers()).unwrap();
    let io = Counted::default();
    let mut vcpu = vcpu.bind();
    while io.last.load(Ordering::SeqCst) < 1000 {
        assert_eq!(vcpu.run(&io).unwrap(), Ran::Port);
    }
    (memory, vm, vcpu, io)
}

/// Encodes and decodes, as a state file would.
fn through_bytes(vm: &VmState, vcpu: &VcpuState) -> (VmState, VcpuState) {
    let vm = Section::encode(0, vm).unwrap().decode().unwrap();
    let vcpu = Section::encode(0, vcpu).unwrap().decode().unwrap();
    (vm, vcpu)
}

#[test]
fn a_saved_vcpu_counts_on_in_another_machine() {
    if no_kvm() {
        return;
    }
    let (memory, vm, mut vcpu, io) = counted();
    // The kick finishes the last `out` without another one.
    Kick::this_thread().kick();
    assert_eq!(vcpu.run(&io).unwrap(), Ran::Kicked);
    let (vm_state, vcpu_state) =
        through_bytes(&vm.save().unwrap(), &vcpu.save(HostTsc::now()).unwrap());
    drop(vcpu);

    let mut other = Vm::new(&memory, 1).unwrap();
    other.restore(&vm_state).unwrap();
    let mut vcpu = other.create_vcpu(0).unwrap();
    vcpu.restore(&vcpu_state).unwrap();
    let again = vcpu.save(HostTsc::now()).unwrap();
    assert_eq!(again.regs, vcpu_state.regs);
    assert_eq!(again.sregs, vcpu_state.sregs);
    assert_eq!(again.xsave, vcpu_state.xsave);
    assert_eq!(again.msrs, vcpu_state.msrs);
    assert_eq!(again.events, vcpu_state.events);
    assert_eq!(again.lapic, vcpu_state.lapic);
    assert_eq!(again, vcpu_state);
    assert_eq!(other.save().unwrap(), vm_state);

    let start = ClockPlan::new(&vcpu)
        .unwrap()
        .start(Duration::ZERO, Duration::ZERO);
    let io = Counted::default();
    let mut vcpu = vcpu.bind();
    vcpu.start_clock(start).unwrap();
    other.start_clock(start).unwrap();
    while io.last.load(Ordering::SeqCst) < 2000 {
        assert_eq!(vcpu.run(&io).unwrap(), Ran::Port);
    }
    let expected: Vec<u32> = (1001..=2000).collect();
    assert_eq!(*io.seen.lock().unwrap(), expected);
}

#[test]
fn a_vcpu_shows_what_was_saved_whatever_was_expected() {
    if no_kvm() {
        return;
    }
    let memory = memory_with(&COUNTER);
    let vm = Vm::new(&memory, 1).unwrap();
    // Of one of two.
    let another = GuestCpuid::of_host(2).unwrap();
    let mut saver = vm.create_vcpu(0).unwrap();
    saver.initialise(&another).unwrap();
    saver.boot(&boot_registers()).unwrap();
    let saved = saver.save(HostTsc::now()).unwrap();
    for expected in [vm.cpuid(), &another] {
        let other = Vm::new(&memory, 1).unwrap();
        let mut vcpu = other.create_vcpu(0).unwrap();
        vcpu.expect(expected).unwrap();
        let differs = vcpu.save(HostTsc::now()).unwrap().cpuid != saved.cpuid;
        assert_eq!(differs, std::ptr::eq(expected, vm.cpuid()));
        vcpu.restore(&saved).unwrap();
        assert_eq!(vcpu.save(HostTsc::now()).unwrap(), saved);
        let start = ClockPlan::new(&vcpu).unwrap();
        let start = start.start(Duration::ZERO, Duration::ZERO);
        let mut vcpu = vcpu.bind();
        vcpu.start_clock(start).unwrap();
        let io = Counted::default();
        assert_eq!(vcpu.run(&io).unwrap(), Ran::Port);
        assert_eq!(*io.seen.lock().unwrap(), [1]);
    }
}

#[test]
fn a_vcpu_that_is_reset_is_what_it_was_whether_it_has_run_since_or_not() {
    if no_kvm() {
        return;
    }
    let (memory, _vm, mut vcpu, io) = counted();
    // Its last access is finished, and it has not been in the guest.
    vcpu.come_back();
    assert_eq!(vcpu.run(&io).unwrap(), Ran::Kicked);
    assert_eq!(io.last.load(Ordering::SeqCst), 1000);
    let saved = vcpu.save(HostTsc::now()).unwrap();
    drop(vcpu);

    let other = Vm::new(&memory, 1).unwrap();
    let mut vcpu = other.create_vcpu(0).unwrap();
    let anothers = VcpuState {
        id: 1,
        ..saved.clone()
    };
    let refused = vcpu.restore(&anothers).unwrap_err();
    assert!(matches!(
        refused,
        Error::OtherVcpu {
            found: 1,
            expected: 0
        }
    ));
    vcpu.restore(&saved).unwrap();
    let start = ClockPlan::new(&vcpu)
        .unwrap()
        .start(Duration::ZERO, Duration::ZERO);
    let mut vcpu = vcpu.bind();
    for round in 0..4 {
        vcpu.start_clock(start).unwrap();
        let io = Counted::default();
        for _ in 0..500 {
            assert_eq!(vcpu.run(&io).unwrap(), Ran::Port);
        }
        let expected: Vec<u32> = (1001..=1500).collect();
        assert_eq!(*io.seen.lock().unwrap(), expected);
        // By its own kick it is known to be runnable, by another it is not.
        match round % 2 {
            0 => vcpu.come_back(),
            _ => Kick::this_thread().kick(),
        }
        assert_eq!(vcpu.run(&io).unwrap(), Ran::Kicked);
        vcpu.reset(&saved).unwrap();
        if round < 2 {
            assert_eq!(vcpu.save(HostTsc::now()).unwrap(), saved);
        } else {
            // Entered, and out again before its first instruction.
            Kick::this_thread().kick();
            assert_eq!(vcpu.run(&io).unwrap(), Ran::Kicked);
            assert_eq!(vcpu.save(HostTsc::now()).unwrap(), saved);
        }
    }
}

#[test]
fn the_counter_of_time_stands_still_between_save_and_start() {
    if no_kvm() {
        return;
    }
    let memory = memory_with(&COUNTER);
    let vm = Vm::new(&memory, 1).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.initialise(vm.cpuid()).unwrap();
    let saved = vcpu.save(HostTsc::now()).unwrap();
    let mut other = Vm::new(&memory, 1).unwrap().create_vcpu(0).unwrap();
    other.restore(&saved).unwrap();
    let plan = ClockPlan::new(&other).unwrap();
    let mut other = other.bind();
    std::thread::sleep(Duration::from_millis(50));
    other
        .start_clock(plan.start(Duration::ZERO, Duration::ZERO))
        .unwrap();
    let after = other.save(HostTsc::now()).unwrap();
    if after.clock.tsc_offset == 0 {
        eprintln!(
            "this host's KVM gives guests its own TSC (as KVM-PVM does), so nothing was tested"
        );
        return;
    }
    let ticks = after.clock.tsc.wrapping_sub(saved.clock.tsc);
    let ms = ticks / u64::from(saved.clock.tsc_khz);
    assert!(ms < 45, "{ms} ms of guest time passed");
}

#[test]
fn clocks_that_were_stopped_go_on_from_where_they_stood() {
    if no_kvm() {
        return;
    }
    let memory = memory_with(&COUNTER);
    let mut vm = Vm::new(&memory, 1).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.initialise(vm.cpuid()).unwrap();
    let plan = ClockPlan::new(&vcpu).unwrap();
    let mut vcpu = vcpu.bind();
    let ms = |vm: &Vm| vm.save().unwrap().clock.kvmclock_ns / 1_000_000;
    let hold = Duration::from_millis(200);
    for passed in [Duration::ZERO, hold] {
        let stopped = vcpu.stop_clock().unwrap();
        vm.stop_clock(stopped, &plan).unwrap();
        let then = ms(&vm);
        std::thread::sleep(hold);
        assert_eq!(ms(&vm), then, "a clock that is stopped goes on");
        let start = plan.held(stopped).start(Duration::ZERO, passed);
        vm.start_clock(start).unwrap();
        vcpu.start_clock(start).unwrap();
        let went = ms(&vm) - then;
        let expected = passed.as_millis() as u64;
        assert!(
            (expected..expected + 100).contains(&went),
            "{went} ms after {passed:?}"
        );
    }
}

#[test]
fn a_clock_is_stopped_as_of_the_last_kick() {
    if no_kvm() {
        return;
    }
    install_kick_handler().unwrap();
    let (_memory, _vm, vcpu) = spinner();
    let plan = ClockPlan::new(&vcpu).unwrap();
    let mut vcpu = vcpu.bind();
    Kick::this_thread().kick();
    assert_eq!(vcpu.run(&Counted::default()).unwrap(), Ran::Kicked);
    let back = HostTsc::now();
    let stopped = vcpu.stop_clock().unwrap();
    assert!(stopped < back, "{stopped:?} is after {back:?}");

    let start = plan.held(stopped).start(Duration::ZERO, Duration::ZERO);
    vcpu.start_clock(start).unwrap();
    let before = HostTsc::now();
    Kick::this_thread().kick();
    let back = vcpu
        .run(&Counted::default())
        .map(|_| HostTsc::now())
        .unwrap();
    let stopped = vcpu.stop_clock().unwrap();
    assert!(
        (before..back).contains(&stopped),
        "an old kick was believed"
    );
}

#[test]
fn a_kick_before_guest_time_goes_on_does_not_end_it_earlier() {
    if no_kvm() {
        return;
    }
    install_kick_handler().unwrap();
    let (_memory, _vm, vcpu) = spinner();
    let plan = ClockPlan::new(&vcpu).unwrap();
    let mut vcpu = vcpu.bind();
    let stopped = vcpu.stop_clock().unwrap();
    let lead = Duration::from_millis(100);
    let planned = Instant::now();
    let start = plan.held(stopped).start(lead, Duration::ZERO);
    vcpu.start_clock(start).unwrap();
    Kick::this_thread().kick();
    let kicked = HostTsc::now();
    // A host under load may have let the instant pass before the kick.
    let late = planned.elapsed() >= lead;
    start.wait();
    assert_eq!(vcpu.run(&Counted::default()).unwrap(), Ran::Kicked);
    let stopped = vcpu.stop_clock().unwrap();
    assert!(
        late || stopped > kicked,
        "{stopped:?} is not after {kicked:?}"
    );
}

#[test]
fn a_kick_ends_a_spinning_guest_and_a_kick_before_it_runs_is_not_lost() {
    if no_kvm() {
        return;
    }
    install_kick_handler().unwrap();
    let (_memory, _vm, vcpu) = spinner();
    let mut vcpu = vcpu.bind();
    let kick = Kick::this_thread();
    let io = Counted::default();
    for round in 0..50 {
        let kicker = std::thread::spawn(move || kick.kick());
        if round % 2 == 0 {
            kicker.join().unwrap();
            assert_eq!(vcpu.run(&io).unwrap(), Ran::Kicked);
        } else {
            assert_eq!(vcpu.run(&io).unwrap(), Ran::Kicked);
            kicker.join().unwrap();
        }
    }
}

#[test]
fn a_host_has_what_it_gave() {
    if no_kvm() {
        return;
    }
    let memory = memory_with(&SPINNER);
    let vm = Vm::new(&memory, 2).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.initialise(vm.cpuid()).unwrap();
    let saved = vcpu.save(HostTsc::now()).unwrap();
    // Memory types: on, and write-back, as the vCPU was made.
    let types = saved.msrs.iter().find(|entry| entry.index == 0x2ff);
    assert_eq!(types.map(|entry| entry.value), Some(0x806));
    let missing = hypervisor::missing_features(&saved, vm.cpuid()).unwrap();
    assert_eq!(missing, Vec::<String>::new());
}

#[test]
fn a_vcpu_of_a_template_is_what_the_template_says_and_no_other_value_is_believed() {
    const MISC_ENABLE: u32 = 0x1a0;
    if no_kvm() {
        return;
    }
    let memory = memory_with(&SPINNER);
    let vm = Vm::new(&memory, 1).unwrap();
    let leaf_1 = |cpuid: &GuestCpuid| cpuid.entries().iter().find(|it| it.function == 1).copied();
    let shown = leaf_1(vm.cpuid()).unwrap().edx;
    let hidden = 1 << shown.trailing_zeros();
    let template = CpuTemplate {
        cpuid: vec![CpuidChange {
            leaf: 1,
            subleaf: 0,
            register: Register::Edx,
            clear: hidden,
            set: 0,
        }],
        msrs: vec![MsrChange {
            index: MISC_ENABLE,
            clear: 1,
            set: 0,
        }],
        ..CpuTemplate::default()
    };
    template.check().unwrap();
    let cpuid = vm.cpuid().of_template(&template).unwrap();
    assert_eq!(leaf_1(&cpuid).unwrap().edx, shown & !hidden);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.initialise(&cpuid).unwrap();
    let enabled = |saved: &VcpuState| {
        let entry = saved.msrs.iter().find(|entry| entry.index == MISC_ENABLE);
        entry.map(|entry| entry.value & 1)
    };
    assert_eq!(enabled(&vcpu.save(HostTsc::now()).unwrap()), Some(1));
    vcpu.change_msrs(&template.msrs).unwrap();
    let saved = vcpu.save(HostTsc::now()).unwrap();
    assert_eq!(enabled(&saved), Some(0));
    // A host with all of it can go on with it.
    let missing = hypervisor::missing_features(&saved, vm.cpuid()).unwrap();
    assert_eq!(missing, Vec::<String>::new());

    // One that no vCPU has, and the time stamp counter, which is the clock's.
    for index in [0xdead_beef, 0x10] {
        let change = MsrChange {
            index,
            clear: 0,
            set: 1,
        };
        let refused = vcpu.change_msrs(&[change]);
        assert!(
            matches!(refused, Err(Error::TemplateMsr(at)) if at == index),
            "{refused:?}"
        );
        let template = CpuTemplate {
            msrs: vec![change],
            ..CpuTemplate::default()
        };
        assert!(template.check().is_err());
    }
}

#[test]
fn what_another_host_had_of_features_that_are_not_shown_is_not_set() {
    const OF_FEATURES: [u32; 2] = [0x10a, 0x345];
    if no_kvm() {
        return;
    }
    let memory = memory_with(&SPINNER);
    let vm = Vm::new(&memory, 1).unwrap();
    let hide = |leaf, register, clear| CpuidChange {
        leaf,
        subleaf: 0,
        register,
        clear,
        set: 0,
    };
    let template = CpuTemplate {
        cpuid: vec![
            hide(1, Register::Ecx, 1 << 15),
            hide(7, Register::Edx, 1 << 29),
        ],
        ..CpuTemplate::default()
    };
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.initialise(&vm.cpuid().of_template(&template).unwrap())
        .unwrap();
    let mut saved = vcpu.save(HostTsc::now()).unwrap();
    let is_saved = |index| saved.msrs.iter().any(|entry| entry.index == index);
    assert!(!OF_FEATURES.into_iter().any(is_saved));
    let without = saved.clone();
    // As a host with an older kernel saved it.
    saved.msrs.extend(OF_FEATURES.map(|index| MsrEntry {
        index,
        value: 0x400_ffff,
    }));
    let other = Vm::new(&memory, 1).unwrap();
    let mut vcpu = other.create_vcpu(0).unwrap();
    vcpu.restore(&saved).unwrap();
    assert_eq!(vcpu.save(HostTsc::now()).unwrap(), without);
}

/// Answers each read with how many there were before.
#[derive(Default)]
struct Numbered {
    reads: AtomicU32,
    written: AtomicU32,
}

impl IoHandler for Numbered {
    fn port_in(&self, port: u16, data: &mut [u8]) {
        assert_eq!((port, data.len()), (0x60, 1));
        data.fill(self.reads.fetch_add(1, Ordering::SeqCst) as u8);
    }
    fn port_out(&self, port: u16, data: &[u8]) {
        assert_eq!(port, 0x10);
        let written = u32::from_le_bytes(data.try_into().unwrap());
        self.written.store(written, Ordering::SeqCst);
    }
    fn mmio_read(&self, _gpa: u64, _data: &mut [u8]) {}
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
}

#[test]
fn a_string_instruction_reads_one_port_again_and_again() {
    if no_kvm() {
        return;
    }
    let memory = memory_with(&STRING_READER);
    let vm = Vm::new(&memory, 1).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.initialise(vm.cpuid()).unwrap();
    vcpu.boot(&boot_registers()).unwrap();
    let mut vcpu = vcpu.bind();
    let io = Numbered::default();
    while io.written.load(Ordering::SeqCst) == 0 {
        assert_eq!(vcpu.run(&io).unwrap(), Ran::Port);
    }
    assert_eq!(io.written.load(Ordering::SeqCst), 0x0504_0302);
    assert_eq!(io.reads.load(Ordering::SeqCst), 8);
}
