//! Disks with limits.

use std::{fs, num::NonZeroU64, sync::Mutex, time::Duration};

use tempfile::TempDir;
use virtio_bindings::{
    virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET,
    virtio_mmio::{VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_STATUS},
};
use vm_memory::GuestAddress;

use super::{
    test_reads::ends,
    test_requests::{OK, header},
    *,
};
use crate::{
    Device, EventLoop, RateLimit,
    conformance::{PATIENCE, Subject, conforms},
    sync::lock,
    virtio::{
        MMIO_BYTES, MmioTransport,
        driver::{self, Driver, Part, VERSION_1},
    },
};

const BYTES: u64 = 1 << 20;
const ALL: u64 = VERSION_1 | FLUSH | DISCARD | WRITE_ZEROES;
const SECOND: Duration = Duration::from_secs(1);

fn operations(per_second: u64) -> RateLimit {
    RateLimit {
        operations_per_second: NonZeroU64::new(per_second),
        ..RateLimit::default()
    }
}

fn bytes(per_second: u64) -> RateLimit {
    RateLimit {
        bytes_per_second: NonZeroU64::new(per_second),
        ..RateLimit::default()
    }
}

/// On writes alone.
fn writes(limit: RateLimit) -> DiskLimits {
    DiskLimits {
        writes: limit,
        ..DiskLimits::default()
    }
}

/// On all requests together.
fn total(limit: RateLimit) -> DiskLimits {
    DiskLimits {
        total: limit,
        ..DiskLimits::default()
    }
}

/// A request: where its parts are.
struct Request(Vec<GuestAddress>);

struct Bench {
    dir: TempDir,
    memory: GuestMemory,
    clock: StoppedClock,
    limits: DiskLimits,
}

impl Bench {
    fn with(limits: DiskLimits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("disk"), vec![1; BYTES as usize]).unwrap();
        Self {
            dir,
            memory: driver::memory(),
            clock: StoppedClock::new(),
            limits,
        }
    }

    fn block(&self) -> Block {
        let path = self.dir.path().join("disk");
        let mut block = Block::open(&path, false, "").unwrap().limited(self.limits);
        block.stop_clock(&self.clock);
        block
    }

    fn device(&self) -> MmioTransport {
        driver::transport(self.block(), &self.memory).0
    }

    /// Lets time pass and has the queue looked at, as when the timer is over.
    fn pass(&self, device: &MmioTransport, time: Duration) {
        self.clock.pass(time);
        while lock(device.worker()).process(0) {}
    }

    /// The first byte of a sector on the disk.
    fn on_disk(&self, sector: u64) -> u8 {
        fs::read(self.dir.path().join("disk")).unwrap()[(sector * SECTOR_BYTES) as usize]
    }
}

fn read(driver: &mut Driver<'_>, sector: u64) -> Request {
    let header = header(VIRTIO_BLK_T_IN, sector);
    Request(driver.offer(&[Part::Out(&header), Part::In(512), Part::In(1)]))
}

fn write(driver: &mut Driver<'_>, sector: u64, value: u8, len: usize) -> Request {
    let header = header(VIRTIO_BLK_T_OUT, sector);
    let data = vec![value; len];
    Request(driver.offer(&[Part::Out(&header), Part::Out(&data), Part::In(1)]))
}

fn flush(driver: &mut Driver<'_>) -> Request {
    let header = header(VIRTIO_BLK_T_FLUSH, 0);
    Request(driver.offer(&[Part::Out(&header), Part::In(1)]))
}

fn metric(device: &MmioTransport, name: &str) -> u64 {
    let list = Device::metrics(device);
    list.iter().find(|(n, _)| *n == name).unwrap().1
}

impl Request {
    /// Makes the status one that no device gives.
    fn prepare(&self, driver: &Driver<'_>) {
        let status = self.0.last().unwrap();
        driver.store(status.0, 0xffu8);
    }

    /// Whether it went well.
    fn is_done(&self, driver: &Driver<'_>) -> bool {
        let status = self.0.last().unwrap();
        driver.bytes(*status, 1) == [OK]
    }
}

/// Which of `requests` are done.
fn done(driver: &Driver<'_>, requests: &[Request]) -> Vec<bool> {
    let done = requests.iter().map(|request| request.is_done(driver));
    done.collect()
}

fn prepare(driver: &Driver<'_>, requests: &[Request]) {
    requests.iter().for_each(|request| request.prepare(driver));
}

