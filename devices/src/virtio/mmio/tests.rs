//! The transport, tested with the entropy device on it.

use std::sync::mpsc;

use proptest::{collection::vec, prelude::*};
use rustix::thread::{Pid, gettid};
use virtio_bindings::{virtio_config::*, virtio_mmio::*, virtio_ring::*};
use vm_memory::{Bytes, GuestAddress};

use super::{state::acceptable, *};
use crate::{
    BusDevice,
    conformance::{Line, PATIENCE},
    virtio::{
        driver::{
            self, AVAILABLE_EVENT, AVAILABLE_INDEX, DESCRIPTORS, Driver, ENTRIES, MEMORY_BYTES,
            Part, USED_EVENT, begin, get, negotiate, serve_notified, set,
        },
        entropy::Entropy,
    },
};

const RUNNING: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK;

fn machine() -> (MmioTransport, GuestMemory, Arc<Line>) {
    let memory = driver::memory();
    let (device, line) = driver::transport(Entropy::new(), &memory);
    (device, memory, line)
}

/// A device whose driver has just set `DRIVER_OK`.
fn running() -> (MmioTransport, GuestMemory, Arc<Line>) {
    let (mut device, memory, line) = machine();
    Driver::start(&mut device, &memory, VERSION_1);
    assert_eq!(get(&mut device, VIRTIO_MMIO_STATUS), RUNNING);
    (device, memory, line)
}

