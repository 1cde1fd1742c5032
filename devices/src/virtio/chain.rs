//! A chain of descriptors by its head, for a device that has taken it off the ring in an earlier round.

use memory::GuestMemory;
use virtio_queue::{
    Queue, QueueT,
    desc::{RawDescriptor, split::Descriptor},
};
use vm_memory::{Address, Bytes, GuestAddress};

/// Bytes of a descriptor (virtio 1.3, 2.7.5).
const DESCRIPTOR_BYTES: u32 = 16;

/// The descriptors of a chain, as far as they can be followed.
#[derive(Debug)]
pub(crate) struct Chain<'m> {
    memory: &'m GuestMemory,
    /// The table that it goes on in, and its entries.
    table: GuestAddress,
    entries: u16,
    /// The table is one that a descriptor refers to.
    indirect: bool,
    next: Option<u16>,
    /// How many descriptors there can still be: one that loops ends here.
    left: u16,
    /// How many bytes its buffers can still have: a chain has less than 4 GiB (virtio 1.3, 2.7.4.2).
    bytes_left: u32,
}

impl<'m> Chain<'m> {
    /// The chain of `queue` that begins with descriptor `head`.
    pub(crate) fn new(queue: &Queue, memory: &'m GuestMemory, head: u16) -> Self {
        Self {
            memory,
            table: GuestAddress(queue.desc_table()),
            entries: queue.size(),
            indirect: false,
            next: Some(head),
            left: queue.size(),
            bytes_left: u32::MAX,
        }
    }

    /// Goes on in the table that `descriptor` refers to (virtio 1.3, 2.7.5.3); no descriptor of that refers to another.
    fn enter(&mut self, descriptor: Descriptor) -> Option<()> {
        let len = descriptor.len();
        if self.indirect || !len.is_multiple_of(DESCRIPTOR_BYTES) {
            return None;
        }
        self.table = descriptor.addr();
        self.entries = u16::try_from(len / DESCRIPTOR_BYTES).ok()?;
        self.indirect = true;
        self.next = Some(0);
        self.left = self.entries;
        Some(())
    }
}

impl Iterator for Chain<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        loop {
            let index = self.next.take().filter(|index| *index < self.entries)?;
            self.left = self.left.checked_sub(1)?;
            let offset = u64::from(DESCRIPTOR_BYTES) * u64::from(index);
            let place = self.table.checked_add(offset)?;
            let raw: RawDescriptor = self.memory.read_obj(place).ok()?;
            let descriptor = Descriptor::from(raw);
            if descriptor.refers_to_indirect_table() {
                self.enter(descriptor)?;
                continue;
            }
            self.bytes_left = self.bytes_left.checked_sub(descriptor.len())?;
            self.next = descriptor.has_next().then(|| descriptor.next());
            return Some(descriptor);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_queue::QueueOwnedT;

    use super::*;
    use crate::virtio::driver;

    const ENTRIES: u16 = 8;
    const TABLE: u64 = 0x1000;
    const AVAILABLE: u64 = 0x2000;
    const INDIRECT: u64 = 0x4000;

    /// Flags and lengths that matter, and where the next is.
    fn descriptor() -> impl Strategy<Value = Descriptor> {
        let address = prop::sample::select(vec![INDIRECT, TABLE, 0x9000, u64::MAX]);
        let len = prop::sample::select(vec![0u32, 16, 64, 65, 1 << 31, u32::MAX]);
        (address, len, 0u16..8, 0..ENTRIES + 2)
            .prop_map(|(address, len, flags, next)| Descriptor::new(address, len, flags, next))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        /// It has the descriptors that the ring has of a chain with this head.
        #[test]
        fn a_chain_is_what_it_is_by_the_ring(
            table in prop::collection::vec(descriptor(), usize::from(ENTRIES)),
            indirect in prop::collection::vec(descriptor(), 4),
            head in 0..ENTRIES + 2,
        ) {
            let memory = driver::memory();
            for (at, table) in [(TABLE, &table), (INDIRECT, &indirect)] {
                for (descriptor, slot) in table.iter().zip(0..) {
                    let place = GuestAddress(at + 16 * slot);
                    memory.write_obj(RawDescriptor::from(*descriptor), place).unwrap();
                }
            }
            memory.write_obj([0u16, 1, head], GuestAddress(AVAILABLE)).unwrap();
            let mut queue = Queue::new(ENTRIES).unwrap();
            queue.set_desc_table_address(Some(TABLE as u32), None);
            queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
            queue.set_used_ring_address(Some(0x3000), None);
            queue.set_ready(true);
            let by_ring = queue.iter(&memory).unwrap().next().unwrap();
            let by_ring: Vec<_> = by_ring.map(RawDescriptor::from).collect();
            let by_head: Vec<_> = Chain::new(&queue, &memory, head).map(RawDescriptor::from).collect();
            prop_assert_eq!(format!("{by_head:?}"), format!("{by_ring:?}"));
        }
    }
}
