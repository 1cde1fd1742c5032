#![no_main]

use devices_fuzz::ports::{Clock, attack};
use fuzz_harness::Heap;
use libfuzzer_sys::fuzz_target;

#[global_allocator]
static HEAP: Heap = Heap;

fuzz_target!(|input: &[u8]| attack::<Clock>(input));
