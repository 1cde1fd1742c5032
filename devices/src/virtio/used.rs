//! Several chains that the driver sees used at once.
//!
//! A frame may take several chains, and a driver that sees the first of them looks for the others
//! (virtio 1.3, 5.1.6.4): the ring's index must move past all of them in one step.

use std::sync::atomic::Ordering;

use memory::GuestMemory;
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

/// Bytes of flags and index before the elements of either ring (virtio 1.3, 2.7.6 and 2.7.8).
const RING_HEADER_BYTES: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;
const AVAILABLE_ELEMENT_BYTES: u64 = 2;

/// Gives `chains`, of each its head and the bytes written to it, back to the driver.
///
/// # Errors
///
/// When a head is none, or the ring is not in memory; nothing has changed then.
pub(crate) fn add_together(
    queue: &mut Queue,
    memory: &GuestMemory,
    chains: &[(u16, u32)],
) -> Result<(), Error> {
    let Some(((last_head, last_written), earlier)) = chains.split_last() else {
        return Ok(());
    };
    if chains.iter().any(|(head, _)| *head >= queue.size()) {
        return Err(Error::InvalidDescriptorIndex);
    }
    let begin = queue.next_used();
    let mut next = begin;
    for (head, written) in earlier {
        let slot = u64::from(next % queue.size());
        let element = GuestAddress(queue.used_ring())
            .checked_add(RING_HEADER_BYTES + USED_ELEMENT_BYTES * slot)
            .ok_or(Error::AddressOverflow)?;
        // `struct virtq_used_elem`.
        let value = [u32::from(*head).to_le(), written.to_le()];
        memory
            .write_obj(value, element)
            .map_err(Error::GuestMemory)?;
        next = next.wrapping_add(1);
    }
    // This writes the last element, and then the index behind all of them.
    queue.set_next_used(next);
    queue
        .add_used(memory, *last_head, *last_written)
        .inspect_err(|_| queue.set_next_used(begin))
}

/// Whether the driver wants to hear of what was used since the ring's index was `before`.
///
/// The queue counts for itself what was used one by one; of what was used together it knows the last.
pub(crate) fn wants_interrupt(
    queue: &mut Queue,
    memory: &GuestMemory,
    before: u16,
) -> Result<bool, Error> {
    let now = queue.next_used();
    if now == before {
        return Ok(false);
    }
    // It orders what was written before with what is read after, and forgets its count.
    let wanted = queue.needs_notification(memory)?;
    if wanted || !queue.event_idx_enabled() {
        return Ok(wanted);
    }
    let place = GuestAddress(queue.avail_ring())
        .checked_add(RING_HEADER_BYTES + AVAILABLE_ELEMENT_BYTES * u64::from(queue.size()))
        .ok_or(Error::AddressOverflow)?;
    let event: u16 = memory
        .load(place, Ordering::Relaxed)
        .map_err(Error::GuestMemory)?;
    // The event is one of those used since (virtio 1.3, 2.7.7.2).
    let passed = now.wrapping_sub(u16::from_le(event)).wrapping_sub(1);
    Ok(passed < now.wrapping_sub(before))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::driver;

    const ENTRIES: u16 = 8;
    const USED_EVENT: GuestAddress = GuestAddress(0x2004 + 2 * ENTRIES as u64);

    fn queue(event_idx: bool) -> Queue {
        let mut queue = Queue::new(ENTRIES).unwrap();
        queue.set_desc_table_address(Some(0x1000), None);
        queue.set_avail_ring_address(Some(0x2000), None);
        queue.set_used_ring_address(Some(0x3000), None);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue
    }

    #[test]
    fn elements_and_index_wrap_around() {
        let memory = driver::memory();
        let mut queue = queue(false);
        queue.set_next_used(u16::MAX - 1);
        add_together(&mut queue, &memory, &[(3, 30), (1, 10), (2, 20)]).unwrap();
        assert_eq!(queue.next_used(), 1);
        let index: u16 = memory.read_obj(GuestAddress(0x3002)).unwrap();
        assert_eq!(index, 1);
        for (slot, element) in [(6, [3u32, 30]), (7, [1, 10]), (0, [2, 20])] {
            let found: [u32; 2] = memory.read_obj(GuestAddress(0x3004 + 8 * slot)).unwrap();
            assert_eq!(found, element);
        }
    }

    #[test]
    fn a_head_that_is_none_changes_nothing() {
        let memory = driver::memory();
        let mut queue = queue(false);
        assert!(add_together(&mut queue, &memory, &[(1, 0), (ENTRIES, 0)]).is_err());
        assert_eq!(queue.next_used(), 0);
        add_together(&mut queue, &memory, &[]).unwrap();
        assert_eq!(queue.next_used(), 0);
    }

    #[test]
    fn an_interrupt_is_wanted_for_any_of_those_used_together() {
        let memory = driver::memory();
        for (event, wanted) in [
            (9u16, false),
            (10, true),
            (11, true),
            (12, true),
            (13, false),
        ] {
            let mut queue = queue(true);
            queue.set_next_used(10);
            memory.write_obj(event, USED_EVENT).unwrap();
            add_together(&mut queue, &memory, &[(0, 0), (1, 0), (2, 0)]).unwrap();
            assert_eq!(
                wants_interrupt(&mut queue, &memory, 10).unwrap(),
                wanted,
                "{event}"
            );
        }
    }

    #[test]
    fn nothing_used_wants_no_interrupt() {
        let memory = driver::memory();
        assert!(!wants_interrupt(&mut queue(false), &memory, 0).unwrap());
    }
}
