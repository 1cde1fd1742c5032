//! A guest's memory and its driver: what it lays out in memory and what it writes to registers, right or wrong.

use devices::{BusDevice, virtio::MmioTransport};
use fuzz_harness::Input;
use memory::GuestMemory;
use virtio_bindings::{
    virtio_config::{
        VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
        VIRTIO_CONFIG_S_FEATURES_OK,
    },
    virtio_mmio::*,
    virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE},
};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::memory_map::PIECES;

/// More than any device here has.
pub(crate) const QUEUES: u16 = 4;

/// Where the tables of the first queue are, and how far it is to those of the next.
const TABLES: u64 = 0x1000;
const QUEUE_BYTES: u64 = 0x4000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const DESCRIPTOR_BYTES: u64 = 16;

/// Where buffers are.
const DATA: std::ops::Range<u64> = 0x1_1000..0x3_f000;

/// A part of a request.
#[derive(Clone, Debug)]
pub enum Part {
    /// Bytes for the device to read.
    Out(Vec<u8>),
    /// Room for the device to write, in bytes.
    In(u32),
}

/// Up to eight parts of any kind.
pub(crate) fn any_parts(input: &mut Input<'_>) -> Vec<Part> {
    (0..=input.byte() % 8).map(|_| any_part(input)).collect()
}

pub(crate) fn any_part(input: &mut Input<'_>) -> Part {
    let len = u32::from(input.half() & 0xfff);
    if input.flag() {
        return Part::In(len);
    }
    let mut bytes = input.bytes(usize::from(input.clone().byte() % 64)).to_vec();
    bytes.resize(len as usize, 0xa5);
    Part::Out(bytes)
}

/// What a queue's driver keeps.
#[derive(Clone, Copy, Debug)]
struct Ring {
    /// Descriptors, available ring, used ring.
    places: [u64; 3],
    entries: u16,
    next_descriptor: u16,
    next_available: u16,
}

/// A guest.
pub struct Guest {
    pub(crate) memory: GuestMemory,
    rings: [Ring; QUEUES as usize],
    next_data: u64,
}

impl Guest {
    pub(crate) fn in_memory(memory: GuestMemory) -> Self {
        let ring = |queue: u64| {
            let base = TABLES + queue * QUEUE_BYTES;
            Ring {
                places: [base, base + AVAILABLE, base + USED],
                entries: 64,
                next_descriptor: 0,
                next_available: 0,
            }
        };
        Self {
            memory,
            rings: [0, 1, 2, 3].map(ring),
            next_data: DATA.start,
        }
    }

    /// An address: of a table, of a buffer, at the end of a piece of memory, or any.
    pub(crate) fn address(&self, input: &mut Input<'_>) -> u64 {
        let offset = u64::from(input.half());
        match input.byte() % 8 {
            0..3 => TABLES + offset % (u64::from(QUEUES) * QUEUE_BYTES),
            3..5 => DATA.start + offset * 2,
            5 | 6 => {
                let (start, bytes) = input.one_of(&PIECES);
                (start + bytes as u64).wrapping_sub(offset % 64)
            }
            _ => input.long(),
        }
    }

    pub(crate) fn store<T: ByteValued>(&self, address: u64, value: T) {
        // A hostile guest writes to where there is memory.
        let _ = self.memory.write_obj(value, GuestAddress(address));
    }

    fn load<T: ByteValued>(&self, address: u64) -> T {
        self.memory
            .read_obj(GuestAddress(address))
            .expect("it is in memory")
    }

    fn bytes(&self, address: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .expect("it is in memory");
        bytes
    }

    pub(crate) fn describe(&self, address: u64, descriptor: Descriptor) {
        self.store(address, RawDescriptor::from(descriptor));
    }

    fn ring(&mut self, queue: u16) -> &mut Ring {
        &mut self.rings[usize::from(queue % QUEUES)]
    }

    /// Where descriptor `slot` of a queue is.
    pub(crate) fn slot(&mut self, queue: u16, slot: u16) -> u64 {
        self.ring(queue).places[0].wrapping_add(DESCRIPTOR_BYTES * u64::from(slot))
    }

