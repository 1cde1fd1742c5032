//! The program that an input is, for virtio devices.

use std::sync::Arc;

use devices::{
    BusDevice, Device,
    virtio::{MMIO_BYTES, MmioTransport},
};
use fuzz_harness::{Input, bounded};
use saved_state::Section;
use virtio_bindings::{virtio_config::VIRTIO_CONFIG_S_DRIVER_OK, virtio_mmio::*};
use virtio_queue::desc::split::Descriptor;

use crate::{
    HEAP_BYTES, Subject,
    guest::{self, Guest, Offered, Part, QUEUES, get, set},
    line::Line,
};

const INSTANCE: u32 = 3;

/// After so many rounds, a program that always makes another due has had its turn.
const MOST_ROUNDS: usize = 32;
/// And one that always finds something else to do.
const MOST_OPERATIONS: usize = 150;

/// The registers of virtio 1.3, 4.2.2, and some that are none.
const REGISTERS: [u32; 24] = [
    VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_DEVICE_ID,
    VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_INTERRUPT_ACK,
    VIRTIO_MMIO_STATUS,
    VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_CONFIG_GENERATION,
    VIRTIO_MMIO_CONFIG,
    0x0ac,
    0xffc,
];

/// A device and its guest.
pub struct Bench {
    pub(crate) guest: Guest,
    /// There is none while one gives way to the next.
    device: Option<MmioTransport>,
}

impl Bench {
    pub(crate) fn device(&mut self) -> &mut MmioTransport {
        self.device
            .as_mut()
            .expect("there is one between two operations")
    }

    /// Starts the device as a driver that keeps the rules, with all features but those of `without`.
    fn start(&mut self, without: u64) {
        let device = self
            .device
            .as_mut()
            .expect("there is one between two operations");
        self.guest.start(device, without);
    }

    /// Serves the queues that were notified, as the event loop would.
    pub(crate) fn serve_notified(&mut self) {
        for _ in 0..MOST_ROUNDS {
            let events = self.device().ioeventfds();
            let notified = events.filter(|(_, _, event)| event.read().is_ok());
            let notified: Vec<u32> = notified.map(|(_, queue, _)| queue).collect();
            if notified.is_empty() {
                return;
            }
            for queue in notified {
                self.device().serve(queue as usize);
            }
        }
    }

    /// Says where a queue is, and how large, whatever that comes to.
    fn set_up(&mut self, queue: u16, entries: u16, places: Option<[u64; 3]>) {
        let device = self
            .device
            .as_mut()
            .expect("there is one between two operations");
        self.guest.set_up(device, queue, entries, places);
    }

    pub(crate) fn notify(&mut self, queue: u16) {
        set(self.device(), VIRTIO_MMIO_QUEUE_NOTIFY, queue.into());
        self.serve_notified();
    }

    /// Makes a request that keeps the rules, and has the queue served.
    pub(crate) fn offer(&mut self, queue: u16, parts: &[Part]) -> Offered {
        let offered = self.guest.offer(queue, parts);
        self.notify(queue);
        offered
    }

    /// Has a request served that needs nothing else: how many bytes were written, and the room for them.
    ///
    /// # Panics
    ///
    /// If it is not served.
    pub(crate) fn request(&mut self, queue: u16, parts: &[Part]) -> (u32, Vec<Vec<u8>>) {
        let offered = self.offer(queue, parts);
        // What that has begun, if it was to wait for anything.
        self.device().serve(queue.into());
        let outcome = self.guest.outcome(&offered);
        assert_eq!(
            get(self.device(), VIRTIO_MMIO_STATUS) & 0x40,
            0,
            "it needs a reset"
        );
        outcome.expect("a request that keeps the rules is not served")
    }
}

/// Runs the program `input` on a device of `S`.
pub fn attack<S: Subject>(input: &[u8]) {
    // What the process has once is not the input's.
    drop(S::memory());
    bounded(HEAP_BYTES, || {
        let mut input = Input::new(input);
        let subject = S::new(&mut input);
        let mut attack = Attack::new(subject);
        for _ in 0..MOST_OPERATIONS {
            let Some(operation) = input.operation() else {
                break;
            };
            attack.perform(operation, &mut input);
        }
        attack.end();
    });
}