impl Subject for Bench {
    type Device = MmioTransport;
    type Saved = SavedBlock;
    const SPAN: u64 = MMIO_BYTES;

    fn new() -> Self {
        Self::with(DiskLimits {
            total: operations(100),
            reads: bytes(1),
            writes: bytes(1),
        })
    }

    fn fresh(&self) -> MmioTransport {
        self.device()
    }

    /// A read and a write are served; of each, one more waits, and one was not looked at.
    fn work(&self, device: &mut MmioTransport) {
        let mut driver = Driver::start(device, &self.memory, ALL);
        for _ in 0..2 {
            write(&mut driver, 0, 9, 512);
            read(&mut driver, 1);
        }
        // What was used up by others before is not of this device.
        lock(device.worker()).process(0);
        write(&mut driver, 0, 9, 512);
        read(&mut driver, 1);
    }

    fn go_on(&self, device: &mut MmioTransport) {
        device.resume();
        self.pass(device, 600 * SECOND);
    }
}

conforms!(conformance, super::Bench);

#[test]
fn a_limit_on_writes_holds_up_no_reads() {
    let bench = Bench::with(writes(bytes(512)));
    let mut device = bench.device();
    let mut driver = Driver::start(&mut device, &bench.memory, ALL);
    let requests = [
        write(&mut driver, 0, 2, 512),
        write(&mut driver, 1, 3, 512),
        flush(&mut driver),
        read(&mut driver, 1),
        write(&mut driver, 1, 4, 512),
        read(&mut driver, 0),
    ];
    prepare(&driver, &requests);
    driver.notify(&mut device);
    let done = || done(&driver, &requests);
    assert_eq!(done(), [true, false, false, true, false, true]);
    // What was read is what was there: the write before it has not been made.
    assert_eq!(driver.bytes(requests[3].0[1], 1), [1]);
    assert_eq!(driver.bytes(requests[5].0[1], 1), [2]);
    bench.pass(&device, SECOND);
    // A flush has no bytes, but does not overtake what it may be meant for.
    assert_eq!(done(), [true, true, false, true, false, true]);
    assert_eq!((bench.on_disk(1), metric(&device, "flushes")), (3, 0));
    bench.pass(&device, SECOND);
    assert_eq!(done(), [true; 6]);
    assert_eq!((bench.on_disk(1), metric(&device, "flushes")), (4, 1));
    assert_eq!(metric(&device, "read_throttled"), 0);
    assert_eq!(metric(&device, "write_throttled"), 2);
}

#[test]
fn a_limit_on_all_keeps_all_in_order() {
    let bench = Bench::with(total(operations(1)));
    let mut device = bench.device();
    let mut driver = Driver::start(&mut device, &bench.memory, ALL);
    let requests = [
        read(&mut driver, 0),
        write(&mut driver, 0, 2, 512),
        read(&mut driver, 0),
        flush(&mut driver),
    ];
    prepare(&driver, &requests);
    driver.notify(&mut device);
    for so_many in 1..=requests.len() {
        let expected: Vec<_> = (0..requests.len()).map(|nth| nth < so_many).collect();
        assert_eq!(done(&driver, &requests), expected);
        bench.pass(&device, SECOND);
    }
    assert_eq!(driver.bytes(requests[0].0[1], 1), [1]);
    assert_eq!(driver.bytes(requests[2].0[1], 1), [2]);
}

#[test]
fn what_is_larger_than_a_burst_is_served_whole_and_paid_for_afterwards() {
    let bench = Bench::with(writes(bytes(1024)));
    let mut device = bench.device();
    let mut driver = Driver::start(&mut device, &bench.memory, ALL);
    let requests = [
        write(&mut driver, 0, 2, 8192),
        write(&mut driver, 16, 3, 512),
    ];
    prepare(&driver, &requests);
    driver.notify(&mut device);
    assert_eq!(done(&driver, &requests), [true, false]);
    bench.pass(&device, 7 * SECOND);
    assert_eq!(done(&driver, &requests), [true, false]);
    bench.pass(&device, SECOND);
    assert_eq!(done(&driver, &requests), [true, true]);
}

#[test]
fn discards_and_zeroes_are_operations_without_bytes() {
    let range = |sectors: u32| {
        let mut range = 0u64.to_le_bytes().to_vec();
        range.extend(sectors.to_le_bytes());
        range.extend([0; 4]);
        range
    };
    for (limit, served) in [(bytes(1), 4), (operations(1), 1)] {
        let bench = Bench::with(writes(limit));
        let mut device = bench.device();
        let mut driver = Driver::start(&mut device, &bench.memory, ALL);
        for _ in 0..2 {
            for request in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
                let (header, range) = (header(request, 0), range(64));
                driver.offer(&[Part::Out(&header), Part::Out(&range), Part::In(1)]);
            }
        }
        driver.notify(&mut device);
        assert_eq!(driver.used(), served, "{limit:?}");
    }
}

