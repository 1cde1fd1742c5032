//! What a guest tells of its memory.

use crate::virtio::buffers::Run;

/// Bytes of one statistic: its tag in 16 bits, its value in 64 (virtio 1.3, section 5.5.6).
const ENTRY_BYTES: usize = 10;

/// Statistics that are looked at; Linux has 16.
const MAX_ENTRIES: usize = 64;

/// Names by tag (virtio 1.3, section 5.5.6; the last from Linux, include/uapi/linux/virtio_balloon.h). Each has its unit, or is a
/// number of events since the guest began.
const NAMES: [&str; 11] = [
    "swapped_in_bytes",
    "swapped_out_bytes",
    "major_faults",
    "minor_faults",
    "free_bytes",
    "total_bytes",
    "available_bytes",
    "cache_bytes",
    "huge_page_allocations",
    "huge_page_failures",
    "oom_kills",
];

/// A guest's statistics, by name. Which there are is the guest's choice, and that they are true its word.
pub type Statistics = Vec<(&'static str, u64)>;

/// Reads what the driver has put into a buffer; of a tag that is there twice, the last counts.
pub(super) fn read(run: &Run<'_>) -> Statistics {
    let mut bytes = vec![0; (run.len() as usize).min(MAX_ENTRIES * ENTRY_BYTES)];
    run.copy_to(&mut bytes);
    let mut values = [None; NAMES.len()];
    let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
    for [low, high, value @ ..] in entries {
        let tag = u16::from_le_bytes([*low, *high]);
        if let Some(known) = values.get_mut(usize::from(tag)) {
            *known = Some(u64::from_le_bytes(*value));
        }
    }
    let named = NAMES.into_iter().zip(values);
    named
        .filter_map(|(name, value)| Some((name, value?)))
        .collect()
}
