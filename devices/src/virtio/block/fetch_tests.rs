//! Reads of what is not on this host, beside the loop.

use std::{
    ops::Range,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use branch_disk::{LayerId, Origin, Rebuild, anything};

use super::{
    bringer_tests::others_are_served,
    fetch::THREADS,
    test_reads::{BYTES, Bench, awaited, content, ends, offer, offer_flush, waiting},
    test_requests::{IOERR, OK},
    *,
};
use crate::{
    conformance::{PATIENCE, Subject, conforms},
    virtio::{MMIO_BYTES, MmioTransport, Worker},
};

/// Has the content.
#[derive(Default)]
pub(super) struct Elsewhere {
    /// Held by who does not want it to be had.
    gate: Arc<Mutex<()>>,
    is_lost: Arc<AtomicBool>,
    /// How often it was asked for something,
    asked: Arc<AtomicU32>,
    /// and could not give it.
    refused: Arc<AtomicU32>,
}

impl Origin for Elsewhere {
    fn bytes(&self) -> u64 {
        BYTES as u64
    }

    fn each_data(&self, found: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        found(0..BYTES as u64);
        Ok(())
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let _gate = lock(&self.gate);
        if self.is_lost.load(Ordering::Relaxed) {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Err(io::ErrorKind::InvalidData.into());
        }
        buffer.copy_from_slice(&content()[offset as usize..][..buffer.len()]);
        Ok(())
    }
}

impl Elsewhere {
    /// A layer in `directory` that comes from here.
    fn rebuild(self, directory: &Path) -> Rebuild {
        let path = directory.join("comes.layer");
        Rebuild::begin(&path, LayerId([1; 16]), Arc::new(self), &anything).unwrap()
    }

    /// A disk that branches of it.
    pub(super) fn disk(self, directory: &Path) -> SharedDisk {
        let disk = self.rebuild(directory).branch(&anything).unwrap();
        Arc::new(Mutex::new(disk))
    }

    fn block(self, directory: &Path) -> Block {
        let block = Block::branching(self.disk(directory), "").unwrap();
        block.reading_aside().unwrap()
    }
}

/// With a disk of which nothing is here.
struct OfWhatComes(Bench);

impl Subject for OfWhatComes {
    type Device = MmioTransport;
    type Saved = SavedBlock;
    const SPAN: u64 = MMIO_BYTES;

    fn new() -> Self {
        Self(Bench::new())
    }

    fn fresh(&self) -> MmioTransport {
        let disk = Elsewhere::default()
            .rebuild(self.0.dir.path())
            .read()
            .unwrap();
        let block = Block::branching(Arc::new(Mutex::new(disk)), "").unwrap();
        self.0.device(block.reading_aside().unwrap())
    }

    fn work(&self, device: &mut MmioTransport) {
        self.0.work(device);
    }

    fn go_on(&self, device: &mut MmioTransport) {
        self.0.go_on(device);
    }
}

conforms!(conformance, super::OfWhatComes);

#[test]
fn what_is_elsewhere_is_waited_for_beside_the_loop_and_before_its_machine_is_saved() {
    let bench = Bench::new();
    let elsewhere = Elsewhere::default();
    let gate = Arc::clone(&elsewhere.gate);
    let closed = lock(&gate);
    let disk = elsewhere.disk(bench.dir.path());
    let block = Block::branching(Arc::clone(&disk), "").unwrap();
    let mut device = bench.device(block.reading_aside().unwrap());
    let mut driver = bench.driver(&mut device);
    let reads = [1, 2, 1900].map(|sector| offer(&mut driver, sector));
    driver.notify(&mut device);
    let worker = device.worker();
    assert!(lock(worker).is_at_work());
    // Nor has it the disk to itself, which others cut.
    lock(&disk).write(0, &mut &[0; 512][..]).unwrap();
    assert!(!lock(worker).drain(0, Instant::now() + Duration::from_millis(20), || true));
    assert_eq!((driver.used(), awaited(&device)), (0, 3));
    drop(closed);
    ends(&device);
    assert!(!lock(worker).is_at_work());
    assert!(reads.iter().all(|read| read.is_right(&driver)));
    // It is here now.
    let closed = lock(&gate);
    let read = offer(&mut driver, 70);
    driver.notify(&mut device);
    assert!(read.is_right(&driver));
    drop(closed);
}

#[test]
fn what_cannot_be_had_is_an_error_of_the_disk_until_it_can() {
    let bench = Bench::new();
    let elsewhere = Elsewhere::default();
    let is_lost = Arc::clone(&elsewhere.is_lost);
    let refused = Arc::clone(&elsewhere.refused);
    let mut device = bench.device(elsewhere.block(bench.dir.path()));
    let mut driver = bench.driver(&mut device);
    for lost in [true, false, true] {
        is_lost.store(lost, Ordering::Relaxed);
        let first = driver.used();
        let read = offer(&mut driver, 5);
        ends(&device);
        assert_eq!(driver.used(), first + 1);
        // What has come once is here.
        let is_there = !lost || first == 2;
        assert_eq!(read.is_right(&driver), is_there);
        assert!(is_there || read.status(&driver) == IOERR);
        // Beside the loop, and not once more on it.
        assert_eq!(refused.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn who_holds_a_machine_waits_for_what_is_just_coming_and_not_for_all_that_is_to_come() {
    const READS: u64 = 10;
    let bench = Bench::new();
    let elsewhere = Elsewhere::default();
    let (gate, asked) = (Arc::clone(&elsewhere.gate), Arc::clone(&elsewhere.asked));
    let closed = lock(&gate);
    let block = elsewhere.block(bench.dir.path()).flushing_aside();
    let mut device = bench.device(block.unwrap());
    let mut driver = bench.driver(&mut device);
    // Each of another part of the disk.
    let reads: Vec<_> = (0..READS).map(|n| offer(&mut driver, n * 200)).collect();
    let flushed = offer_flush(&mut driver);
    driver.notify(&mut device);
    let has_asked = || asked.load(Ordering::Relaxed) as usize;
    while has_asked() < THREADS {
        std::thread::yield_now();
    }
    let mut worker = lock(device.worker());
    assert!(!worker.settle(Instant::now()));
    drop(closed);
    assert!(worker.settle(Instant::now() + PATIENCE));
    assert_eq!(has_asked(), THREADS);
    // What is here is answered before the machine is saved, and the rest is not begun.
    let Worker {
        device: block,
        queues,
        memory,
        ..
    } = &mut *worker;
    block.answer_queue(0, &mut queues[0], memory).unwrap();
    drop(worker);
    assert_eq!(driver.used() as usize, THREADS);
    assert_eq!(has_asked(), THREADS);
    assert_eq!(waiting(&device), READS as usize - THREADS + 1);
    ends(&device);
    assert!(reads.iter().all(|read| read.is_right(&driver)));
    assert_eq!(driver.bytes(flushed, 1), [OK]);
    assert_eq!(
        (u64::from(driver.used()), awaited(&device)),
        (READS + 1, READS)
    );
}

#[test]
fn without_io_uring_what_is_elsewhere_is_waited_for_beside_the_loop_all_the_same() {
    let bench = Bench::new();
    let elsewhere = Elsewhere::default();
    let gate = Arc::clone(&elsewhere.gate);
    let closed = lock(&gate);
    let mut block = elsewhere.block(bench.dir.path());
    block.bringer = Some(Bringer::with(Arc::clone(&block.disk), None));
    let mut device = bench.device(block);
    let mut driver = bench.driver(&mut device);
    let read = offer(&mut driver, 1);
    driver.notify(&mut device);
    assert!(lock(device.worker()).is_at_work());
    drop(closed);
    ends(&device);
    assert!(read.is_right(&driver));
}

#[test]
fn others_are_served_while_a_disk_comes() {
    let bench = Bench::new();
    let elsewhere = Elsewhere::default();
    let gate = Arc::clone(&elsewhere.gate);
    let closed = lock(&gate);
    let block = elsewhere.block(bench.dir.path());
    others_are_served(&bench, block, || drop(closed));
}
