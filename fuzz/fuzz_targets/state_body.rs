//! Arbitrary payloads under right checksums: what somebody who forges a state file could have decoded.
#![no_main]

use devices::virtio::{block::SavedBlock, net::SavedNet, vsock::SavedVsock};
use hypervisor::{VcpuState, VmState};
use libfuzzer_sys::fuzz_target;
use saved_state::{SavedState, Section};

fn decode<T: SavedState>(payload: &[u8]) {
    let section = Section {
        kind: T::KIND,
        instance: 0,
        version: T::VERSION,
        payload: payload.to_vec(),
    };
    let _ = section.decode::<T>();
}

fuzz_target!(|payload: &[u8]| {
    decode::<VcpuState>(payload);
    decode::<VmState>(payload);
    decode::<SavedBlock>(payload);
    decode::<SavedNet>(payload);
    decode::<SavedVsock>(payload);
});
