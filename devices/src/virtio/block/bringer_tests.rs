//! Reads that wait for the host's disk beside the loop.

use std::{
    fs,
    io::{PipeReader, PipeWriter, Write, pipe},
    num::NonZeroU64,
    os::{fd::AsRawFd, unix::fs::FileExt},
    sync::Mutex,
    time::{Duration, Instant},
};

use virtio_bindings::{
    virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET,
    virtio_mmio::{VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_STATUS},
};
use vm_memory::GuestAddress;

use super::{
    disk::Left,
    ring::Part,
    test_reads::{
        A_WHILE, Bench, LEN, NOW, awaited, content, drains, ends, kept, offer, offer_flush, serve,
        soon, waiting,
    },
    test_requests::{IOERR, OK, header},
    *,
};
use crate::{
    Device, RateLimit, StoppedClock,
    conformance::{PATIENCE, Subject, conforms},
    event_loop::EventLoop,
    virtio::{
        MMIO_BYTES, MmioTransport,
        driver::{self, DESCRIPTORS, Driver, Part as Buffer, VERSION_1},
        entropy::Entropy,
    },
};

/// A long read.
const LONG: usize = 200 * 512;
/// As many as the test driver's queue has room for.
const READS: u64 = 20;
/// What a read of so much writes, with its status.
const USED: u32 = LEN as u32 + 1;

/// A disk that takes its time: it is at a read that ends when this is dropped.
struct Slow {
    writer: PipeWriter,
    _reader: PipeReader,
}

impl Slow {
    fn disk(block: &Block) -> Self {
        let (reader, writer) = pipe().unwrap();
        let part = Part {
            file: reader.as_raw_fd(),
            offset: 0,
            len: 1,
        };
        let left = Left {
            parts: vec![part],
            awaited: Vec::new(),
        };
        assert!(block.bringer.as_ref().unwrap().begin(left).is_any());
        Self {
            writer,
            _reader: reader,
        }
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        // Who waited may be gone, with a test that has failed.
        let _ = self.writer.write_all(&[0]);
    }
}

impl Subject for Bench {
    type Device = MmioTransport;
    type Saved = SavedBlock;
    const SPAN: u64 = MMIO_BYTES;

    fn new() -> Self {
        Bench::new()
    }

    fn fresh(&self) -> MmioTransport {
        self.device(self.block())
    }

    fn work(&self, device: &mut MmioTransport) {
        let mut driver = self.driver(device);
        offer(&mut driver, 3);
        offer(&mut driver, 700);
        serve(device);
        assert!(lock(device.worker()).settle(soon()));
    }

    fn go_on(&self, device: &mut MmioTransport) {
        device.resume();
        ends(device);
    }
}

conforms!(conformance, super::Bench);

#[test]
fn reads_of_one_round_are_brought_together_and_read_what_is_there() {
    let bench = Bench::new();
    for block in bench.blocks() {
        let mut device = bench.device(block);
        let mut driver = bench.driver(&mut device);
        let reads: Vec<_> = (0..READS)
            .map(|n| offer(&mut driver, n * 97 % 2000))
            .collect();
        serve(&device);
        // None is made before the next round, whenever they are brought.
        assert_eq!(driver.used(), 0);
        assert_ne!(awaited(&device), 0);
        ends(&device);
        assert_eq!(u64::from(driver.used()), READS);
        for (nth, read) in (0..).zip(&reads) {
            assert_eq!(driver.used_len(nth), USED);
            assert!(read.is_right(&driver), "sector {}", read.sector);
        }
        assert_eq!((awaited(&device), waiting(&device)), (READS, 0));
    }
}