    /// Selects a queue and says where it is and how large.
    pub(crate) fn set_up(
        &mut self,
        device: &mut MmioTransport,
        queue: u16,
        entries: u16,
        places: Option<[u64; 3]>,
    ) {
        let ring = self.ring(queue);
        ring.entries = entries.max(1);
        if let Some(places) = places {
            ring.places = places;
        }
        let [descriptors, available, used] = ring.places;
        set(device, VIRTIO_MMIO_QUEUE_SEL, queue.into());
        set(device, VIRTIO_MMIO_QUEUE_NUM, entries.into());
        for (register, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, descriptors),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, available),
            (VIRTIO_MMIO_QUEUE_USED_LOW, used),
        ] {
            set(device, register, address as u32);
            set(device, register + 4, (address >> 32) as u32);
        }
        set(device, VIRTIO_MMIO_QUEUE_READY, 1);
    }

    /// Describes a request, by an indirect table if so. Returns its head and where each part is.
    pub(crate) fn lay_out(
        &mut self,
        queue: u16,
        parts: &[Part],
        indirect: bool,
    ) -> (u16, Vec<(u64, u64)>) {
        let count = parts.len() as u64;
        let table = self.place(if indirect {
            count * DESCRIPTOR_BYTES
        } else {
            0
        });
        let ring = *self.ring(queue);
        let mut places = Vec::new();
        for (number, part) in (0u16..).zip(parts) {
            let (len, mut flags) = match part {
                Part::Out(bytes) => (bytes.len() as u32, 0),
                Part::In(len) => (*len, VRING_DESC_F_WRITE),
            };
            let address = self.place(len.into());
            if let Part::Out(bytes) = part {
                let _ = self.memory.write_slice(bytes, GuestAddress(address));
            }
            let (slot, next) = if indirect {
                (table + DESCRIPTOR_BYTES * u64::from(number), number + 1)
            } else {
                let slot = self.take_slot(queue);
                (self.slot(queue, slot), (slot + 1) % ring.entries)
            };
            if u64::from(number) + 1 < count {
                flags |= VRING_DESC_F_NEXT;
            }
            self.describe(slot, Descriptor::new(address, len, flags as u16, next));
            places.push((slot, address));
        }
        let head = if indirect {
            let slot = self.take_slot(queue);
            let at = self.slot(queue, slot);
            let len = (count * DESCRIPTOR_BYTES) as u32;
            self.describe(
                at,
                Descriptor::new(table, len, VRING_DESC_F_INDIRECT as u16, 0),
            );
            slot
        } else {
            ring.next_descriptor % ring.entries
        };
        (head, places)
    }

    fn take_slot(&mut self, queue: u16) -> u16 {
        let ring = self.ring(queue);
        let slot = ring.next_descriptor % ring.entries;
        ring.next_descriptor = (slot + 1) % ring.entries;
        slot
    }

    /// Room for `len` bytes, which may be somebody else's too.
    fn place(&mut self, len: u64) -> u64 {
        // A table of descriptors is aligned.
        if self.next_data + len > DATA.end {
            self.next_data = DATA.start;
        }
        let place = self.next_data;
        self.next_data = (place + len).next_multiple_of(16).min(DATA.end);
        place
    }

    /// Puts `head` into the available ring and moves the ring's index on by `count`; asks to hear of what is used next.
    pub(crate) fn publish(&mut self, queue: u16, head: u16, count: u16) {
        let ring = self.ring(queue);
        let slot = u64::from(ring.next_available % ring.entries);
        ring.next_available = ring.next_available.wrapping_add(count);
        let Ring {
            places: [_, available, used],
            entries,
            next_available,
            ..
        } = *ring;
        self.store(available.wrapping_add(4 + 2 * slot), head);
        let index = self.memory.read_obj(GuestAddress(used.wrapping_add(2)));
        let index: u16 = index.unwrap_or(0);
        self.store(available.wrapping_add(4 + 2 * u64::from(entries)), index);
        self.store(available.wrapping_add(2), next_available);
    }

    /// As a driver that keeps the rules: forgets what there was, and starts the device with all features but those of `without`.
    ///
    /// # Panics
    ///
    /// If the device does not let it.
    pub(crate) fn start(&mut self, device: &mut MmioTransport, without: u64) {
        *self = Self::in_memory(self.memory.clone());
        let tables = [0; (QUEUES as u64 * QUEUE_BYTES) as usize];
        let zeroed = self.memory.write_slice(&tables, GuestAddress(TABLES));
        zeroed.expect("they are in memory");
        let offered = features(device);
        set(device, VIRTIO_MMIO_STATUS, 0);
        assert_eq!(
            get(device, VIRTIO_MMIO_STATUS),
            0,
            "the device is not reset"
        );
        negotiate(device, offered & !without);
        let negotiated = get(device, VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_FEATURES_OK;
        assert_ne!(negotiated, 0, "it refuses what it offers");
        for queue in 0..queues(device) {
            set(device, VIRTIO_MMIO_QUEUE_SEL, queue.into());
            let most = get(device, VIRTIO_MMIO_QUEUE_NUM_MAX) as u16;
            self.set_up(device, queue, most.min(64), None);
            assert_eq!(get(device, VIRTIO_MMIO_QUEUE_READY), 1, "queue {queue}");
        }
        let status = get(device, VIRTIO_MMIO_STATUS) | VIRTIO_CONFIG_S_DRIVER_OK;
        set(device, VIRTIO_MMIO_STATUS, status);
        assert_eq!(get(device, VIRTIO_MMIO_STATUS), status, "it does not start");
    }

    /// Makes a request available that keeps the rules.
    pub(crate) fn offer(&mut self, queue: u16, parts: &[Part]) -> Offered {
        let (head, places) = self.lay_out(queue, parts, false);
        let number = self.ring(queue).next_available;
        self.publish(queue, head, 1);
        let room = places
            .iter()
            .zip(parts)
            .filter_map(|((_, address), part)| match part {
                Part::In(len) => Some((*address, *len)),
                Part::Out(_) => None,
            });
        Offered {
            queue,
            number,
            head,
            room: room.collect(),
        }
    }

    /// What the device has made of a request, once it is used: the bytes written, and the room for them.
    ///
    /// # Panics
    ///
    /// If it was used in a way that breaks the rules.
    pub(crate) fn outcome(&mut self, offered: &Offered) -> Option<(u32, Vec<Vec<u8>>)> {
        let ring = *self.ring(offered.queue);
        let used: u16 = self.load(ring.places[2] + 2);
        // Used in the order in which they were made available, as all devices here do.
        if used.wrapping_sub(offered.number) as i16 <= 0 {
            return None;
        }
        let element = ring.places[2] + 4 + 8 * u64::from(offered.number % ring.entries);
        let [id, len]: [u32; 2] = self.load(element);
        assert_eq!(id, u32::from(offered.head), "another request was used");
        let room: u64 = offered.room.iter().map(|(_, len)| u64::from(*len)).sum();
        assert!(u64::from(len) <= room, "{len} bytes are written to {room}");
        let written = offered.room.iter().map(|(at, len)| self.bytes(*at, *len));
        Some((len, written.collect()))
    }
}