fn needs_reset(device: &mut MmioTransport) -> bool {
    get(device, VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET != 0
}

/// Resets the device and has a request served.
fn works(device: &mut MmioTransport, memory: &GuestMemory) {
    let mut driver = Driver::start(device, memory, VERSION_1 | EVENT_IDX);
    let (len, random) = driver.request(device, &[Part::In(64)]);
    assert_eq!(len, 64);
    assert_ne!(random, [vec![0; 64]]);
    assert!(!needs_reset(device));
}

#[test]
fn a_driver_finds_the_device_and_its_limits() {
    let (mut device, _memory, _line) = machine();
    assert_eq!(get(&mut device, VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(get(&mut device, VIRTIO_MMIO_VERSION), 2);
    assert_eq!(get(&mut device, VIRTIO_MMIO_DEVICE_ID), 4);
    let mut features = 0;
    for (half, shift) in [(0, 0), (1, 32), (2, 0)] {
        set(&mut device, VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
        features |= u64::from(get(&mut device, VIRTIO_MMIO_DEVICE_FEATURES)) << shift;
    }
    assert_eq!(features, VERSION_1 | EVENT_IDX | INDIRECT_DESC);
    assert_eq!(get(&mut device, VIRTIO_MMIO_QUEUE_NUM_MAX), 64);
    set(&mut device, VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(get(&mut device, VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
    assert_eq!(get(&mut device, VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
}

#[test]
fn control_registers_are_accessed_in_32_bits() {
    let (mut device, _memory, _line) = machine();
    for width in [1, 2, 8] {
        let mut data = vec![0xff; width];
        device.read(0, &mut data);
        assert_eq!(data, vec![0; width]);
        device.write(VIRTIO_MMIO_STATUS.into(), &vec![1; width]);
        assert_eq!(get(&mut device, VIRTIO_MMIO_STATUS), 0);
    }
    // An unaligned address is no register.
    assert_eq!(get(&mut device, 2), 0);
}

#[test]
fn features_that_are_not_offered_or_lack_version_1_are_refused() {
    let (mut device, _memory, _line) = machine();
    assert!(negotiate(&mut device, VERSION_1));
    assert!(negotiate(
        &mut device,
        VERSION_1 | EVENT_IDX | INDIRECT_DESC
    ));
    assert!(!negotiate(&mut device, EVENT_IDX));
    assert!(!negotiate(&mut device, VERSION_1 | 1));
    assert!(!negotiate(&mut device, VERSION_1 | 1 << 63));
    assert!(!needs_reset(&mut device));
}

#[test]
fn features_stay_as_they_were_negotiated() {
    let (mut device, _memory, _line) = machine();
    assert!(negotiate(&mut device, VERSION_1));
    set(&mut device, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    set(&mut device, VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    assert_eq!(device.registers.driver_features, VERSION_1);
}

#[test]
fn the_status_only_grows_until_a_reset() {
    for forbidden in [
        // Going back.
        VIRTIO_CONFIG_S_ACKNOWLEDGE,
        // Running without negotiated features.
        VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_DRIVER_OK,
    ] {
        let (mut device, memory, line) = machine();
        set(&mut device, VIRTIO_MMIO_STATUS, 1);
        set(&mut device, VIRTIO_MMIO_STATUS, 3);
        set(&mut device, VIRTIO_MMIO_STATUS, forbidden);
        let status = get(&mut device, VIRTIO_MMIO_STATUS);
        assert_eq!(status, 3 | VIRTIO_CONFIG_S_NEEDS_RESET);
        assert_eq!(line.edges(), 0, "no interrupt before DRIVER_OK");
        works(&mut device, &memory);
    }
}

#[test]
fn a_queue_that_cannot_be_is_never_ready() {
    let end = MEMORY_BYTES as u32;
    for (register, value) in [
        (VIRTIO_MMIO_QUEUE_NUM, 0),
        (VIRTIO_MMIO_QUEUE_NUM, 3),
        (VIRTIO_MMIO_QUEUE_NUM, 128),
        (VIRTIO_MMIO_QUEUE_NUM, 0x1_0010),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1008),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2001),
        (VIRTIO_MMIO_QUEUE_USED_LOW, 0x3002),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, end - 0x10),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, end),
        (VIRTIO_MMIO_QUEUE_USED_LOW, end - 4),
        (VIRTIO_MMIO_QUEUE_USED_HIGH, 1),
        (VIRTIO_MMIO_QUEUE_DESC_HIGH, u32::MAX),
    ] {
        let (mut device, _memory, _line) = machine();
        assert!(negotiate(&mut device, VERSION_1));
        set(&mut device, VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000);
        set(&mut device, VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000);
        set(&mut device, VIRTIO_MMIO_QUEUE_USED_LOW, 0x3000);
        set(&mut device, register, value);
        set(&mut device, VIRTIO_MMIO_QUEUE_READY, 1);
        assert!(needs_reset(&mut device), "{register:#x} = {value:#x}");
    }
}

#[test]
fn a_queue_is_not_ready_before_the_features_are_negotiated() {
    let (mut device, _memory, _line) = machine();
    set(&mut device, VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000);
    set(&mut device, VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000);
    set(&mut device, VIRTIO_MMIO_QUEUE_USED_LOW, 0x3000);
    set(&mut device, VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(get(&mut device, VIRTIO_MMIO_QUEUE_READY), 0);
    assert!(needs_reset(&mut device));
}

#[test]
fn a_ready_queue_does_not_move() {
    let (mut device, _memory, line) = running();
    let before = device.save(0).unwrap();
    assert_eq!(line.edges(), 0);
    set(&mut device, VIRTIO_MMIO_QUEUE_DESC_LOW, 0x4000);
    assert!(needs_reset(&mut device));
    assert_eq!(
        get(&mut device, VIRTIO_MMIO_INTERRUPT_STATUS),
        VIRTIO_MMIO_INT_CONFIG
    );
    assert_eq!(line.edges(), 1);
    device.shared.set_needs_reset(false);
    device.shared.set_interrupt_status(0);
    assert_eq!(device.save(0).unwrap(), before);
}

#[test]
fn a_queue_that_is_made_ready_again_begins_again_and_can_be_saved() {
    let (mut device, memory, _line) = machine();
    let mut driver = Driver::start(&mut device, &memory, VERSION_1);
    driver.request(&mut device, &[Part::In(8)]);
    driver.request(&mut device, &[Part::In(8)]);
    // Popped and never used: more is in use than the queue will have entries.
    let queue = |device: &mut MmioTransport, next_avail| {
        let mut worker = lock(&device.worker);
        worker.queues[0].set_next_avail(next_avail);
    };
    queue(&mut device, 7);
    set(&mut device, VIRTIO_MMIO_QUEUE_READY, 0);
    set(&mut device, VIRTIO_MMIO_QUEUE_NUM, 4);
    memory
        .write_obj(0u32, GuestAddress(AVAILABLE_INDEX))
        .unwrap();
    set(&mut device, VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(get(&mut device, VIRTIO_MMIO_QUEUE_READY), 1);
    let section = device.save(0).unwrap();
    machine().0.restore(&section).unwrap();

    driver.describe(1, 0x1_0000, 8, VRING_DESC_F_WRITE, 0);
    memory
        .write_obj(1u16, GuestAddress(AVAILABLE_INDEX + 2))
        .unwrap();
    memory
        .write_obj(1u16, GuestAddress(AVAILABLE_INDEX))
        .unwrap();
    driver.notify(&mut device);
    assert_eq!(driver.used(), 1);
    assert!(!needs_reset(&mut device));
}

#[test]
fn a_reset_forgets_everything() {
    let (mut device, memory, _line) = machine();
    let fresh = device.save(0).unwrap();
    works(&mut device, &memory);
    assert_ne!(get(&mut device, VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    set(&mut device, VIRTIO_MMIO_STATUS, 0);
    assert_eq!(device.save(0).unwrap(), fresh);
    // Nor is a queue served that was notified before.
    set(&mut device, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    serve_notified(&mut device);
}

#[test]
fn interrupts_are_acknowledged_by_cause() {
    let (mut device, memory, line) = machine();
    works(&mut device, &memory);
    let causes = get(&mut device, VIRTIO_MMIO_INTERRUPT_STATUS);
    assert_eq!((causes, line.edges()), (VIRTIO_MMIO_INT_VRING, 1));
    set(
        &mut device,
        VIRTIO_MMIO_INTERRUPT_ACK,
        VIRTIO_MMIO_INT_CONFIG,
    );
    device.resume();
    assert_eq!(line.edges(), 2, "what is pending is sent again");
    set(&mut device, VIRTIO_MMIO_INTERRUPT_ACK, causes);
    assert_eq!(get(&mut device, VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    device.resume();
    assert_eq!(line.edges(), 2);
}

#[test]
fn with_event_index_the_driver_says_when_it_wants_an_interrupt() {
    let (mut device, memory, line) = machine();
    let mut driver = Driver::start(&mut device, &memory, VERSION_1 | EVENT_IDX);
    for _ in 0..3 {
        driver.offer(&[Part::In(8)]);
    }
    // After the third buffer that is used.
    driver.store(USED_EVENT, 2u16);
    driver.store(AVAILABLE_INDEX, 2u16);
    lock(device.worker()).process(0);
    assert_eq!((driver.used(), line.edges()), (2, 0));
    driver.store(AVAILABLE_INDEX, 3u16);
    lock(device.worker()).process(0);
    assert_eq!((driver.used(), line.edges()), (3, 1));
    // The device says that it wants to hear of the next one.
    assert_eq!(driver.load::<u16>(AVAILABLE_EVENT), 3);
}

#[test]
fn a_notification_may_bypass_the_bus() {
    let (mut device, _memory, _line) = machine();
    let ways: Vec<_> = device.ioeventfds().map(|(o, i, _)| (o, i)).collect();
    assert_eq!(ways, [(0x50, 0)]);
    set(&mut device, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    set(&mut device, VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    set(&mut device, VIRTIO_MMIO_QUEUE_NOTIFY, u32::MAX);
    let signals: Vec<_> = device
        .ioeventfds()
        .map(|(_, _, e)| e.read().unwrap())
        .collect();
    assert_eq!(signals, [1]);
}

#[test]
fn a_driver_that_is_restored_between_two_reads_finds_another_generation() {
    let (mut device, memory, _line) = running();
    let section = device.save(0).unwrap();
    let restored = |()| {
        let mut device = driver::transport(Entropy::new(), &memory).0;
        device.restore(&section).unwrap();
        get(&mut device, VIRTIO_MMIO_CONFIG_GENERATION)
    };
    let before = get(&mut device, VIRTIO_MMIO_CONFIG_GENERATION);
    let [once, again] = [(); 2].map(restored);
    assert!(once != before && again != before && again != once);
}

/// Whether a thread of this process waits for something.
fn is_asleep(thread: Pid) -> bool {
    let path = format!("/proc/self/task/{}/stat", thread.as_raw_nonzero());
    // Behind the name, which may have anything in it.
    std::fs::read_to_string(path)
        .is_ok_and(|stat| stat.rsplit(") ").next().unwrap().starts_with('S'))
}

#[test]
fn a_vcpu_does_not_wait_with_who_tells_of_a_change() {
    let (mut device, _memory, _line) = machine();
    let (worker, host) = (Arc::clone(device.worker()), device.host_side());
    let (begins, begun) = mpsc::channel();
    let (ends, ended) = mpsc::channel();
    // As while a round takes long.
    let round = lock(&worker);
    std::thread::scope(|scope| {
        let telling = scope.spawn(move || {
            begins.send(gettid()).unwrap();
            host.refresh_config();
        });
        let thread = begun.recv().unwrap();
        while !is_asleep(thread) && !telling.is_finished() {
            std::thread::yield_now();
        }
        scope.spawn(move || {
            get(&mut device, VIRTIO_MMIO_INTERRUPT_STATUS);
            set(&mut device, VIRTIO_MMIO_INTERRUPT_ACK, 0);
            get(&mut device, VIRTIO_MMIO_CONFIG);
            ends.send(()).unwrap();
        });
        let vcpu = ended.recv_timeout(PATIENCE);
        let waits = !telling.is_finished();
        // Or a failure would wait for itself.
        drop(round);
        assert!(waits, "nobody was waited with");
        assert!(vcpu.is_ok(), "it waits for the round");
    });
}

#[test]
fn a_round_that_ends_at_its_bound_asks_for_the_next() {
    let (mut device, memory, _line) = machine();
    let mut driver = Driver::start(&mut device, &memory, VERSION_1);
    serve_notified(&mut device);
    for _ in 0..ENTRIES {
        driver.offer(&[Part::In(1)]);
    }
    // On a host that is very busy, one may end at its time instead, and there are more.
    let mut asks = false;
    while driver.used() < ENTRIES {
        asks |= lock(device.worker()).process(0);
    }
    assert!(asks);
    let signal = |device: &MmioTransport| {
        let (_, _, event) = device.ioeventfds().next().unwrap();
        event.read().is_ok()
    };
    assert!(signal(&device));
    assert!(!lock(device.worker()).process(0));
    assert!(!signal(&device));
}

#[test]
fn what_is_notified_before_the_driver_is_ready_is_served_then() {
    let (mut device, memory, _line) = machine();
    let mut driver = Driver::prepare(&mut device, &memory, VERSION_1);
    driver.offer(&[Part::In(1)]);
    driver.notify(&mut device);
    assert_eq!(driver.used(), 0);
    begin(&mut device);
    serve_notified(&mut device);
    assert_eq!(driver.used(), 1);
}

const WRITE: u32 = VRING_DESC_F_WRITE;
const NEXT: u32 = VRING_DESC_F_NEXT;
const INDIRECT: u32 = VRING_DESC_F_INDIRECT;
const TABLE: u64 = 0x9000;

/// Descriptors as (slot, address, len, flags, next), of which slot 0 is made available.
type Chain = &'static [(u16, u64, u32, u32, u16)];

const BROKEN: &[(&str, Chain)] = &[
    ("loops", &[(0, TABLE, 1, WRITE | NEXT, 0)]),
    ("goes on outside", &[(0, TABLE, 1, WRITE | NEXT, ENTRIES)]),
    ("is outside of memory", &[(0, MEMORY_BYTES, 1, WRITE, 0)]),
    ("leaves memory", &[(0, MEMORY_BYTES - 1, 2, WRITE, 0)]),
    ("wraps around", &[(0, u64::MAX, u32::MAX, WRITE, 0)]),
    (
        "is read after it is written",
        &[(0, TABLE, 1, WRITE | NEXT, 1), (1, TABLE, 1, 0, 0)],
    ),
    (
        "is longer than 4 GiB",
        &[(0, TABLE, u32::MAX, NEXT, 1), (1, TABLE, u32::MAX, NEXT, 0)],
    ),
    ("is an empty table", &[(0, TABLE, 0, INDIRECT, 0)]),
    (
        "is a table of half a descriptor",
        &[(0, TABLE, 8, INDIRECT, 0)],
    ),
    ("is a table outside", &[(0, u64::MAX - 15, 16, INDIRECT, 0)]),
    // The table is the descriptor table itself.
    (
        "is a table in a table",
        &[(0, DESCRIPTORS, 16, INDIRECT, 0)],
    ),
];

#[test]
fn a_broken_chain_needs_a_reset_and_nothing_worse() {
    for (name, chain) in BROKEN {
        let (mut device, memory, line) = machine();
        let driver = Driver::start(&mut device, &memory, VERSION_1 | INDIRECT_DESC);
        for &(slot, address, len, flags, next) in *chain {
            driver.describe(slot, address, len, flags, next);
        }
        driver.publish(0);
        lock(device.worker()).process(0);
        assert!(needs_reset(&mut device), "a chain that {name}");
        assert_eq!(line.edges(), 1, "a chain that {name}");
        assert_eq!(driver.used(), 0, "a chain that {name}");
        // It stays with one interrupt, and no further request is served.
        driver.describe(0, TABLE, 8, WRITE, 0);
        driver.publish(0);
        lock(device.worker()).process(0);
        assert_eq!((driver.used(), line.edges()), (0, 1));
        works(&mut device, &memory);
    }
}

#[test]
fn a_ring_that_skips_ahead_needs_a_reset() {
    let (mut device, memory, _line) = machine();
    let driver = Driver::start(&mut device, &memory, VERSION_1);
    driver.store(AVAILABLE_INDEX, ENTRIES + 1);
    lock(device.worker()).process(0);
    assert!(needs_reset(&mut device));
    works(&mut device, &memory);
}

#[test]
fn a_head_outside_of_the_table_needs_a_reset() {
    let (mut device, memory, _line) = machine();
    let driver = Driver::start(&mut device, &memory, VERSION_1);
    driver.publish(ENTRIES);
    lock(device.worker()).process(0);
    assert!(needs_reset(&mut device));
    works(&mut device, &memory);
}

#[test]
fn an_indirect_table_is_followed() {
    let (mut device, memory, _line) = machine();
    let driver = Driver::start(&mut device, &memory, VERSION_1 | INDIRECT_DESC);
    // Slots 2 and 3 of the descriptor table are the table that slot 0 refers to.
    driver.describe(2, TABLE, 24, WRITE | NEXT, 1);
    driver.describe(3, TABLE + 24, 40, WRITE, 0);
    driver.describe(0, DESCRIPTORS + 32, 32, INDIRECT, 0);
    driver.publish(0);
    lock(device.worker()).process(0);
    assert_eq!((driver.used(), driver.used_len(0)), (1, 64));
}

/// A change to a saved state that makes it one that no device can have had.
type Damage = fn(&mut SavedTransport);

#[test]
fn an_impossible_state_is_refused() {
    let (device, memory, _line) = running();
    let saved: crate::virtio::entropy::SavedEntropy = device.save(0).unwrap().decode().unwrap();
    let check = |damage: Damage| {
        let mut transport = saved.transport.clone();
        damage(&mut transport);
        transport.check(device.kind, device.features, device.queue_sizes, &memory)
    };
    assert!(check(|_| ()).is_ok());
    let damages: [Damage; 16] = [
        |t| t.status |= 0x10,
        |t| t.status |= VIRTIO_CONFIG_S_NEEDS_RESET,
        |t| t.status &= !VIRTIO_CONFIG_S_FEATURES_OK,
        |t| t.interrupt_status = 4,
        |t| t.driver_features |= 1,
        |t| t.driver_features &= !VERSION_1,
        |t| t.driver_features |= EVENT_IDX,
        |t| t.queues.clear(),
        |t| t.queues.push(t.queues[0].clone()),
        |t| t.queues[0].max_size = 128,
        |t| t.queues[0].next_avail = ENTRIES + 1,
        |t| t.queues[0].size = 3,
        |t| t.queues[0].desc_table = 8,
        |t| t.queues[0].avail_ring = 1,
        |t| t.queues[0].used_ring = !3,
        |t| t.queues[0].avail_ring = MEMORY_BYTES,
    ];
    for (index, damage) in damages.into_iter().enumerate() {
        assert!(check(damage).is_err(), "damage {index}");
    }
}

#[test]
fn a_driver_accepts_no_more_than_is_offered_and_at_least_version_1() {
    assert!(acceptable(VERSION_1, VERSION_1 | 1));
    assert!(!acceptable(VERSION_1 | 2, VERSION_1 | 1));
    assert!(!acceptable(0, VERSION_1));
}

/// What a hostile driver does.
#[derive(Clone, Debug)]
enum Act {
    /// Begins like a good one.
    Start(u64),
    Register(u32, u32),
    Memory(u64, u16),
    Describe(u16, u64, u32, u32, u16),
    Publish(u16),
    Serve,
    /// Is saved and goes on in another machine.
    Move,
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        DESCRIPTORS..DESCRIPTORS + 0x2200,
        0..MEMORY_BYTES,
        MEMORY_BYTES - 16..MEMORY_BYTES + 16,
        any::<u64>(),
    ]
}

/// Where a word of the rings is, mostly one that matters.
fn ring_field() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(AVAILABLE_INDEX),
        Just(USED_EVENT),
        DESCRIPTORS..DESCRIPTORS + 0x2200,
    ]
}

fn act() -> impl Strategy<Value = Act> {
    let word = prop_oneof![
        0u32..0x100,
        address().prop_map(|address| address as u32),
        any::<u32>()
    ];
    let len = prop_oneof![0u32..64, any::<u32>()];
    let slot = 0..2 * ENTRIES;
    prop_oneof![
        1 => prop_oneof![Just(VERSION_1), Just(VERSION_1 | EVENT_IDX | INDIRECT_DESC)]
            .prop_map(Act::Start),
        4 => (0u32..0x44, word).prop_map(|(index, value)| Act::Register(4 * index, value)),
        4 => (ring_field(), any::<u16>()).prop_map(|(at, value)| Act::Memory(at, value)),
        8 => (0..ENTRIES, address(), len, 0u32..8, slot)
            .prop_map(|(slot, at, len, flags, next)| Act::Describe(slot, at, len, flags, next)),
        8 => (0..2 * ENTRIES).prop_map(Act::Publish),
        4 => Just(Act::Serve),
        1 => Just(Act::Move),
    ]
}

proptest! {
    #[test]
    fn a_hostile_driver_harms_nobody_but_itself(acts in vec(act(), 0..64)) {
        let (mut device, memory, _line) = running();
        let mut driver = Driver::start(&mut device, &memory, VERSION_1 | INDIRECT_DESC);
        for act in acts {
            match act {
                Act::Start(features) => driver = Driver::start(&mut device, &memory, features),
                Act::Register(register, value) => {
                    set(&mut device, register, value);
                    get(&mut device, register);
                }
                Act::Memory(at, value) => memory.write_obj(value, GuestAddress(at)).unwrap(),
                Act::Describe(slot, at, len, flags, next) => {
                    driver.describe(slot, at, len, flags, next);
                }
                Act::Publish(head) => driver.publish(head),
                Act::Serve => {
                    lock(device.worker()).process(0);
                }
                Act::Move => {
                    let section = device.save(0).unwrap();
                    device = driver::transport(Entropy::new(), &memory).0;
                    device.restore(&section).unwrap();
                    prop_assert_eq!(device.save(0).unwrap(), section);
                }
            }
        }
        works(&mut device, &memory);
    }
}