#[test]
fn without_io_uring_every_read_is_served_all_the_same() {
    let bench = Bench::new();
    let [raw, branch, _] = bench.blocks();
    for mut block in [raw, branch] {
        block.bringer = Some(Bringer::with(Arc::clone(&block.disk), None));
        let mut device = bench.device(block);
        let mut driver = bench.driver(&mut device);
        let reads: Vec<_> = (0..READS).map(|n| offer(&mut driver, n)).collect();
        driver.notify(&mut device);
        assert_eq!(u64::from(driver.used()), READS);
        assert!(reads.iter().all(|read| read.is_right(&driver)));
        assert_eq!(awaited(&device), 0);
    }
}

#[test]
fn when_the_ring_breaks_every_read_is_served_and_there_is_another() {
    let bench = Bench::new();
    // It has nothing to do with what is not here.
    let [raw, branch, _] = bench.blocks();
    for mut block in [raw, branch] {
        let broken = Some(ring::Ring::broken());
        block.bringer = Some(Bringer::with(Arc::clone(&block.disk), broken));
        let mut device = bench.device(block);
        let mut driver = bench.driver(&mut device);
        let first = offer(&mut driver, 1);
        // Nobody else has the queue looked at once more.
        driver.notify(&mut device);
        assert!(first.is_right(&driver));
        assert_eq!((driver.used(), awaited(&device)), (1, 0));
        let second = offer(&mut driver, 2);
        serve(&device);
        assert_eq!((driver.used(), awaited(&device)), (1, 1));
        ends(&device);
        assert!(second.is_right(&driver));
    }
}

#[test]
fn what_is_in_more_pieces_than_can_be_brought_at_once_is_read_all_the_same() {
    let bench = Bench::new();
    let [_, branch, _] = bench.blocks();
    let mut device = bench.device(branch);
    let mut driver = bench.driver(&mut device);
    let reads = offer_long(&mut driver);
    serve(&device);
    assert_eq!(driver.used(), 0);
    // The third is not taken before the others are answered.
    assert!((1..=2).contains(&waiting(&device)));
    ends(&device);
    are_right(&driver, &reads);
    assert_eq!(awaited(&device), 3);
}

#[test]
fn what_one_round_does_not_keep_waits_for_the_next_and_not_on_the_loop() {
    let bench = Bench::new();
    // Three may go on at once, and each is counted once.
    let reads = operations(20);
    let limited = || still(&bench, DiskLimits { reads, ..none() });
    let (device, driver, reads) = kept(&bench, limited, 3, offer_long);
    assert_eq!(driver.used(), 0);
    assert!(lock(device.worker()).settle(soon()));
    ends(&device);
    are_right(&driver, &reads);
    assert_eq!(awaited(&device), 3);
}

#[test]
fn what_waits_for_the_next_round_is_under_the_limits_of_what_it_is_then() {
    let bench = Bench::new();
    let writes = operations(1);
    let limited = || still(&bench, DiskLimits { writes, ..none() });
    let (device, driver, reads) = kept(&bench, limited, 3, |driver| {
        let header = header(VIRTIO_BLK_T_OUT, 0);
        driver.offer(&[Buffer::Out(&header), Buffer::Out(&[1; 512]), Buffer::In(1)]);
        offer_long(driver)
    });
    assert_eq!(driver.used(), 1);
    let [.., (_, disguised)] = &reads[..] else {
        unreachable!("there are three")
    };
    driver.store(disguised[0].0, VIRTIO_BLK_T_OUT);
    ends(&device);
    assert_eq!(
        (driver.used(), waiting(&device)),
        (3, 1),
        "writes are used up"
    );
}

fn operations(per_second: u64) -> RateLimit {
    RateLimit {
        operations_per_second: NonZeroU64::new(per_second),
        ..RateLimit::default()
    }
}

fn none() -> DiskLimits {
    DiskLimits::default()
}

/// A raw disk with these limits, for which time stands still.
fn still(bench: &Bench, limits: DiskLimits) -> Block {
    let mut block = bench.block().limited(limits);
    block.stop_clock(&StoppedClock::new());
    block
}

