//! A driver for tests: well-behaved unless told otherwise.

use std::sync::Arc;

use memory::GuestMemory;
use virtio_bindings::{
    virtio_config::*,
    virtio_mmio::*,
    virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE},
};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{MmioTransport, VirtioDevice};
use crate::{BusDevice, conformance::Line, sync::lock};

/// Bytes of guest memory in the tests.
pub(crate) const MEMORY_BYTES: u64 = 1 << 20;
pub(crate) const ENTRIES: u16 = 64;
pub(crate) const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

/// Where the driver puts the three parts of its first queue; those of the next follow.
pub(crate) const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
pub(crate) const QUEUE_BYTES: u64 = 0x3000;

/// Where the buffers of the first queue begin and when it begins with them again, and the same for those
/// of each further queue.
const FIRST_DATA: (u64, u64) = (0x1_0000, 0x8_0000);
const FURTHER_DATA: u64 = 0xa_0000;
const FURTHER_BYTES: u64 = 0x3_0000;

/// Guest-physical addresses of fields of the first queue's rings (virtio 1.3, 2.7.6 and 2.7.8).
pub(crate) const AVAILABLE_INDEX: u64 = AVAILABLE + 2;
pub(crate) const USED_EVENT: u64 = AVAILABLE + 4 + 2 * ENTRIES as u64;
pub(crate) const AVAILABLE_EVENT: u64 = USED + 4 + 8 * ENTRIES as u64;

pub(crate) fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES as usize)]).unwrap()
}

pub(crate) fn transport(
    device: impl VirtioDevice + 'static,
    memory: &GuestMemory,
) -> (MmioTransport, Arc<Line>) {
    let line = Arc::new(Line::default());
    let transport = MmioTransport::new(Box::new(device), memory.clone(), line.clone()).unwrap();
    (transport, line)
}

pub(crate) fn get(transport: &mut MmioTransport, register: u32) -> u32 {
    let mut word = [0; 4];
    transport.read(register.into(), &mut word);
    u32::from_le_bytes(word)
}

pub(crate) fn set(transport: &mut MmioTransport, register: u32, value: u32) {
    transport.write(register.into(), &value.to_le_bytes());
}

/// Serves the queues that were notified, as the event loop would.
pub(crate) fn serve_notified(transport: &mut MmioTransport) {
    loop {
        let notified: Vec<u32> = transport
            .ioeventfds()
            .filter(|(_, _, event)| event.read().is_ok())
            .map(|(_, index, _)| index)
            .collect();
        if notified.is_empty() {
            return;
        }
        for index in notified {
            lock(transport.worker()).process(index as usize);
        }
    }
}

