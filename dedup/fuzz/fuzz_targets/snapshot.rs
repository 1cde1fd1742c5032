#![no_main]

use dedup::backend::Area;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| dedup_fuzz::run(Area::Snapshots, input));
