//! Flushes beside the loop.

use std::{
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use branch_disk::{Disk as Branch, Foundation, anything};
use tempfile::TempDir;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;
use vm_memory::GuestAddress;

use super::{
    test_reads::{NOW, drains},
    test_requests::{OK, header},
    *,
};
use crate::{
    Device,
    conformance::{Line, PATIENCE, Subject, conforms},
    event_loop::EventLoop,
    virtio::{
        MMIO_BYTES, MmioTransport,
        driver::{self, Driver, Part, VERSION_1},
        entropy::Entropy,
    },
};

/// A disk that branches: who has it locked is a host's disk that takes its time.
struct Bench {
    _dir: TempDir,
    disk: SharedDisk,
    memory: GuestMemory,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let disk = Branch::create(&path, Some(1 << 20), &Foundation::Nothing, &anything).unwrap();
        Self {
            _dir: dir,
            disk: Arc::new(Mutex::new(disk)),
            memory: driver::memory(),
        }
    }

    fn slow(&self) -> MutexGuard<'_, branch_disk::Disk> {
        lock(&self.disk)
    }

    fn block(&self) -> Block {
        let block = Block::branching(Arc::clone(&self.disk), "").unwrap();
        block.flushing_aside().unwrap()
    }

    fn device(&self) -> (MmioTransport, Arc<Line>) {
        driver::transport(self.block(), &self.memory)
    }

    fn driver(&self, device: &mut MmioTransport) -> Driver<'_> {
        Driver::start(device, &self.memory, VERSION_1 | FLUSH)
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
        self.device().0
    }

    fn work(&self, device: &mut MmioTransport) {
        let mut driver = self.driver(device);
        offer(&mut driver, VIRTIO_BLK_T_OUT);
        offer(&mut driver, VIRTIO_BLK_T_FLUSH);
        driver.notify(device);
        assert!(lock(device.worker()).settle(soon()));
    }

    fn go_on(&self, device: &mut MmioTransport) {
        device.resume();
        lock(device.worker()).process(0);
        ends(device);
    }
}

conforms!(conformance, super::Bench);

/// A request's parts, with room for its status behind them.
fn offer(driver: &mut Driver<'_>, request: u32) -> Vec<GuestAddress> {
    let header = header(request, 0);
    match request {
        VIRTIO_BLK_T_OUT => driver.offer(&[Part::Out(&header), Part::Out(&[7; 512]), Part::In(1)]),
        _ => driver.offer(&[Part::Out(&header), Part::In(1)]),
    }
}

fn status(driver: &Driver<'_>, places: &[GuestAddress]) -> u8 {
    driver.bytes(*places.last().unwrap(), 1)[0]
}

fn notify(device: &Mutex<MmioTransport>) {
    driver::set(&mut lock(device), VIRTIO_MMIO_QUEUE_NOTIFY, 0);
}

