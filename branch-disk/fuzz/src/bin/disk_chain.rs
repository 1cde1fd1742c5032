#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| branch_disk_fuzz::run(input));