#[test]
fn requests_that_wait_are_saved_and_go_on_with_the_limits_that_they_had() {
    let mut bench = Bench::with(writes(operations(1)));
    let mut device = bench.device();
    let mut driver = Driver::start(&mut device, &bench.memory, ALL);
    let requests = [
        write(&mut driver, 0, 2, 512),
        write(&mut driver, 1, 3, 512),
        read(&mut driver, 2),
        write(&mut driver, 2, 4, 512),
        write(&mut driver, 1, 5, 512),
    ];
    prepare(&driver, &requests);
    driver.notify(&mut device);
    assert_eq!(
        done(&driver, &requests),
        [true, false, true, false, false],
        "two wait"
    );
    let section = device.save(0).unwrap();
    drop(device);
    let limits = std::mem::take(&mut bench.limits);
    let mut device = bench.device();
    device.restore(&section).unwrap();
    let again = device.save(0).unwrap().decode::<SavedBlock>().unwrap();
    assert_eq!(RateLimit::from(again.write_limit), limits.writes);
    assert_eq!(RateLimit::from(again.read_limit), RateLimit::default());
    // Nothing is used up: one goes on at once, without a notification.
    lock(device.worker()).process(0);
    assert_eq!(done(&driver, &requests), [true, true, true, false, false]);
    let late = [read(&mut driver, 2)];
    prepare(&driver, &late);
    driver.notify(&mut device);
    assert!(late[0].is_done(&driver), "a restored limit on writes");
    bench.pass(&device, SECOND);
    assert_eq!(done(&driver, &requests), [true, true, true, true, false]);
    bench.pass(&device, SECOND);
    assert_eq!(done(&driver, &requests), [true; 5]);
    assert_eq!([0, 1, 2].map(|sector| bench.on_disk(sector)), [2, 5, 4]);
}

#[test]
fn what_waits_goes_on_when_its_limit_is_raised_and_is_held_when_it_is_lowered() {
    let bench = Bench::with(writes(bytes(512)));
    let block = bench.block();
    let control = block.control();
    let mut device = driver::transport(block, &bench.memory).0;
    let mut driver = Driver::start(&mut device, &bench.memory, ALL);
    for sector in 0..4 {
        write(&mut driver, sector, 2, 512);
    }
    driver.notify(&mut device);
    assert_eq!(driver.used(), 1);
    let mut change = |limits| {
        control.set_limits(limits);
        device.host_side().look_again();
        driver::serve_notified(&mut device);
    };
    // What was used up at another rate is not waited for.
    change(writes(bytes(10_240)));
    assert_eq!(
        driver.used(),
        4,
        "a burst is two, and one more begins in it"
    );
    write(&mut driver, 4, 2, 512);
    write(&mut driver, 5, 2, 512);
    // The limit is another, but not the rate of writes.
    change(DiskLimits {
        reads: bytes(1),
        ..writes(bytes(10_240))
    });
    assert_eq!(driver.used(), 4);
    change(writes(bytes(1)));
    assert_eq!(driver.used(), 5);
    change(DiskLimits::default());
    assert_eq!(driver.used(), 6);
    change(total(operations(1)));
    write(&mut driver, 6, 2, 512);
    write(&mut driver, 7, 2, 512);
    driver.notify(&mut device);
    assert_eq!(driver.used(), 7, "one that had no limits has one");
}

#[test]
fn limits_are_saved_and_restored_as_they_are_by_then() {
    let mut bench = Bench::with(writes(bytes(1)));
    let block = bench.block();
    let control = block.control();
    let device = driver::transport(block, &bench.memory).0;
    let now = DiskLimits {
        total: operations(2),
        reads: bytes(3),
        writes: RateLimit::default(),
    };
    // Nobody has looked at the queue since.
    control.set_limits(now);
    let section = device.save(0).unwrap();
    let saved = section.decode::<SavedBlock>().unwrap();
    assert_eq!(RateLimit::from(saved.total_limit), now.total);
    drop((device, control));
    bench.limits = total(operations(9));
    let block = bench.block();
    let control = block.control();
    let mut device = driver::transport(block, &bench.memory).0;
    device.restore(&section).unwrap();
    assert_eq!(control.limits(), now);
    // A device that goes back to what it was has the limits of then.
    control.set_limits(DiskLimits::default());
    device.restore(&section).unwrap();
    assert_eq!(control.limits(), now);
}

