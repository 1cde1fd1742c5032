//! Arbitrary bytes as the end of a memory file, beside a state file that is in order.
#![no_main]

use std::{fs, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use saved_state::{Container, CpuIdentity, Header, SnapshotId};
use snapshot::Pair;
use tempfile::TempDir;

static PLACE: LazyLock<TempDir> = LazyLock::new(|| {
    let place = tempfile::tempdir().unwrap();
    let state = Container::new(Header {
        id: SnapshotId([0; 16]),
        release: "0.1.0".to_owned(),
        created_unix_ns: 0,
        host_cpu: CpuIdentity::default(),
        vcpus: 1,
        memory_bytes: 64 << 20,
    });
    fs::write(place.path().join("state"), state.to_bytes()).unwrap();
    place
});

fuzz_target!(|bytes: &[u8]| {
    let memory = PLACE.path().join("memory");
    fs::write(&memory, bytes).unwrap();
    if let Ok(pair) = Pair::open(&PLACE.path().join("state"), &memory) {
        let _ = pair.verify();
    }
});