fn flushing(bench: &Bench) -> Block {
    bench.block().flushing_aside().unwrap()
}

/// Three long reads, and where each is on the disk.
fn offer_long(driver: &mut Driver<'_>) -> Vec<(usize, Vec<GuestAddress>)> {
    let offer = |sector: u64| {
        let header = header(VIRTIO_BLK_T_IN, sector);
        let parts = [Buffer::Out(&header), Buffer::In(LONG), Buffer::In(1)];
        (sector as usize * 512, driver.offer(&parts))
    };
    [0, 300, 600].map(offer).into()
}

fn are_right(driver: &Driver<'_>, reads: &[(usize, Vec<GuestAddress>)]) {
    for (at, places) in reads {
        assert_eq!(driver.bytes(places[2], 1), [OK]);
        assert!(driver.bytes(places[1], LONG) == content()[*at..at + LONG]);
    }
}

#[test]
fn a_flush_is_made_when_the_reads_before_it_are_answered() {
    let bench = Bench::new();
    for block in bench.blocks() {
        let mut device = bench.device(block.flushing_aside().unwrap());
        let mut driver = bench.driver(&mut device);
        let read = offer(&mut driver, 5);
        let flush = offer_flush(&mut driver);
        let behind = offer(&mut driver, 6);
        serve(&device);
        assert_eq!(driver.used(), 0);
        assert!(waiting(&device) <= 2);
        ends(&device);
        let lengths = [0, 1, 2].map(|nth| driver.used_len(nth));
        assert_eq!(lengths, [USED, 1, USED]);
        assert_eq!(driver.bytes(flush, 1), [OK]);
        assert!(read.is_right(&driver) && behind.is_right(&driver));
        let metrics = Device::metrics(&device);
        assert!(metrics.contains(&("flushes", 1)), "{metrics:?}");
    }
}

#[test]
fn one_that_fails_is_an_error_of_its_own() {
    let bench = Bench::new();
    let mut device = bench.device(bench.block());
    let image = fs::File::options().write(true).open(bench.raw()).unwrap();
    image.set_len(100 * SECTOR_BYTES).unwrap();
    let mut driver = bench.driver(&mut device);
    let reads = [5, 99, 7, 300].map(|sector| offer(&mut driver, sector));
    ends(&device);
    assert_eq!(driver.used(), 4);
    let status = reads.each_ref().map(|read| read.status(&driver));
    assert_eq!(status, [OK, IOERR, OK, IOERR]);
    assert!(reads[0].is_right(&driver) && reads[2].is_right(&driver));
}

#[test]
fn what_was_just_written_is_taken_from_the_page_cache_where_the_host_can_tell() {
    let bench = Bench::new();
    let file = fs::File::options().write(true).open(bench.raw()).unwrap();
    file.write_all_at(content(), 0).unwrap();
    let block = Block::open(&bench.raw(), false, "").unwrap();
    let mut device = bench.device(block.reading_aside().unwrap());
    let mut driver = bench.driver(&mut device);
    let reads = [1, 9, 4].map(|sector| offer(&mut driver, sector));
    driver.notify(&mut device);
    assert_eq!((driver.used(), awaited(&device)), (3, 0));
    assert!(reads.iter().all(|read| read.is_right(&driver)));
}

