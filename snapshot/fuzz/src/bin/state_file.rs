//! Arbitrary bytes as a state file.
#![no_main]

use fuzz_harness::{Heap, bounded};
use libfuzzer_sys::fuzz_target;
use saved_state::{Container, CpuIdentity, Header, Kind, Section, SnapshotId};

#[global_allocator]
static HEAP: Heap = Heap;

const HEAP_BYTES: usize = 8 << 20;

/// A state file with two sections.
fn some_file() -> Vec<u8> {
    let mut container = Container::new(Header {
        id: SnapshotId([0; 16]),
        release: "0.1.0".to_owned(),
        created_unix_ns: 0,
        host_cpu: CpuIdentity::default(),
        vcpus: 1,
        memory_bytes: 1 << 20,
    });
    for instance in 0..2 {
        let section = Section {
            kind: Kind(*b"SOME"),
            instance,
            version: 1,
            payload: vec![7; 20],
        };
        container.insert(section).expect("each is there once");
    }
    container.to_bytes()
}

fuzz_target!(init: fuzz_harness::write_seeds([some_file()]), |bytes: &[u8]| {
    bounded(HEAP_BYTES, || {
        if let Ok(container) = Container::from_bytes(bytes) {
            let again = Container::from_bytes(&container.to_bytes());
            assert_eq!(again.as_ref(), Ok(&container));
        }
    });
});
