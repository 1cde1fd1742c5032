//! Arbitrary bytes as a state file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use saved_state::Container;

fuzz_target!(|bytes: &[u8]| {
    let _ = Container::from_bytes(bytes);
});