/// A request that was made available.
#[derive(Clone, Debug)]
pub(crate) struct Offered {
    queue: u16,
    number: u16,
    head: u16,
    room: Vec<(u64, u32)>,
}

pub(crate) fn get(device: &mut MmioTransport, register: u32) -> u32 {
    let mut word = [0; 4];
    device.read(register.into(), &mut word);
    u32::from_le_bytes(word)
}

pub(crate) fn set(device: &mut MmioTransport, register: u32, value: u32) {
    device.write(register.into(), &value.to_le_bytes());
}

/// The features that the device offers.
pub(crate) fn features(device: &mut MmioTransport) -> u64 {
    [1, 0].into_iter().fold(0, |features, half| {
        set(device, VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
        features << 32 | u64::from(get(device, VIRTIO_MMIO_DEVICE_FEATURES))
    })
}

/// How many queues the device has.
pub(crate) fn queues(device: &mut MmioTransport) -> u16 {
    (0..QUEUES)
        .take_while(|queue| {
            set(device, VIRTIO_MMIO_QUEUE_SEL, (*queue).into());
            get(device, VIRTIO_MMIO_QUEUE_NUM_MAX) != 0
        })
        .count() as u16
}

/// The handshake up to `FEATURES_OK`, from wherever the device is.
pub(crate) fn negotiate(device: &mut MmioTransport, features: u64) {
    let driver = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
    set(device, VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_ACKNOWLEDGE);
    set(device, VIRTIO_MMIO_STATUS, driver);
    for half in 0..2 {
        set(device, VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
        let word = (features >> (32 * half)) as u32;
        set(device, VIRTIO_MMIO_DRIVER_FEATURES, word);
    }
    set(
        device,
        VIRTIO_MMIO_STATUS,
        driver | VIRTIO_CONFIG_S_FEATURES_OK,
    );
}
