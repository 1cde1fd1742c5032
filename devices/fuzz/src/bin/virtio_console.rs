#![no_main]

use devices_fuzz::{Terminal, attack};
use fuzz_harness::Heap;
use libfuzzer_sys::fuzz_target;

#[global_allocator]
static HEAP: Heap = Heap;

fuzz_target!(init: fuzz_harness::write_seeds(devices_fuzz::seeds()), |input: &[u8]| attack::<Terminal>(input));