#[test]
fn of_the_limits_that_a_device_goes_back_to_nothing_is_used_up() {
    let bench = Bench::with(writes(operations(1)));
    let mut device = bench.device();
    let mut driver = Driver::start(&mut device, &bench.memory, ALL);
    let before = device.save(0).unwrap();
    write(&mut driver, 0, 2, 512);
    driver.notify(&mut device);
    device.restore(&before).unwrap();
    // It is asked for the same once more.
    lock(device.worker()).process(0);
    let saved: SavedBlock = device.save(0).unwrap().decode().unwrap();
    assert_eq!(saved.waiting, [0u16; 0]);
}

#[test]
fn the_loop_looks_again_at_once_when_limits_are_changed() {
    // The second write would wait for longer than anybody here does.
    let bench = Bench::with(writes(bytes(1)));
    let path = bench.dir.path().join("disk");
    let block = Block::open(&path, false, "").unwrap().limited(bench.limits);
    let control = block.control();
    let (device, line) = driver::transport(block, &bench.memory);
    let device = Arc::new(Mutex::new(device));
    let (event_loop, quiesced) = EventLoop::spawn(&[Arc::clone(&device)], None).unwrap();
    let mut driver = Driver::start(&mut lock(&device), &bench.memory, ALL);
    for sector in 0..3 {
        write(&mut driver, sector, 2, 512);
    }
    drop(quiesced);
    while driver.used() < 1 {
        line.wait();
    }
    control.set_limits(DiskLimits::default());
    lock(&device).host_side().look_again();
    while driver.used() < 3 {
        line.wait();
    }
    event_loop.stop(PATIENCE).unwrap();
}

#[test]
fn a_state_in_which_more_waits_than_was_asked_for_is_refused() {
    let bench = Bench::with(writes(bytes(1)));
    let mut device = bench.device();
    let mut driver = Driver::start(&mut device, &bench.memory, ALL);
    write(&mut driver, 0, 2, 512);
    write(&mut driver, 0, 2, 512);
    driver.notify(&mut device);
    let mut saved: SavedBlock = device.save(0).unwrap().decode().unwrap();
    assert_eq!(saved.waiting.len(), 1);
    saved.waiting.push(0);
    let forged = Section::encode(0, &saved).unwrap();
    let refused = device.restore(&forged);
    assert!(
        matches!(refused, Err(Error::Impossible { .. })),
        "{refused:?}"
    );
}

#[test]
fn what_waits_is_the_drivers_again_when_it_resets_the_device_or_ends_the_queue() {
    let reset = |device: &mut MmioTransport| driver::set(device, VIRTIO_MMIO_STATUS, 0);
    let end = |device: &mut MmioTransport| driver::set(device, VIRTIO_MMIO_QUEUE_READY, 0);
    for forget in [reset as fn(&mut MmioTransport), end] {
        let bench = Bench::with(writes(bytes(512)));
        let mut device = bench.device();
        let mut driver = Driver::start(&mut device, &bench.memory, ALL);
        write(&mut driver, 0, 2, 512);
        write(&mut driver, 1, 2, 512);
        driver.notify(&mut device);
        forget(&mut device);
        let saved: SavedBlock = device.save(0).unwrap().decode().unwrap();
        assert_eq!(saved.waiting, [0u16; 0]);
        bench.clock.pass(9 * SECOND);
        let mut driver = Driver::start(&mut device, &bench.memory, ALL);
        read(&mut driver, 0);
        driver.notify(&mut device);
        assert_eq!((driver.used(), bench.on_disk(1)), (1, 1));
    }
}

