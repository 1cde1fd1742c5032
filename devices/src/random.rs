//! Numbers that are others in each process, also in those that go on from one state.

use rustix::rand::{GetRandomFlags, getrandom};

/// What a fuzzer's program does once, it does again.
#[allow(unexpected_cfgs, reason = "`fuzzing` is set by fuzzers alone")]
const CHOSEN: bool = cfg!(fuzzing);

/// Such a number.
pub(crate) fn random() -> u32 {
    let mut number = [0; 4];
    if !CHOSEN {
        // So few bytes are never refused, once the host has any.
        let _ = getrandom(&mut number, GetRandomFlags::empty());
    }
    u32::from_le_bytes(number)
}