/// Programs to begin with: a driver that keeps the rules makes a few requests of a queue, with what else may come between them.
pub fn seeds() -> Vec<Vec<u8>> {
    let between: [&[u8]; 4] = [&[], &[17], &[15, 0, 0, 1, 0], &[18, 0, 40, 0, 230]];
    // What is behind the device, for those who have a choice, and the queue.
    let first = [(0, 0), (0, 1), (0, 2), (2, 0), (6, 3), (12, 0)].into_iter();
    let programs = first.flat_map(|(behind, queue)| {
        between.into_iter().map(move |between| {
            let mut program = vec![behind, 4, 0];
            for value in 0..4 {
                program.extend([0, queue, value, value, 1, 1]);
                // What else the request asks for, and that nothing in it is changed.
                program.extend([0; 12]);
                program.extend(between);
                program.extend([14, queue]);
            }
            program
        })
    });
    // A buffer that a device keeps, whose queue begins anew before it is asked for; then it is saved.
    let anew = [0, 4, 0, 0, 2, 0, 0, 6, 2, 6, 0, 1, 15, 2, 14, 2, 17];
    programs.chain([anew.to_vec()]).collect()
}

struct Attack<S> {
    subject: S,
    bench: Bench,
}

fn transport<S: Subject>(subject: &mut S, guest: &Guest) -> MmioTransport {
    let memory = guest.memory.clone();
    MmioTransport::new(subject.device(), memory, Arc::new(Line)).expect("there are eventfds")
}

impl<S: Subject> Attack<S> {
    fn new(mut subject: S) -> Self {
        let guest = Guest::in_memory(S::memory());
        let device = Some(transport(&mut subject, &guest));
        Self {
            subject,
            bench: Bench { guest, device },
        }
    }

    fn device(&mut self) -> &mut MmioTransport {
        self.bench.device()
    }

    fn perform(&mut self, operation: u8, input: &mut Input<'_>) {
        match operation % 20 {
            0..4 => self.request(input),
            4 => self.begin(input),
            5 => self.negotiate(input),
            6 => self.set_up(input),
            7 => self.publish(input),
            8 => self.describe(input),
            9 => self.write_memory(input),
            10 | 11 => self.write_register(input),
            12 => self.read(input),
            13 => self.notify(input),
            14 => {
                let queue = input.byte() % 5;
                self.device().serve(queue.into());
            }
            15 | 16 => self.subject.outside(self.bench.device(), input),
            17 => self.save_and_restore(),
            18 => self.forge(input),
            _ => self.hold(),
        }
    }

    /// A driver begins as it should, whatever it does later.
    fn begin(&mut self, input: &mut Input<'_>) {
        let without = match input.byte() {
            0..128 => 0,
            _ => input.long() & !(1 << 32),
        };
        self.bench.start(without);
    }

    fn negotiate(&mut self, input: &mut Input<'_>) {
        let offered = guest::features(self.device());
        let features = match input.byte() % 4 {
            0 => offered,
            1 => offered & input.long(),
            2 => offered ^ 1 << (input.byte() % 64),
            _ => input.long(),
        };
        guest::negotiate(self.device(), features);
        if input.flag() {
            let status = get(self.device(), VIRTIO_MMIO_STATUS);
            set(
                self.device(),
                VIRTIO_MMIO_STATUS,
                status | VIRTIO_CONFIG_S_DRIVER_OK,
            );
        }
    }

    fn set_up(&mut self, input: &mut Input<'_>) {
        let queue = u16::from(input.byte() % QUEUES as u8);
        let entries = match input.byte() {
            shift @ 0..16 => 1 << shift,
            _ => input.half(),
        };
        let places = input.flag().then(|| {
            let mut aligned = |to: u64| self.bench.guest.address(input) & !(to - 1);
            [aligned(16), aligned(2), aligned(4)]
        });
        if input.flag() {
            set(self.device(), VIRTIO_MMIO_QUEUE_SEL, queue.into());
            set(self.device(), VIRTIO_MMIO_QUEUE_READY, 0);
        }
        self.bench.set_up(queue, entries, places);
    }

    /// A request that is right but for what is changed in it afterwards.
    fn request(&mut self, input: &mut Input<'_>) {
        let queue = u16::from(input.byte() % QUEUES as u8);
        let parts = self.subject.compose(queue, input);
        let how = input.byte();
        let (head, slots) = self.bench.guest.lay_out(queue, &parts, how & 1 != 0);
        if how & 2 != 0 && !slots.is_empty() {
            let (slot, address) = slots[usize::from(input.byte()) % slots.len()];
            let changed = match input.byte() % 3 {
                0 => Descriptor::new(
                    self.bench.guest.address(input),
                    512,
                    input.half(),
                    input.half(),
                ),
                1 => Descriptor::new(address, input.word(), input.half(), input.half()),
                _ => Descriptor::new(
                    address,
                    input.half().into(),
                    input.half() % 8,
                    input.half() % 64,
                ),
            };
            self.bench.guest.describe(slot, changed);
        }
        self.bench.guest.publish(queue, head, 1);
        if how & 4 == 0 {
            set(self.device(), VIRTIO_MMIO_QUEUE_NOTIFY, queue.into());
            self.bench.serve_notified();
        }
    }