/// The handshake up to `FEATURES_OK`.
pub(crate) fn negotiate(transport: &mut MmioTransport, features: u64) -> bool {
    let status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
    set(transport, VIRTIO_MMIO_STATUS, 0);
    set(transport, VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_ACKNOWLEDGE);
    set(transport, VIRTIO_MMIO_STATUS, status);
    for half in 0..2 {
        set(transport, VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
        let features = (features >> (32 * half)) as u32;
        set(transport, VIRTIO_MMIO_DRIVER_FEATURES, features);
    }
    set(
        transport,
        VIRTIO_MMIO_STATUS,
        status | VIRTIO_CONFIG_S_FEATURES_OK,
    );
    get(transport, VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_FEATURES_OK != 0
}

/// Sets `DRIVER_OK`, after [`Driver::prepare`].
pub(crate) fn begin(transport: &mut MmioTransport) {
    let status = get(transport, VIRTIO_MMIO_STATUS);
    let begun = status | VIRTIO_CONFIG_S_DRIVER_OK;
    set(transport, VIRTIO_MMIO_STATUS, begun);
}

/// A part of a request.
#[derive(Clone, Debug)]
pub(crate) enum Part<'a> {
    /// Bytes for the device to read.
    Out(&'a [u8]),
    /// Room for the device to write, in bytes.
    In(usize),
}

/// The driver of one queue of a device.
pub(crate) struct Driver<'a> {
    memory: &'a GuestMemory,
    queue: u32,
    next_descriptor: u16,
    next_data: u64,
}

impl<'a> Driver<'a> {
    /// Resets the device, forgets what was in memory, and starts the device with `features`; returns the
    /// driver of its first queue.
    pub(crate) fn start(
        transport: &mut MmioTransport,
        memory: &'a GuestMemory,
        features: u64,
    ) -> Self {
        let driver = Self::prepare(transport, memory, features);
        begin(transport);
        driver
    }

    /// As [`Driver::start`], but short of `DRIVER_OK`.
    pub(crate) fn prepare(
        transport: &mut MmioTransport,
        memory: &'a GuestMemory,
        features: u64,
    ) -> Self {
        assert!(negotiate(transport, features));
        let zeros = vec![0; MEMORY_BYTES as usize];
        memory.write_slice(&zeros, GuestAddress(0)).unwrap();
        for queue in 0.. {
            set(transport, VIRTIO_MMIO_QUEUE_SEL, queue);
            if get(transport, VIRTIO_MMIO_QUEUE_NUM_MAX) == 0 {
                break;
            }
            set(transport, VIRTIO_MMIO_QUEUE_NUM, ENTRIES.into());
            for (register, address) in [
                (VIRTIO_MMIO_QUEUE_DESC_LOW, DESCRIPTORS),
                (VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAILABLE),
                (VIRTIO_MMIO_QUEUE_USED_LOW, USED),
            ] {
                let address = address + u64::from(queue) * QUEUE_BYTES;
                set(transport, register, address as u32);
                set(transport, register + 4, (address >> 32) as u32);
            }
            set(transport, VIRTIO_MMIO_QUEUE_READY, 1);
            assert_eq!(get(transport, VIRTIO_MMIO_QUEUE_READY), 1);
        }
        set(transport, VIRTIO_MMIO_QUEUE_SEL, 0);
        Self {
            memory,
            queue: 0,
            next_descriptor: 0,
            next_data: FIRST_DATA.0,
        }
    }

    /// The driver of another queue of the same device.
    pub(crate) fn of_queue(&self, queue: u32) -> Self {
        let mut driver = Self {
            queue,
            next_descriptor: 0,
            next_data: 0,
            ..*self
        };
        driver.next_data = driver.data().0;
        driver
    }

    /// Where the buffers begin, and when they begin again.
    fn data(&self) -> (u64, u64) {
        let Some(further) = self.queue.checked_sub(1) else {
            return FIRST_DATA;
        };
        let begin = FURTHER_DATA + u64::from(further) * FURTHER_BYTES;
        (begin, begin + FURTHER_BYTES / 2)
    }

    /// Where what is at `address` for the first queue is for this one.
    fn place(&self, address: u64) -> u64 {
        address + u64::from(self.queue) * QUEUE_BYTES
    }

    /// Makes a request available without a notification; returns where its parts are.
    pub(crate) fn offer(&mut self, parts: &[Part<'_>]) -> Vec<GuestAddress> {
        let head = self.next_descriptor;
        let mut places = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            let place = GuestAddress(self.next_data);
            let (len, mut flags) = match part {
                Part::Out(bytes) => {
                    self.memory.write_slice(bytes, place).unwrap();
                    (bytes.len(), 0)
                }
                Part::In(len) => (*len, VRING_DESC_F_WRITE),
            };
            if index + 1 < parts.len() {
                flags |= VRING_DESC_F_NEXT;
            }
            let slot = self.next_descriptor;
            self.next_descriptor = (slot + 1) % ENTRIES;
            let next = self.next_descriptor;
            self.describe(slot, place.0, len as u32, flags, next);
            places.push(place);
            self.next_data += len as u64;
        }
        let (begin, full) = self.data();
        if self.next_data > full {
            self.next_data = begin;
        }
        self.publish(head);
        places
    }

    pub(crate) fn describe(&self, slot: u16, address: u64, len: u32, flags: u32, next: u16) {
        let descriptor = Descriptor::new(address, len, flags as u16, next);
        self.store(
            self.place(DESCRIPTORS) + 16 * u64::from(slot),
            RawDescriptor::from(descriptor),
        );
    }

    /// Puts `head` into the available ring, and asks to be interrupted when it is used.
    pub(crate) fn publish(&self, head: u16) {
        let index: u16 = self.load(self.place(AVAILABLE_INDEX));
        let slot = self.place(AVAILABLE) + 4 + 2 * u64::from(index % ENTRIES);
        self.store(slot, head);
        self.store(self.place(USED_EVENT), self.used());
        self.store(self.place(AVAILABLE_INDEX), index.wrapping_add(1));
    }

    /// How many requests the device has used so far.
    pub(crate) fn used(&self) -> u16 {
        self.load(self.place(USED) + 2)
    }

    /// Bytes the device says it has written for the `nth` request.
    pub(crate) fn used_len(&self, nth: u16) -> u32 {
        self.load(self.place(USED) + 4 + 8 * u64::from(nth % ENTRIES) + 4)
    }

    pub(crate) fn load<T: ByteValued>(&self, address: u64) -> T {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    pub(crate) fn store<T: ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    pub(crate) fn bytes(&self, place: GuestAddress, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, place).unwrap();
        bytes
    }

    /// Notifies the device and has it serve.
    pub(crate) fn notify(&self, transport: &mut MmioTransport) {
        set(transport, VIRTIO_MMIO_QUEUE_NOTIFY, self.queue);
        serve_notified(transport);
    }

    /// Has a request served; returns the used length and what is in the parts for the device to write.
    pub(crate) fn request(
        &mut self,
        transport: &mut MmioTransport,
        parts: &[Part<'_>],
    ) -> (u32, Vec<Vec<u8>>) {
        let before = self.used();
        let places = self.offer(parts);
        self.notify(transport);
        assert_eq!(self.used(), before.wrapping_add(1), "not served");
        let written = parts
            .iter()
            .zip(places)
            .filter_map(|(part, place)| match part {
                Part::In(len) => Some(self.bytes(place, *len)),
                Part::Out(_) => None,
            });
        (self.used_len(before), written.collect())
    }
}