fn waiting(device: &MmioTransport) -> usize {
    let section = Device::save(device, 0).unwrap();
    section.decode::<SavedBlock>().unwrap().waiting.len()
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// Serves until the flush that was begun is answered.
fn ends(device: &MmioTransport) {
    let mut worker = lock(device.worker());
    assert!(worker.settle(soon()));
    worker.process(0);
}

#[test]
fn a_flush_is_answered_when_it_is_over_and_what_comes_behind_it_then() {
    let bench = Bench::new();
    let (mut device, line) = bench.device();
    let mut driver = bench.driver(&mut device);
    let write = offer(&mut driver, VIRTIO_BLK_T_OUT);
    driver.notify(&mut device);
    assert_eq!((driver.used(), status(&driver, &write)), (1, OK));
    let slow = bench.slow();
    let flush = offer(&mut driver, VIRTIO_BLK_T_FLUSH);
    let behind = offer(&mut driver, VIRTIO_BLK_T_OUT);
    driver.notify(&mut device);
    assert!(lock(device.worker()).is_at_work());
    driver.notify(&mut device);
    assert_eq!((driver.used(), waiting(&device)), (1, 1));
    let interrupts = line.edges();
    drop(slow);
    ends(&device);
    assert_eq!(driver.used(), 3);
    assert!(line.edges() > interrupts);
    assert_eq!(
        [flush, behind].map(|places| status(&driver, &places)),
        [OK; 2]
    );
    assert_eq!(waiting(&device), 0);
}

#[test]
fn a_driver_that_gives_up_on_a_flush_can_start_anew() {
    let bench = Bench::new();
    let (mut device, _) = bench.device();
    let mut driver = bench.driver(&mut device);
    let slow = bench.slow();
    offer(&mut driver, VIRTIO_BLK_T_FLUSH);
    driver.notify(&mut device);
    let mut driver = bench.driver(&mut device);
    assert_eq!(waiting(&device), 0);
    let write = offer(&mut driver, VIRTIO_BLK_T_OUT);
    driver.notify(&mut device);
    // The disk is not to be used meanwhile.
    assert_eq!(driver.used(), 0);
    drop(slow);
    ends(&device);
    assert_eq!((driver.used(), status(&driver, &write)), (1, OK));
    let flush = offer(&mut driver, VIRTIO_BLK_T_FLUSH);
    driver.notify(&mut device);
    ends(&device);
    assert_eq!((driver.used(), status(&driver, &flush)), (2, OK));
}

#[test]
fn one_that_nobody_was_told_the_end_of_is_made_again_after_a_restore() {
    let bench = Bench::new();
    let (mut device, _) = bench.device();
    let mut driver = bench.driver(&mut device);
    let flush = offer(&mut driver, VIRTIO_BLK_T_FLUSH);
    driver.notify(&mut device);
    assert!(lock(device.worker()).settle(soon()));
    let section = Device::save(&device, 0).unwrap();
    assert_eq!((driver.used(), waiting(&device)), (0, 1));
    drop(device);
    // Whatever serves it: an older release's does so at once.
    let aside = bench.block();
    let at_once = Block::branching(Arc::clone(&bench.disk), "").unwrap();
    for (block, is_aside) in [(at_once, false), (aside, true)] {
        let (mut restored, _) = driver::transport(block, &bench.memory);
        restored.restore(&section).unwrap();
        let unanswered = flush.last().unwrap();
        driver.store(unanswered.0, 0xffu8);
        lock(restored.worker()).process(0);
        if is_aside {
            assert_eq!(status(&driver, &flush), 0xff);
            ends(&restored);
        }
        assert_eq!((driver.used(), status(&driver, &flush)), (1, OK));
        assert_eq!(waiting(&restored), 0);
    }
}

#[test]
fn before_a_machine_is_saved_its_flushes_are_over() {
    let bench = Bench::new();
    let (mut device, _) = bench.device();
    let mut driver = bench.driver(&mut device);
    let slow = bench.slow();
    let flushes: Vec<_> = (0..5)
        .map(|_| offer(&mut driver, VIRTIO_BLK_T_FLUSH))
        .collect();
    driver.notify(&mut device);
    assert_eq!(driver.used(), 0);
    std::thread::scope(|scope| {
        assert!(!drains(&device, NOW, NOW));
        let drained = scope.spawn(|| drains(&device, PATIENCE, PATIENCE));
        drop(slow);
        assert!(drained.join().unwrap());
    });
    assert_eq!(driver.used(), 5);
    assert!(flushes.iter().all(|places| status(&driver, places) == OK));
    // Of one that runs out of time, what was begun is answered, and nothing else.
    for _ in 0..3 {
        offer(&mut driver, VIRTIO_BLK_T_FLUSH);
    }
    let worker = device.worker();
    assert!(drains(&device, NOW, PATIENCE));
    assert!(!lock(worker).is_at_work());
    assert_eq!((driver.used(), waiting(&device)), (6, 0));
    assert!(drains(&device, PATIENCE, PATIENCE));
    assert_eq!((driver.used(), waiting(&device)), (8, 0));
}

#[test]
fn each_is_counted_once() {
    let bench = Bench::new();
    let (mut device, _) = bench.device();
    let mut driver = bench.driver(&mut device);
    for made in 1..3 {
        offer(&mut driver, VIRTIO_BLK_T_FLUSH);
        driver.notify(&mut device);
        ends(&device);
        let metrics = lock(device.worker()).device.metrics().list();
        assert!(metrics.contains(&("flushes", made)), "{metrics:?}");
    }
}

#[test]
fn where_the_host_has_no_thread_the_loop_flushes_and_goes_on() {
    let bench = Bench::new();
    let mut block = bench.block();
    block.flusher.as_mut().unwrap().is_refused = true;
    let (mut device, _) = driver::transport(block, &bench.memory);
    let mut driver = bench.driver(&mut device);
    let requests = [VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH];
    let requests = requests.map(|request| offer(&mut driver, request));
    driver.notify(&mut device);
    assert_eq!((driver.used(), waiting(&device)), (3, 0));
    for request in requests {
        assert_eq!(status(&driver, &request), OK);
    }
}

#[test]
fn a_flush_that_fails_is_told_to_who_asked_before_the_machine_is_saved() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let memory = driver::memory();
    let block = Block::open(image.path(), false, "").unwrap();
    let block = block.flushing_aside().unwrap();
    block.disk.has_failed();
    let (mut device, _) = driver::transport(block, &memory);
    let mut driver = Driver::start(&mut device, &memory, VERSION_1 | FLUSH);
    let flushes = [(); 2].map(|()| offer(&mut driver, VIRTIO_BLK_T_FLUSH));
    driver.notify(&mut device);
    // It is not made again by who opens the disk anew, and knows of no failure.
    assert!(drains(&device, PATIENCE, PATIENCE));
    assert_eq!((driver.used(), waiting(&device)), (2, 0));
    for flush in flushes {
        assert_eq!(status(&driver, &flush), VIRTIO_BLK_S_IOERR as u8);
    }
}