#[test]
fn a_driver_that_has_more_wait_than_its_queue_has_entries_is_at_fault() {
    let bench = Bench::with(writes(operations(1)));
    let mut device = bench.device();
    let mut driver = Driver::start(&mut device, &bench.memory, ALL);
    write(&mut driver, 0, 2, 512);
    let needs_reset = |device: &mut MmioTransport| {
        driver::get(device, VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET != 0
    };
    // One is served, and the queue is filled with it over and over.
    let most = usize::from(driver::ENTRIES);
    for _ in 0..most {
        driver.publish(0);
        driver.notify(&mut device);
    }
    let waiting = |device: &MmioTransport| {
        let saved: SavedBlock = device.save(0).unwrap().decode().unwrap();
        saved.waiting.len()
    };
    assert_eq!((driver.used(), waiting(&device)), (1, most));
    assert!(!needs_reset(&mut device));
    driver.publish(0);
    driver.notify(&mut device);
    assert!(needs_reset(&mut device));
    assert_eq!((driver.used(), waiting(&device)), (1, most));
    let saved = device.save(0).unwrap();
    drop(device);
    let mut restored = bench.device();
    restored.restore(&saved).unwrap();
    assert!(needs_reset(&mut restored));
}

#[test]
fn a_request_that_is_another_when_its_time_comes_is_under_the_limits_of_that() {
    let bench = Bench::with(DiskLimits {
        reads: bytes(512),
        writes: bytes(1),
        ..DiskLimits::default()
    });
    let mut device = bench.device();
    let mut driver = Driver::start(&mut device, &bench.memory, ALL);
    write(&mut driver, 0, 2, 512);
    read(&mut driver, 0);
    let disguised = read(&mut driver, 1);
    driver.notify(&mut device);
    assert_eq!(driver.used(), 2);
    driver.store(disguised.0[0].0, VIRTIO_BLK_T_OUT);
    bench.pass(&device, SECOND);
    assert_eq!(driver.used(), 2, "writes are used up");
    bench.pass(&device, 600 * SECOND);
    assert_eq!(driver.used(), 3);
}

#[test]
fn reads_that_wait_for_the_disk_together_are_under_limits_one_by_one() {
    let bench = Bench::with(total(operations(30)));
    let block = bench.block().reading_aside().unwrap();
    block.keep_reads();
    let mut device = driver::transport(block, &bench.memory).0;
    let mut driver = Driver::start(&mut device, &bench.memory, ALL);
    let requests: Vec<_> = (0..12).map(|n| read(&mut driver, n)).collect();
    prepare(&driver, &requests);
    let made = |time| {
        bench.clock.pass(time);
        ends(&device);
        driver.used()
    };
    // A burst is a tenth of a second's, and one more begins in it.
    assert_eq!(made(Duration::ZERO), 4);
    assert_eq!(made(SECOND / 10), 7);
    assert_eq!(made(SECOND), 11);
    assert_eq!(metric(&device, "awaited_reads"), 11);
    let expected: Vec<_> = (0..12).map(|nth| nth < 11).collect();
    assert_eq!(done(&driver, &requests), expected);
}

#[test]
fn the_loop_serves_what_waited_when_its_time_comes_and_others_meanwhile() {
    const WRITES: u16 = 15;
    let bench = Bench::with(writes(operations(100)));
    let path = bench.dir.path().join("disk");
    let limited = Block::open(&path, false, "").unwrap();
    let (limited, line) = driver::transport(limited.limited(bench.limits), &bench.memory);
    let other_memory = driver::memory();
    let other = bench.dir.path().join("other");
    fs::write(&other, vec![1; BYTES as usize]).unwrap();
    let other = Block::open(&other, false, "").unwrap();
    let (other, other_line) = driver::transport(other, &other_memory);
    let [limited, other] = [limited, other].map(|device| Arc::new(Mutex::new(device)));
    let devices = [Arc::clone(&limited), Arc::clone(&other)];
    let (event_loop, quiesced) = EventLoop::spawn(&devices, None).unwrap();
    let mut driver = Driver::start(&mut lock(&limited), &bench.memory, ALL);
    let mut of_other = Driver::start(&mut lock(&other), &other_memory, ALL);
    for sector in 0..WRITES {
        write(&mut driver, sector.into(), 2, 512);
    }
    drop(quiesced);
    let begin = std::time::Instant::now();
    let mut rounds = 0;
    while driver.used() < WRITES {
        assert!(begin.elapsed() < PATIENCE);
        write(&mut of_other, 0, 2, 512);
        driver::set(&mut lock(&other), VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        rounds += 1;
        while of_other.used() < rounds {
            other_line.wait();
        }
        line.wait();
    }
    // All but a burst's ten take a hundredth of a second each; timers are never early.
    assert!(begin.elapsed() >= Duration::from_millis(10 * (u64::from(WRITES) - 12)));
    // One that is held while requests wait goes on with them.
    for sector in 0..WRITES {
        write(&mut driver, sector.into(), 3, 512);
    }
    drop(event_loop.quiesce(PATIENCE).unwrap());
    while driver.used() < 2 * WRITES {
        line.wait();
    }
    event_loop.stop(PATIENCE).unwrap();
}
