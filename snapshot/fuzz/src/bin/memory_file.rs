//! Arbitrary bytes as a memory file, beside a state file that is in order.
#![no_main]

use std::{fs, sync::LazyLock};

use fuzz_harness::{Heap, bounded};
use libfuzzer_sys::fuzz_target;
use saved_state::{Container, CpuIdentity, Header, SnapshotId};
use snapshot::{Files, Snapshot, Source};
use tempfile::TempDir;

#[global_allocator]
static HEAP: Heap = Heap;

/// Of the machine's memory, which is mapped and not allocated.
const MEMORY_BYTES: u64 = 1 << 20;
const HEAP_BYTES: usize = 8 << 20;

static PLACE: LazyLock<TempDir> = LazyLock::new(|| {
    let place = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let place = place.expect("there is room");
    let state = Container::new(Header {
        id: SnapshotId([0; 16]),
        release: "0.1.0".to_owned(),
        created_unix_ns: 0,
        host_cpu: CpuIdentity::default(),
        vcpus: 1,
        memory_bytes: MEMORY_BYTES,
    });
    fs::write(place.path().join("state"), state.to_bytes()).expect("there is room");
    place
});

fuzz_target!(|bytes: &[u8]| {
    let [state, memory] = ["state", "memory"].map(|name| PLACE.path().join(name));
    fs::write(&memory, bytes).expect("there is room");
    bounded(HEAP_BYTES, || {
        let files = Files {
            state: &state,
            memory: &memory,
        };
        if let Ok(snapshot) = Snapshot::open(Source::Files { files, store: None }) {
            let _ = snapshot.load();
        }
    });
});
