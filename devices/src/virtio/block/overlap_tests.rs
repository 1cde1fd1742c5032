//! Reads that wait together for the host's disk.

use std::{fs, os::unix::fs::FileExt, sync::Mutex};

use branch_disk::{Disk as Branch, Foundation, Mode, anything};
use tempfile::TempDir;
use virtio_bindings::{
    virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET, virtio_mmio::VIRTIO_MMIO_STATUS,
};

use super::*;
use crate::{
    Device,
    virtio::{
        MmioTransport,
        driver::{self, Driver, Part, VERSION_1},
    },
};

const BYTES: usize = 1 << 20;
const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
/// As many as the test driver's queue has room for, and sectors of each.
const READS: u64 = 20;
const SECTORS: u64 = 3;

fn content() -> Vec<u8> {
    let words = (0..BYTES as u64 / 8).map(|at| at.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_le_bytes).collect()
}

fn header(request: u32, sector: u64) -> Vec<u8> {
    let mut header = request.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    header
}

struct Bench {
    dir: TempDir,
    memory: GuestMemory,
}

impl Bench {
    /// With a raw image, and with a disk that branches of the same content, half of it in either of two layers: by turns
    /// of sectors, so that each read is of several pieces.
    fn new() -> Self {
        let bench = Self {
            dir: tempfile::tempdir().unwrap(),
            memory: driver::memory(),
        };
        fs::write(bench.dir.path().join("raw"), content()).unwrap();
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

    /// A raw disk and one that branches, of which nothing is taken from the page cache.
    fn blocks(&self) -> [Block; 2] {
        let raw = Block::open(&self.dir.path().join("raw"), false, "").unwrap();
        let path = self.dir.path().join("branch");
        let branch = Branch::open(&path, Mode::Write, &anything).unwrap();
        let branch = Block::branching(Arc::new(Mutex::new(branch)), "").unwrap();
        [raw, branch].map(|block| {
            block.keep_reads();
            block
        })
    }

    /// Serves reads of all of `sectors` in one round; of each its status, the length used, and what was read.
    fn read(&self, device: &mut MmioTransport, sectors: &[u64]) -> Vec<(u8, u32, Vec<u8>)> {
        let mut driver = Driver::start(device, &self.memory, VERSION_1 | FLUSH);
        let len = (SECTORS * SECTOR_BYTES) as usize;
        let mut places = Vec::new();
        for sector in sectors {
            let header = header(VIRTIO_BLK_T_IN, *sector);
            places.push(driver.offer(&[Part::Out(&header), Part::In(len), Part::In(1)]));
        }
        driver.notify(device);
        assert_eq!(usize::from(driver.used()), sectors.len());
        (0..)
            .zip(places)
            .map(|(nth, places)| {
                let status = driver.bytes(places[2], 1)[0];
                (status, driver.used_len(nth), driver.bytes(places[1], len))
            })
            .collect()
    }
}

fn expected(sector: u64) -> Vec<u8> {
    content()[(sector * SECTOR_BYTES) as usize..][..(SECTORS * SECTOR_BYTES) as usize].to_vec()
}

fn overlapped(device: &MmioTransport) -> u64 {
    let list = Device::metrics(device);
    let mut found = list.iter().filter(|(name, _)| *name == "overlapped_reads");
    found.next().unwrap().1
}

#[test]
fn reads_of_one_round_wait_together_and_read_what_is_there() {
    let bench = Bench::new();
    let sectors: Vec<u64> = (0..READS).map(|n| n * 97 % 2000).collect();
    for block in bench.blocks() {
        let mut device = driver::transport(block, &bench.memory).0;
        let answers = bench.read(&mut device, &sectors);
        for (sector, (status, used, data)) in sectors.iter().zip(answers) {
            assert_eq!((status, used), (OK, 3 * 512 + 1));
            assert!(data == expected(*sector), "sector {sector}");
        }
        assert_eq!(overlapped(&device), READS);
    }
}

#[test]
fn without_io_uring_every_read_is_served_all_the_same() {
    let bench = Bench::new();
    let sectors: Vec<u64> = (0..READS).collect();
    for mut block in bench.blocks() {
        block.overlap = Overlap::Never;
        let mut device = driver::transport(block, &bench.memory).0;
        for (sector, answer) in sectors.iter().zip(bench.read(&mut device, &sectors)) {
            assert!(answer == (OK, 3 * 512 + 1, expected(*sector)));
        }
        assert_eq!(overlapped(&device), 0);
    }
}

#[test]
fn when_the_ring_breaks_every_read_is_served_all_the_same() {
    let bench = Bench::new();
    let sectors: Vec<u64> = (0..READS).collect();
    for mut block in bench.blocks() {
        block.overlap = Overlap::Ready(Box::new(ring::Ring::broken()));
        let mut device = driver::transport(block, &bench.memory).0;
        for (sector, answer) in sectors.iter().zip(bench.read(&mut device, &sectors)) {
            assert!(answer == (OK, 3 * 512 + 1, expected(*sector)));
        }
    }
}

#[test]
fn reads_before_a_broken_request_are_given_back() {
    let bench = Bench::new();
    for block in bench.blocks() {
        let mut device = driver::transport(block, &bench.memory).0;
        let mut driver = Driver::start(&mut device, &bench.memory, VERSION_1 | FLUSH);
        let len = (SECTORS * SECTOR_BYTES) as usize;
        let places = [5, 800].map(|sector| {
            let header = header(VIRTIO_BLK_T_IN, sector);
            let parts = [Part::Out(&header), Part::In(len), Part::In(1)];
            driver.offer(&parts)
        });
        // It has no room for a status.
        driver.offer(&[Part::Out(&header(VIRTIO_BLK_T_IN, 0))]);
        driver.notify(&mut device);
        let status = driver::get(&mut device, VIRTIO_MMIO_STATUS);
        assert_ne!(status & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
        assert_eq!(driver.used(), 2);
        for (nth, (sector, places)) in (0..).zip([5, 800].into_iter().zip(places)) {
            assert_eq!(driver.used_len(nth), 3 * 512 + 1);
            assert_eq!(driver.bytes(places[2], 1), [OK]);
            assert!(driver.bytes(places[1], len) == expected(sector));
        }
    }
}

#[test]
fn one_that_fails_is_an_error_of_its_own() {
    let bench = Bench::new();
    let [raw, _] = bench.blocks();
    let mut device = driver::transport(raw, &bench.memory).0;
    let image = fs::File::options()
        .write(true)
        .open(bench.dir.path().join("raw"))
        .unwrap();
    image.set_len(100 * SECTOR_BYTES).unwrap();
    let answers = bench.read(&mut device, &[5, 99, 7, 300]);
    assert!(answers[0] == (OK, 3 * 512 + 1, expected(5)));
    assert_eq!((answers[1].0, answers[1].1), (IOERR, 1));
    assert!(answers[2] == (OK, 3 * 512 + 1, expected(7)));
    assert_eq!((answers[3].0, answers[3].1), (IOERR, 1));
}

#[test]
fn more_pieces_than_the_kernel_takes_at_once_are_read_in_waves() {
    let bench = Bench::new();
    let [raw, _] = bench.blocks();
    let mut ring = ring::Ring::new().unwrap();
    let file = fs::File::open(bench.dir.path().join("raw")).unwrap();
    let mut read = vec![0; 300 * 512];
    let runs: Vec<Run<'_>> = read.chunks_mut(512).map(Run::of_bytes).collect();
    let pieces: Vec<_> = (0..)
        .zip(&runs)
        .map(|(at, data)| ring::Piece {
            file: std::os::fd::AsRawFd::as_raw_fd(&file),
            offset: at * 512,
            data: data.clone(),
        })
        .collect();
    assert_eq!(ring.read(&pieces).unwrap(), vec![true; 300]);
    drop((pieces, runs, raw));
    assert!(read == content()[..read.len()]);
}

#[test]
fn what_was_just_written_is_taken_from_the_page_cache_where_the_host_can_tell() {
    let bench = Bench::new();
    let block = Block::open(&bench.dir.path().join("raw"), false, "").unwrap();
    let file = fs::File::options()
        .write(true)
        .open(bench.dir.path().join("raw"))
        .unwrap();
    file.write_all_at(&content(), 0).unwrap();
    let mut device = driver::transport(block, &bench.memory).0;
    for (sector, answer) in [1, 9, 4].iter().zip(bench.read(&mut device, &[1, 9, 4])) {
        assert!(answer == (OK, 3 * 512 + 1, expected(*sector)));
    }
    assert_eq!(overlapped(&device), 0);
}
