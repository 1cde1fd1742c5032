//! Arbitrary payloads under right checksums: what somebody who forges a state file could have decoded of vCPUs and of the
//! machine's devices in the kernel. Those of the emulated devices are forged in `devices/fuzz`.
#![no_main]

use fuzz_harness::{Heap, bounded};
use hypervisor::{VcpuState, VmState};
use libfuzzer_sys::fuzz_target;
use saved_state::{SavedState, Section};

#[global_allocator]
static HEAP: Heap = Heap;

/// A vector has up to 10 MiB, and both kinds have several.
const HEAP_BYTES: usize = 64 << 20;

fn decode<T: SavedState>(payload: &[u8]) {
    let section = Section {
        kind: T::KIND,
        instance: 0,
        version: T::VERSION,
        payload: payload.to_vec(),
    };
    if let Ok(state) = section.decode::<T>() {
        let again = Section::encode(0, &state).expect("what was decoded can be encoded");
        assert!(again.decode::<T>().is_ok());
    }
}

fuzz_target!(|payload: &[u8]| {
    bounded(HEAP_BYTES, || {
        decode::<VcpuState>(payload);
        decode::<VmState>(payload);
    });
});
