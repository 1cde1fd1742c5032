//! Reads of what is not on this host, beside the loop.

use std::{
    ops::Range,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Instant,
};

use branch_disk::{LayerId, Origin, Rebuild, anything};
use vm_memory::GuestAddress;

use super::{
    bringer_tests::others_are_served,
    fetch::THREADS,
    test_reads::{
        A_WHILE, ATTEMPTS, BYTES, Bench, NOW, Read, awaited, content, drains, ends, kept, offer,
        offer_flush, serve, waiting,
    },
    test_requests::{IOERR, OK, header},
    *,
};
use crate::{
    conformance::{PATIENCE, Subject, conforms},
    event_loop::drain,
    virtio::{
        MMIO_BYTES, MmioTransport,
        driver::{Driver, Part},
    },
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
    assert!(!drains(&device, A_WHILE, A_WHILE));
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

/// Reads of as many parts of the disk.
fn offer_apart(driver: &mut Driver<'_>) -> Vec<Read> {
    (0..READS as u64).map(|n| offer(driver, n * 200)).collect()
}

const READS: usize = 10;

#[test]
fn what_was_not_tried_since_it_was_to_end_early_is_asked_for_again_and_nothing_else() {
    for is_lost in [false, true] {
        // A round that takes the requests may be interrupted.
        assert!((0..ATTEMPTS).any(|_| ends_early_and_goes_on(is_lost)));
    }
}

/// Says whether one round took all requests.
fn ends_early_and_goes_on(is_lost: bool) -> bool {
    let bench = Bench::new();
    let elsewhere = Elsewhere::default();
    elsewhere.is_lost.store(is_lost, Ordering::Relaxed);
    let (gate, asked) = (Arc::clone(&elsewhere.gate), Arc::clone(&elsewhere.asked));
    let has_asked = || asked.load(Ordering::Relaxed) as usize;
    let closed = lock(&gate);
    let block = elsewhere.block(bench.dir.path()).flushing_aside();
    let mut device = bench.device(block.unwrap());
    let mut driver = bench.driver(&mut device);
    let reads = offer_apart(&mut driver);
    let flushed = offer_flush(&mut driver);
    serve(&device);
    if waiting(&device) != READS + 1 {
        return false;
    }
    await_asked(&asked, THREADS);
    assert!(!drains(&device, NOW, NOW));
    drop(closed);
    let soon = Instant::now() + PATIENCE;
    let mut worker = lock(device.worker());
    assert!(worker.settle(soon));
    // What is over is answered before the machine is saved, and nothing is begun. This round may be interrupted, too.
    while driver.used() < THREADS as u16 {
        assert!(worker.answer(0, soon) && Instant::now() < soon);
    }
    drop(worker);
    assert_eq!((driver.used() as usize, has_asked()), (THREADS, THREADS));
    assert_eq!(waiting(&device), READS - THREADS + 1);
    ends(&device);
    for read in &reads {
        assert_eq!(read.is_right(&driver), !is_lost);
        assert_eq!(read.status(&driver), if is_lost { IOERR } else { OK });
    }
    assert_eq!(driver.bytes(flushed, 1), [OK]);
    assert_eq!(driver.used() as usize, READS + 1);
    assert_eq!((has_asked(), awaited(&device) as usize), (READS, READS));
    true
}

#[test]
fn a_read_of_which_a_piece_cannot_be_had_is_an_error_although_another_was_not_tried() {
    assert!((0..ATTEMPTS).any(|_| {
        let bench = Bench::new();
        let elsewhere = Elsewhere::default();
        elsewhere.is_lost.store(true, Ordering::Relaxed);
        let (gate, asked) = (Arc::clone(&elsewhere.gate), Arc::clone(&elsewhere.asked));
        let closed = lock(&gate);
        let mut device = bench.device(elsewhere.block(bench.dir.path()));
        let mut driver = bench.driver(&mut device);
        for sector in [0, 700, 1200] {
            offer(&mut driver, sector);
        }
        let status = offer_of_two_pieces(&mut driver)[2];
        serve(&device);
        if waiting(&device) != THREADS {
            return false;
        }
        await_asked(&asked, THREADS);
        assert!(!drains(&device, NOW, NOW));
        drop(closed);
        let soon = Instant::now() + PATIENCE;
        while waiting(&device) > 0 {
            assert!(lock(device.worker()).answer(0, soon) && Instant::now() < soon);
        }
        assert_eq!(driver.bytes(status, 1), [IOERR]);
        true
    }));
}

/// Waits until it was asked so often.
fn await_asked(asked: &AtomicU32, times: usize) {
    let soon = Instant::now() + PATIENCE;
    while (asked.load(Ordering::Relaxed) as usize) < times {
        assert!(Instant::now() < soon);
        std::thread::yield_now();
    }
}

/// A read of the end of one quarter of a MiB and the beginning of the next, and where its parts are.
fn offer_of_two_pieces(driver: &mut Driver<'_>) -> Vec<GuestAddress> {
    let header = header(VIRTIO_BLK_T_IN, AT_TWO_PIECES);
    driver.offer(&[Part::Out(&header), Part::In(TWO_PIECES), Part::In(1)])
}

/// The sector at which it begins, and its bytes.
const AT_TWO_PIECES: u64 = 400;
const TWO_PIECES: usize = 100 << 10;

#[test]
fn who_holds_a_machine_waits_for_what_is_just_coming_and_not_for_all_that_is_to_come() {
    let held = || {
        let benches = [Bench::new(), Bench::new()];
        let gate = Arc::default();
        let asked = [(); 2].map(|()| Arc::default());
        let closed = lock(&gate);
        let workers = [0, 1].map(|nth| {
            let bench = &benches[nth];
            let elsewhere = Elsewhere {
                gate: Arc::clone(&gate),
                asked: Arc::clone(&asked[nth]),
                ..Elsewhere::default()
            };
            let mut device = bench.device(elsewhere.block(bench.dir.path()));
            let mut driver = bench.driver(&mut device);
            offer_apart(&mut driver);
            serve(&device);
            Arc::clone(device.worker())
        });
        let now = Instant::now();
        std::thread::scope(|scope| {
            let drained = scope.spawn(|| drain(&workers, now + A_WHILE, now + PATIENCE));
            std::thread::sleep(2 * A_WHILE);
            drop(closed);
            assert!(drained.join().unwrap());
        });
        asked.map(|asked: Arc<AtomicU32>| asked.load(Ordering::Relaxed) as usize)
    };
    // On a busy host, the gate may have been opened before it was waited for.
    assert!((0..ATTEMPTS).any(|_| held() == [THREADS; 2]));
}

#[test]
fn something_comes_of_each_batch_however_early_it_ends() {
    let bench = Bench::new();
    for _ in 0..20 {
        let elsewhere = Elsewhere::default();
        let asked = Arc::clone(&elsewhere.asked);
        let mut device = bench.device(elsewhere.block(bench.dir.path()));
        let mut driver = bench.driver(&mut device);
        let read = offer(&mut driver, 5);
        serve(&device);
        lock(device.worker()).end_early();
        assert!(lock(device.worker()).settle(Instant::now() + PATIENCE));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        serve(&device);
        assert!(read.is_right(&driver));
    }
}

#[test]
fn a_read_of_what_is_here_that_becomes_one_of_what_is_not_is_waited_for_beside_the_loop() {
    let bench = Bench::new();
    let elsewhere = Elsewhere::default();
    let gate = Arc::clone(&elsewhere.gate);
    let disk = elsewhere.disk(bench.dir.path());
    lock(&disk).read(0, &mut &mut [0; 4096][..]).unwrap();
    let block = || {
        let block = Block::branching(Arc::clone(&disk), "").unwrap();
        let block = block.reading_aside().unwrap();
        block.keep_reads();
        block
    };
    let (device, driver, mut read) = kept(&bench, block, 1, |driver| offer(driver, 1));
    assert!(lock(device.worker()).settle(Instant::now() + PATIENCE));
    read.sector = 1900;
    driver.store(read.places[0].0 + 8, read.sector);
    let closed = lock(&gate);
    serve(&device);
    assert!(lock(device.worker()).is_at_work());
    drop(closed);
    ends(&device);
    assert!(read.is_right(&driver));
}

#[test]
fn a_driver_does_not_wait_for_all_that_the_one_before_has_asked_for() {
    let bench = Bench::new();
    let elsewhere = Elsewhere::default();
    let (gate, asked) = (Arc::clone(&elsewhere.gate), Arc::clone(&elsewhere.asked));
    let closed = lock(&gate);
    let mut device = bench.device(elsewhere.block(bench.dir.path()));
    let mut driver = bench.driver(&mut device);
    offer_apart(&mut driver);
    serve(&device);
    let mut driver = bench.driver(&mut device);
    drop(closed);
    assert!(lock(device.worker()).settle(Instant::now() + PATIENCE));
    assert!(asked.load(Ordering::Relaxed) <= THREADS as u32);
    let read = offer(&mut driver, 1900);
    ends(&device);
    assert!(read.is_right(&driver));
    assert_eq!(driver.used(), 1);
}

#[test]
fn a_long_read_is_fetched_in_pieces() {
    let bench = Bench::new();
    let elsewhere = Elsewhere::default();
    let asked = Arc::clone(&elsewhere.asked);
    let mut device = bench.device(elsewhere.block(bench.dir.path()));
    let mut driver = bench.driver(&mut device);
    let places = offer_of_two_pieces(&mut driver);
    ends(&device);
    assert_eq!(driver.bytes(places[2], 1), [OK]);
    let at = (AT_TWO_PIECES * SECTOR_BYTES) as usize;
    assert!(driver.bytes(places[1], TWO_PIECES) == content()[at..][..TWO_PIECES]);
    assert_eq!(asked.load(Ordering::Relaxed), 2);
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
