#![no_main]

use devices_fuzz::ports::{Console, attack};
use fuzz_harness::Heap;
use libfuzzer_sys::fuzz_target;

#[global_allocator]
static HEAP: Heap = Heap;

fuzz_target!(|input: &[u8]| attack::<Console>(input));
