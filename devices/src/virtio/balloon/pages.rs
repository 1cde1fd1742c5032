//! The pages that a driver names.

use std::ops::Range;

use memory::GuestMemory;
use virtio_queue::DescriptorChain;

use super::{DriverError, QUEUE_ENTRIES};
use crate::virtio::buffers::{Buffers, Run};

/// A balloon counts in pages of this size, whatever the guest's are (virtio 1.3, 5.5.6).
const PAGE_SHIFT: u32 = 12;

/// Page numbers that are looked at in one chain; what follows is not acted upon, which a driver must reckon with. Linux names
/// 256 in one, Windows and FreeBSD 1024.
const MAX_NUMBERS: usize = 4096;

const NUMBER_BYTES: usize = size_of::<u32>();

/// The pages whose numbers, of 32 bits each, are in `run`, as ranges of guest-physical addresses, ascending and apart.
pub(super) fn named(run: &Run<'_>) -> Vec<Range<u64>> {
    let mut bytes = vec![0; (run.len() as usize).min(MAX_NUMBERS * NUMBER_BYTES)];
    run.copy_to(&mut bytes);
    let (numbers, _) = bytes.as_chunks::<NUMBER_BYTES>();
    let mut pages: Vec<u64> = numbers
        .iter()
        .map(|number| u32::from_le_bytes(*number).into())
        .collect();
    pages.sort_unstable();
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for page in pages {
        let (start, end) = (page << PAGE_SHIFT, (page + 1) << PAGE_SHIFT);
        match ranges.last_mut() {
            Some(last) if last.end >= start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

/// How many page numbers `run` has.
pub(super) fn count(run: &Run<'_>) -> u64 {
    run.len() / NUMBER_BYTES as u64
}

/// The buffers of `chain` themselves, all for the device to write, as ranges of guest-physical addresses.
pub(super) fn buffers(
    chain: DescriptorChain<&GuestMemory>,
    memory: &GuestMemory,
) -> Result<Vec<Range<u64>>, DriverError> {
    let ranges = chain
        .clone()
        .take(QUEUE_ENTRIES.into())
        .map(|buffer| buffer.addr().0..buffer.addr().0.saturating_add(buffer.len().into()))
        .collect();
    // That it is whole, and all in memory.
    let Buffers { readable, .. } = Buffers::of(chain, memory, QUEUE_ENTRIES.into())?;
    if readable.len() > 0 {
        return Err(DriverError::Order);
    }
    Ok(ranges)
}