#[test]
fn a_driver_that_breaks_a_rule_behind_reads_can_start_anew() {
    let bench = Bench::new();
    for block in bench.blocks() {
        let mut device = bench.device(block);
        let mut driver = bench.driver(&mut device);
        offer(&mut driver, 5);
        offer(&mut driver, 800);
        // It has no room for a status.
        driver.offer(&[Buffer::Out(&header(VIRTIO_BLK_T_IN, 0))]);
        ends(&device);
        let status = driver::get(&mut device, VIRTIO_MMIO_STATUS);
        assert_ne!(status & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
        assert_eq!(usize::from(driver.used()) + waiting(&device), 2);
        let mut driver = bench.driver(&mut device);
        assert_eq!(waiting(&device), 0);
        let read = offer(&mut driver, 5);
        ends(&device);
        assert_eq!((driver.used(), read.is_right(&driver)), (1, true));
    }
}

#[test]
fn what_is_no_read_any_more_when_it_is_to_be_made_is_an_error() {
    let bench = Bench::new();
    let (device, driver, reads) = kept(
        &bench,
        || flushing(&bench),
        3,
        |driver| [5, 7, 9].map(|sector| offer(driver, sector)),
    );
    let [disguised, shorter, right] = reads;
    driver.store(disguised.places[0].0, VIRTIO_BLK_T_FLUSH);
    // The room of the other: of each request's three descriptors the second.
    driver.store(DESCRIPTORS + 4 * 16 + 8, 512u32);
    ends(&device);
    assert_eq!(driver.used(), 3);
    let status = [disguised, shorter].map(|read| read.status(&driver));
    assert_eq!(status, [IOERR; 2]);
    assert!(right.is_right(&driver));
    let metrics = Device::metrics(&device);
    assert!(metrics.contains(&("flushes", 0)), "{metrics:?}");
}

#[test]
fn what_is_no_flush_any_more_when_it_is_to_be_made_is_an_error() {
    let bench = Bench::new();
    let (device, driver, write) = kept(
        &bench,
        || flushing(&bench),
        2,
        |driver| {
            offer(driver, 5);
            let flush = header(VIRTIO_BLK_T_FLUSH, 7);
            driver.offer(&[Buffer::Out(&flush), Buffer::Out(&[9; 512]), Buffer::In(1)])
        },
    );
    driver.store(write[0].0, VIRTIO_BLK_T_OUT);
    ends(&device);
    assert_eq!((driver.used(), driver.bytes(write[2], 1)[0]), (2, IOERR));
    assert!(fs::read(bench.raw()).unwrap() == content());
    let metrics = Device::metrics(&device);
    assert!(metrics.contains(&("flushes", 0)), "{metrics:?}");
}

#[test]
fn a_disk_that_takes_its_time_is_waited_for_before_its_machine_is_saved() {
    let bench = Bench::new();
    let block = bench.block();
    let slow = Slow::disk(&block);
    let mut device = bench.device(block);
    let mut driver = bench.driver(&mut device);
    let reads = [1, 2].map(|sector| offer(&mut driver, sector));
    driver.notify(&mut device);
    let worker = device.worker();
    assert!(lock(worker).is_at_work());
    assert!(!drains(&device, A_WHILE, A_WHILE));
    assert_eq!(driver.used(), 0);
    drop(slow);
    assert!(lock(worker).settle(soon()));
    // Of one that runs out of time, what was begun is answered; a round may be interrupted.
    assert!(drains(&device, NOW, PATIENCE));
    while waiting(&device) > 0 {
        assert!(lock(worker).answer(0, soon()));
    }
    assert!(!lock(worker).is_at_work());
    assert!(driver.used() > 0);
    assert_eq!(waiting(&device), 0);
    ends(&device);
    assert!(reads.iter().all(|read| read.is_right(&driver)));
}

#[test]
fn a_read_that_nobody_was_told_the_end_of_is_made_again_after_a_restore() {
    let bench = Bench::new();
    let mut device = bench.device(bench.block());
    let mut driver = bench.driver(&mut device);
    let reads = [40, 41].map(|sector| offer(&mut driver, sector));
    serve(&device);
    assert!(lock(device.worker()).settle(soon()));
    let section = Device::save(&device, 0).unwrap();
    assert_eq!(driver.used(), 0);
    assert_ne!(waiting(&device), 0);
    drop(device);
    // Whatever serves it: an older release's waits.
    let at_once = || Block::open(&bench.raw(), false, "").unwrap();
    for is_aside in [false, true] {
        let block = match is_aside {
            true => bench.block(),
            false => at_once(),
        };
        let mut restored = bench.device(block);
        restored.restore(&section).unwrap();
        for read in &reads {
            driver.store(read.places[2].0, 0xffu8);
        }
        ends(&restored);
        assert_eq!((driver.used(), waiting(&restored)), (2, 0));
        assert!(reads.iter().all(|read| read.is_right(&driver)));
    }
}

#[test]
fn others_are_served_while_a_disk_takes_its_time_to_read() {
    let bench = Bench::new();
    let block = bench.block();
    let slow = Slow::disk(&block);
    others_are_served(&bench, block, || drop(slow));
}

/// Asserts that others are served until `go_on` lets the disk go on, and that it is served then.
pub(super) fn others_are_served(bench: &Bench, block: Block, go_on: impl FnOnce()) {
    let mut disk = bench.device(block);
    let mut disks = bench.driver(&mut disk);
    let memory = driver::memory();
    let (mut other, line) = driver::transport(Entropy::new(), &memory);
    let mut others = Driver::start(&mut other, &memory, VERSION_1);
    let [disk, other] = [disk, other].map(|device| Arc::new(Mutex::new(device)));
    let transports = [Arc::clone(&disk), Arc::clone(&other)];
    let (event_loop, quiesced) = EventLoop::spawn(&transports, None).unwrap();
    drop(quiesced);

    let reads = [8, 9].map(|sector| offer(&mut disks, sector));
    let notify = |device: &Mutex<MmioTransport>| {
        driver::set(&mut lock(device), VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    };
    notify(&disk);
    others.offer(&[Buffer::In(8)]);
    notify(&other);
    line.wait();
    assert_eq!((others.used(), disks.used()), (1, 0));
    assert!(event_loop.halt().is_none());
    assert!(event_loop.quiesce(Duration::from_millis(50)).is_err());
    others.offer(&[Buffer::In(8)]);
    notify(&other);
    while others.used() < 2 {
        line.wait();
    }
    assert_eq!(disks.used(), 0);
    go_on();
    let late = soon();
    while disks.used() < 2 {
        assert!(Instant::now() < late, "nobody has heard of its end");
    }
    assert!(reads.iter().all(|read| read.is_right(&disks)));
    drop(event_loop.quiesce(PATIENCE).unwrap());
    event_loop.stop(PATIENCE).unwrap();
}

/// A loop that has only a disk which takes its time.
fn slow_loop(bench: &Bench) -> (Slow, Arc<Mutex<MmioTransport>>, EventLoop) {
    let block = bench.block();
    let slow = Slow::disk(&block);
    let disk = Arc::new(Mutex::new(bench.device(block)));
    let (event_loop, quiesced) = EventLoop::spawn(&[Arc::clone(&disk)], None).unwrap();
    drop(quiesced);
    (slow, disk, event_loop)
}

#[test]
fn who_ends_a_machine_waits_for_the_reads_of_its_disk() {
    let stops: fn(EventLoop) = |event_loop| event_loop.stop(PATIENCE).unwrap();
    for ends in [stops, drop] {
        let bench = Bench::new();
        let (slow, disk, event_loop) = slow_loop(&bench);
        let ends = std::thread::spawn(move || ends(event_loop));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!ends.is_finished());
        drop(slow);
        ends.join().unwrap();
        assert!(!lock(lock(&disk).worker()).is_at_work());
    }
}

#[test]
fn the_files_of_a_disk_that_hangs_stay_open_for_the_kernel() {
    let bench = Bench::new();
    let (slow, disk, event_loop) = slow_loop(&bench);
    assert!(event_loop.stop(Duration::from_millis(50)).is_err());
    drop(disk);
    let again = Block::open(&bench.raw(), false, "");
    assert!(matches!(again, Err(DiskError::InUse { .. })));
    drop(slow);
}