    fn publish(&mut self, input: &mut Input<'_>) {
        let queue = u16::from(input.byte() % QUEUES as u8);
        let (head, count) = (input.half() % 300, input.byte());
        let count = if count < 250 {
            count.into()
        } else {
            input.half()
        };
        self.bench.guest.publish(queue, head, count);
    }

    fn describe(&mut self, input: &mut Input<'_>) {
        let queue = u16::from(input.byte() % QUEUES as u8);
        let slot = self.bench.guest.slot(queue, u16::from(input.byte()));
        let address = self.bench.guest.address(input);
        let len = if input.flag() {
            input.word()
        } else {
            input.half().into()
        };
        let (flags, next) = (input.half(), input.half() % 300);
        self.bench
            .guest
            .describe(slot, Descriptor::new(address, len, flags & 0xff, next));
    }

    fn write_memory(&mut self, input: &mut Input<'_>) {
        let address = self.bench.guest.address(input);
        let len = usize::from(input.byte() % 32);
        for (byte, at) in input.bytes(len).iter().zip(0..) {
            self.bench.guest.store(address.wrapping_add(at), *byte);
        }
    }

    fn offset(input: &mut Input<'_>) -> u32 {
        let register = input.one_of(&REGISTERS);
        match input.byte() {
            0..192 => register,
            more => (register + u32::from(more % 64)) % MMIO_BYTES as u32,
        }
    }

    fn write_register(&mut self, input: &mut Input<'_>) {
        let offset = Self::offset(input);
        let value = match input.byte() {
            small @ 0..128 => small.into(),
            _ => input.long(),
        };
        let width = input
            .one_of(&[4usize, 4, 4, 1, 2, 8])
            .min((MMIO_BYTES as u32 - offset) as usize);
        self.device()
            .write(offset.into(), &value.to_le_bytes()[..width]);
    }

    fn read(&mut self, input: &mut Input<'_>) {
        let offset = Self::offset(input);
        let width = input
            .one_of(&[4usize, 1, 2, 8])
            .min((MMIO_BYTES as u32 - offset) as usize);
        let mut found = [[0; 8]; 2];
        for bytes in &mut found {
            self.device().read(offset.into(), &mut bytes[..width]);
        }
        assert_eq!(found[0], found[1], "reading changes what is read");
    }

    fn notify(&mut self, input: &mut Input<'_>) {
        self.bench.notify(input.byte().into());
    }

    /// The machine is held, and goes on.
    fn hold(&mut self) {
        let device = self.device();
        device.drain();
        device.resume();
    }

    fn save(&mut self) -> Section {
        self.device().settle();
        self.device()
            .save(INSTANCE)
            .expect("a device can always be saved")
    }

    /// A fresh device; the one that was is gone.
    fn renew(&mut self) -> &mut MmioTransport {
        self.drop_device();
        let device = transport(&mut self.subject, &self.bench.guest);
        self.bench.device.insert(device)
    }

    fn drop_device(&mut self) {
        self.device().settle();
        self.bench.device = None;
    }

    fn save_and_restore(&mut self) {
        let saved = self.save();
        let device = self.renew();
        device.restore(&saved).expect("what was saved restores");
        let again = device.save(INSTANCE).expect("a device can always be saved");
        assert_eq!(again, saved, "it restores to something else");
        device.resume();
    }

    /// What was saved is changed by somebody who can make it look whole.
    fn forge(&mut self, input: &mut Input<'_>) {
        let mut saved = self.save();
        for _ in 0..=input.byte() % 8 {
            let (at, byte) = (usize::from(input.half()), input.byte());
            let len = saved.payload.len();
            match byte {
                0..224 => saved.payload[at % len] = byte,
                224..240 => saved.payload[at % len] ^= 1 << (byte % 8),
                240..248 => saved.payload.truncate((at % len).max(1)),
                248..252 => saved.payload.extend(input.bytes(at % 64)),
                _ => saved.version = (at % 4) as u16,
            }
        }
        let device = self.renew();
        if device.restore(&saved).is_err() {
            self.renew();
            return;
        }
        device.resume();
        self.save_and_restore();
    }

    /// Whatever has happened, a driver that keeps the rules is served.
    fn end(mut self) {
        self.bench.start(0);
        self.subject.prove(&mut self.bench);
        self.drop_device();
        self.subject.finish();
    }
}
