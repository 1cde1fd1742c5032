//! What machines of one size have in common: memory, KVM's machine around it, its vCPUs, and the threads that all of them will run
//! on. Nothing in it is of any guest yet, so that it can be made before there is one; or it is what all forks of an image have in common.

use std::thread;

use control::Shape;
use devices::LoopThread;
use hypervisor::{Vcpu, VcpuState, Vm, missing_features};
use memory::MachineMemory;
use saved_state::SavedState;
use snapshot::Snapshot;

use crate::{error::Error, limits::layout_of, vcpu::WaitingThread, vcpus};

/// It. Memory comes first, because KVM wants its slots before its interrupt controllers.
pub(crate) struct Frame {
    pub(crate) memory: MachineMemory,
    pub(crate) vm: Vm,
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) threads: Threads,
    pub(crate) restored: Restored,
}

/// What of a machine is already what it is in a hot image.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Restored {
    Nothing,
    Memory,
    MemoryAndVcpus,
}

/// The threads of a machine, which wait for their work. If this is dropped, they end.
pub(crate) struct Threads {
    pub(crate) vcpus: Vec<WaitingThread>,
    pub(crate) devices: LoopThread,
}

impl Threads {
    fn spawn(vcpus: u32) -> Result<Self, Error> {
        let devices = LoopThread::spawn()?;
        let spawn = |id| WaitingThread::spawn(id).map_err(|e| vcpus::Error::Thread(id, e));
        let vcpus: Result<_, _> = (0..vcpus).map(spawn).collect();
        Ok(Self {
            vcpus: vcpus?,
            devices,
        })
    }
}

impl Frame {
    /// Around `memory`.
    pub(crate) fn new(memory: MachineMemory, vcpus: u32) -> Result<Self, Error> {
        let vm = Vm::new(&memory, vcpus)?;
        let threads = Threads::spawn(vcpus)?;
        let vcpus: Result<_, _> = (0..vcpus).map(|id| vm.create_vcpu(id)).collect();
        Ok(Self {
            memory,
            vcpus: vcpus?,
            vm,
            threads,
            restored: Restored::Nothing,
        })
    }

    /// For a machine of this size that is forked later.
    pub(crate) fn prepare(shape: Shape) -> Result<Self, Error> {
        let layout = layout_of(shape.memory_mib.saturating_mul(1 << 20))?;
        let mut frame = Self::new(MachineMemory::zeroed(layout)?, shape.vcpus)?;
        let cpuid = frame.vm.cpuid();
        for vcpu in &mut frame.vcpus {
            vcpu.expect(cpuid)?;
        }
        Ok(frame)
    }

    /// Has it be what is in the hot image `saved`, as far as that is the same for all forks and does not change while it waits for one.
    pub(crate) fn restore(&mut self, saved: &Snapshot) -> Result<(), Error> {
        if !saved.load_over(&self.memory)? {
            return Ok(());
        }
        self.restored = Restored::Memory;
        let decode = |vcpu: &Vcpu| saved.state.get(VcpuState::KIND, vcpu.id())?.decode();
        let states: Result<Vec<VcpuState>, _> = self.vcpus.iter().map(decode).collect();
        let states = states?;
        // KVM would let it count while the process waits, and go off again and again.
        if states.iter().any(VcpuState::timer_counts_down) {
            return Ok(());
        }
        for (vcpu, state) in self.vcpus.iter_mut().zip(&states) {
            restore_vcpu(vcpu, state, &self.vm)?;
        }
        self.restored = Restored::MemoryAndVcpus;
        Ok(())
    }

    /// Whether it is for a machine with so many vCPUs and bytes of memory.
    pub(crate) fn is_for(&self, vcpus: u32, memory_bytes: u64) -> bool {
        self.vcpus.len() == vcpus as usize && self.memory.layout().bytes() == memory_bytes
    }

    /// Ends it, which is of no use here. The kernel takes some milliseconds for that, for which nobody need wait.
    pub(crate) fn put_away(self) {
        let ending = thread::Builder::new().name("put-away".to_owned());
        if let Err(error) = ending.spawn(move || drop(self)) {
            tracing::warn!("a machine that was prepared ended in the way of another: {error}");
        }
    }
}

/// Makes `vcpu` what `saved` says, if it can show its guest what that has seen.
pub(crate) fn restore_vcpu(vcpu: &mut Vcpu, saved: &VcpuState, vm: &Vm) -> Result<(), Error> {
    let missing = missing_features(saved, vm.cpuid())?;
    if !missing.is_empty() {
        return Err(Error::MissingFeatures(missing));
    }
    Ok(vcpu.restore(saved)?)
}