/// A disk and another device, on one loop.
struct Both<'b> {
    disk: Arc<Mutex<MmioTransport>>,
    disks: Driver<'b>,
    other: Arc<Mutex<MmioTransport>>,
    others: Driver<'static>,
    line: Arc<Line>,
    event_loop: EventLoop,
}

impl<'b> Both<'b> {
    fn new(bench: &'b Bench) -> Self {
        let (mut disk, _) = bench.device();
        let disks = bench.driver(&mut disk);
        // Of a test, and as long as it.
        let memory: &'static GuestMemory = Box::leak(Box::new(driver::memory()));
        let (mut other, line) = driver::transport(Entropy::new(), memory);
        let others = Driver::start(&mut other, memory, VERSION_1);
        let [disk, other] = [disk, other].map(|device| Arc::new(Mutex::new(device)));
        let transports = [Arc::clone(&disk), Arc::clone(&other)];
        let (event_loop, quiesced) = EventLoop::spawn(&transports, None).unwrap();
        drop(quiesced);
        Self {
            disk,
            disks,
            other,
            others,
            line,
            event_loop,
        }
    }

    /// Has the disk flushed, and waits until that has begun.
    fn flush(&mut self) -> Vec<GuestAddress> {
        let flush = offer(&mut self.disks, VIRTIO_BLK_T_FLUSH);
        notify(&self.disk);
        let late = soon();
        while !lock(lock(&self.disk).worker()).is_at_work() {
            assert!(Instant::now() < late, "it was not begun");
        }
        flush
    }

    /// Asserts that the other device is served.
    fn other_is_served(&mut self) {
        let used = self.others.used();
        self.others.offer(&[Part::In(8)]);
        notify(&self.other);
        self.line.wait();
        assert_eq!(self.others.used(), used + 1);
    }

    /// Asserts that this many flushes come to be answered.
    fn come_to_be_answered(&self, flushes: u16) {
        let late = soon();
        while self.disks.used() < flushes {
            assert!(Instant::now() < late, "nobody has heard of its end");
        }
    }
}

#[test]
fn others_are_served_while_a_disk_takes_its_time() {
    let bench = Bench::new();
    let mut both = Both::new(&bench);
    let slow = bench.slow();
    let flush = both.flush();
    both.other_is_served();
    assert_eq!(both.disks.used(), 0);
    drop(slow);
    both.come_to_be_answered(1);
    assert_eq!(status(&both.disks, &flush), OK);
    both.event_loop.stop(PATIENCE).unwrap();
}

#[test]
fn a_machine_whose_disk_takes_its_time_is_not_held_and_goes_on() {
    let bench = Bench::new();
    let mut both = Both::new(&bench);
    let slow = bench.slow();
    both.flush();
    assert!(both.event_loop.halt().is_none());
    assert!(both.event_loop.quiesce(Duration::from_millis(50)).is_err());
    both.other_is_served();
    drop(slow);
    both.come_to_be_answered(1);
    let quiesced = both.event_loop.quiesce(PATIENCE).unwrap();
    assert_eq!(waiting(&lock(&both.disk)), 0);
    drop(quiesced);
    both.event_loop.stop(PATIENCE).unwrap();
}

#[test]
fn who_ends_a_machine_waits_for_its_disk_within_a_bound() {
    let bench = Bench::new();
    let mut both = Both::new(&bench);
    let slow = bench.slow();
    both.flush();
    assert!(both.event_loop.stop(Duration::from_millis(50)).is_err());
    drop(slow);
    // It is waited for by who ends the loop, before devices go.
    let mut both = Both::new(&bench);
    let slow = bench.slow();
    both.flush();
    let Both {
        event_loop, disk, ..
    } = both;
    let ends = std::thread::spawn(|| event_loop.stop(PATIENCE));
    drop(slow);
    ends.join().unwrap().unwrap();
    assert!(!lock(lock(&disk).worker()).is_at_work());
}
