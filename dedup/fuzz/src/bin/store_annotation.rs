#![no_main]

use dedup::backend::Area;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: dedup_fuzz::write_seeds(Area::Annotations), |input: &[u8]| dedup_fuzz::run(Area::Annotations, input));
