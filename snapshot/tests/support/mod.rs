//! A machine's state and memory, as small as they can be.

#![allow(dead_code, reason = "not every test uses all of it")]

use memory::{Layout, MIN_MEMORY_BYTES, MachineMemory, PAGE_BYTES};
use saved_state::{Container, CpuIdentity, Header, SnapshotId};
use vm_memory::{Bytes, GuestAddress};

pub(crate) fn container(id: u8) -> Container {
    Container::new(Header {
        id: SnapshotId([id; 16]),
        release: "0.1.0".to_owned(),
        created_unix_ns: 0,
        host_cpu: CpuIdentity::default(),
        vcpus: 1,
        memory_bytes: MIN_MEMORY_BYTES,
    })
}

pub(crate) fn memory_with(marks: &[(u64, u8)]) -> MachineMemory {
    let memory = MachineMemory::zeroed(Layout::new(MIN_MEMORY_BYTES).unwrap()).unwrap();
    for (gpa, mark) in marks {
        memory
            .guest()
            .write_slice(&[*mark; 64], GuestAddress(*gpa))
            .unwrap();
    }
    memory
}

pub(crate) fn mark(memory: &MachineMemory, gpa: u64) -> u8 {
    memory.guest().read_obj(GuestAddress(gpa)).unwrap()
}

pub(crate) const LAST: u64 = MIN_MEMORY_BYTES - PAGE_BYTES;
