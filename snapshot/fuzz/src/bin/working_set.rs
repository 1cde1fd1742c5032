//! Arbitrary bytes as what is kept of a snapshot's working set.
#![no_main]

use fuzz_harness::{Heap, bounded};
use libfuzzer_sys::fuzz_target;
use snapshot::WorkingSet;

#[global_allocator]
static HEAP: Heap = Heap;

/// A working set has 131,072 pages at most, eight bytes each, and a vector grows by doubling.
const HEAP_BYTES: usize = 4 << 20;

const IMAGE_BYTES: u64 = 1 << 30;

fuzz_target!(|bytes: &[u8]| {
    bounded(HEAP_BYTES, || {
        let Ok(set) = WorkingSet::parse(bytes, IMAGE_BYTES) else {
            return;
        };
        assert!(set.pages().iter().all(|page| *page < IMAGE_BYTES / 4096));
        let again = WorkingSet::parse(&set.encode(), IMAGE_BYTES);
        assert_eq!(again.as_ref(), Ok(&set));
    });
});
