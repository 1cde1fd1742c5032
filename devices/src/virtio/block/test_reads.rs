//! Disks whose reads wait beside the loop, and such reads, for tests.

use std::{
    fs,
    sync::{LazyLock, Mutex},
    time::{Duration, Instant},
};

use branch_disk::{Disk as Branch, Foundation, Mode, anything};
use tempfile::TempDir;
use vm_memory::GuestAddress;

use super::{
    fetch_tests::Elsewhere,
    test_requests::{OK, header},
    *,
};
use crate::{
    Device,
    conformance::PATIENCE,
    event_loop::drain,
    virtio::{
        MmioTransport,
        driver::{self, Driver, Part, VERSION_1},
    },
};

pub(super) const BYTES: usize = 1 << 20;
/// What a round keeps here: room for two long reads.
pub(super) const KEPT_BYTES: u64 = 250 << 10;
/// For which nobody waits.
pub(super) const NOW: Duration = Duration::ZERO;
/// Longer than anything here takes that does not wait.
pub(super) const A_WHILE: Duration = Duration::from_millis(20);
/// Sectors of a read.
pub(super) const SECTORS: u64 = 3;
pub(super) const LEN: usize = (SECTORS * SECTOR_BYTES) as usize;

static CONTENT: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let words = (0..BYTES as u64 / 8).map(|at| at.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_le_bytes).collect()
});

pub(super) fn content() -> &'static [u8] {
    &CONTENT
}

pub(super) fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// A raw image, and a disk that branches of the same content, half of it in either of two layers: by turns of sectors, so that each
/// read is of several parts.
pub(super) struct Bench {
    pub(super) dir: TempDir,
    memory: GuestMemory,
}

impl Bench {
    pub(super) fn new() -> Self {
        let bench = Self {
            dir: tempfile::tempdir().unwrap(),
            memory: driver::memory(),
        };
        fs::write(bench.raw(), content()).unwrap();
        let path = bench.dir.path().join("branch");
        let mut disk =
            Branch::create(&path, Some(BYTES as u64), &Foundation::Nothing, &anything).unwrap();
        for half in 0..2 {
            for (sector, bytes) in content().chunks(512).enumerate() {
                if sector % 2 == half {
                    disk.write(sector as u64 * 512, &mut &*bytes).unwrap();
                }
            }
            if half == 0 {
                disk.cut(disk.prepare().unwrap()).unwrap().finish().unwrap();
            }
        }
        bench
    }

    pub(super) fn raw(&self) -> std::path::PathBuf {
        self.dir.path().join("raw")
    }

    /// A raw disk of which nothing is taken from the page cache.
    pub(super) fn block(&self) -> Block {
        let block = Block::open(&self.raw(), false, "").unwrap();
        let block = block.reading_aside().unwrap();
        block.keep_reads();
        block
    }

    /// That, one that branches, and one that branches of what is not here yet.
    pub(super) fn blocks(&self) -> [Block; 3] {
        let path = self.dir.path().join("branch");
        let branch = Branch::open(&path, Mode::Write, &anything).unwrap();
        let [branch, comes] = [
            Arc::new(Mutex::new(branch)),
            Elsewhere::default().disk(self.dir.path()),
        ]
        .map(|disk| {
            let block = Block::branching(disk, "").unwrap();
            block.reading_aside().unwrap()
        });
        branch.keep_reads();
        [self.block(), branch, comes]
    }

    pub(super) fn device(&self, block: Block) -> MmioTransport {
        driver::transport(block, &self.memory).0
    }

    pub(super) fn driver(&self, device: &mut MmioTransport) -> Driver<'_> {
        Driver::start(device, &self.memory, VERSION_1 | FLUSH)
    }
}

/// A read, and where its parts are.
pub(super) struct Read {
    pub(super) sector: u64,
    pub(super) places: Vec<GuestAddress>,
}

pub(super) fn offer(driver: &mut Driver<'_>, sector: u64) -> Read {
    let header = header(VIRTIO_BLK_T_IN, sector);
    let parts = [Part::Out(&header), Part::In(LEN), Part::In(1)];
    let places = driver.offer(&parts);
    // Neither answer is there yet.
    driver.store(places[2].0, 0xffu8);
    Read { sector, places }
}

/// A flush, and where its status is.
pub(super) fn offer_flush(driver: &mut Driver<'_>) -> GuestAddress {
    driver.offer(&[Part::Out(&header(VIRTIO_BLK_T_FLUSH, 0)), Part::In(1)])[1]
}

impl Read {
    pub(super) fn status(&self, driver: &Driver<'_>) -> u8 {
        driver.bytes(self.places[2], 1)[0]
    }

    pub(super) fn is_right(&self, driver: &Driver<'_>) -> bool {
        let at = (self.sector * SECTOR_BYTES) as usize;
        self.status(driver) == OK && driver.bytes(self.places[1], LEN) == content()[at..at + LEN]
    }
}

/// Serves one round, which answers no read that it keeps.
pub(super) fn serve(device: &MmioTransport) {
    lock(device.worker()).process(0);
}

/// How often a round may be interrupted before it has taken all that a test offers: it ends at its time.
pub(super) const ATTEMPTS: usize = 20;

/// Has `offer` make requests of what `block` makes, of which one round keeps so many; what it then has of them, with the device and its driver.
pub(super) fn kept<'b, T>(
    bench: &'b Bench,
    block: impl Fn() -> Block,
    count: usize,
    offer: impl Fn(&mut Driver<'b>) -> T,
) -> (MmioTransport, Driver<'b>, T) {
    for _ in 0..ATTEMPTS {
        let mut device = bench.device(block());
        let mut driver = bench.driver(&mut device);
        let offered = offer(&mut driver);
        serve(&device);
        if waiting(&device) == count {
            return (device, driver, offered);
        }
        // Else its image is in use.
        ends(&device);
    }
    panic!("no round keeps {count} requests");
}

/// Serves until nothing is under way.
pub(super) fn ends(device: &MmioTransport) {
    assert!(drains(device, PATIENCE, PATIENCE));
}

/// Serves for so long, as before a machine is saved, and answers what was begun; says whether it is over within `bound`.
pub(super) fn drains(device: &MmioTransport, serves: Duration, bound: Duration) -> bool {
    let now = Instant::now();
    drain(&[Arc::clone(device.worker())], now + serves, now + bound)
}

pub(super) fn waiting(device: &MmioTransport) -> usize {
    let section = Device::save(device, 0).unwrap();
    section.decode::<SavedBlock>().unwrap().waiting.len()
}

pub(super) fn awaited(device: &MmioTransport) -> u64 {
    let list = Device::metrics(device);
    let mut found = list.iter().filter(|(name, _)| *name == "awaited_reads");
    found.next().unwrap().1
}
