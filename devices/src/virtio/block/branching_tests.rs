//! Disks that branch, and what discards and zeroes do to either kind.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Mutex,
};

use branch_disk::{Disk as Branch, Foundation, Mode, anything};
use tempfile::TempDir;

use super::{
    test_requests::{IOERR, OK, UNSUPP, header},
    *,
};
use crate::{
    Device,
    conformance::{Subject, conforms},
    sync::lock,
    virtio::{
        MMIO_BYTES, MmioTransport,
        driver::{self, Driver, Part, VERSION_1},
    },
};

const BYTES: u64 = 1 << 20;
const ALL: u64 = VERSION_1 | FLUSH | DISCARD | WRITE_ZEROES;

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend(sectors.to_le_bytes());
    range.extend(flags.to_le_bytes());
    range
}

/// A directory with a base full of ones, a disk `branch` on it, and a raw image `raw` like the base.
struct Bench {
    dir: TempDir,
    memory: GuestMemory,
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn branch(&self) -> SharedDisk {
        let disk = Branch::open(&self.path("branch"), Mode::Write, &anything).unwrap();
        Arc::new(Mutex::new(disk))
    }

    fn device(&self, block: Block) -> MmioTransport {
        driver::transport(block, &self.memory).0
    }

    /// A request of `data` and `room`, with its status and what was read.
    fn request(
        &self,
        device: &mut MmioTransport,
        features: u64,
        header: &[u8],
        data: &[u8],
        room: usize,
    ) -> (u8, Vec<u8>) {
        let mut driver = Driver::start(device, &self.memory, features);
        let parts = [
            Part::Out(header),
            Part::Out(data),
            Part::In(room),
            Part::In(1),
        ];
        let (_, mut parts) = driver.request(device, &parts);
        let status = parts.pop().unwrap()[0];
        (status, parts.concat())
    }

    /// A device of each kind, and its file.
    fn both(&self) -> [(MmioTransport, PathBuf); 2] {
        let raw = Block::open(&self.path("raw"), false, "").unwrap();
        let branch = Block::branching(self.branch(), "").unwrap();
        [
            (self.device(raw), self.path("raw")),
            (self.device(branch), self.path("branch")),
        ]
    }
}

impl Subject for Bench {
    type Device = MmioTransport;
    type Saved = SavedBlock;
    const SPAN: u64 = MMIO_BYTES;

    fn new() -> Self {
        let bench = Self {
            dir: tempfile::tempdir().unwrap(),
            memory: driver::memory(),
        };
        for name in ["base", "raw"] {
            fs::write(bench.path(name), vec![1; BYTES as usize]).unwrap();
        }
        let on = Foundation::Raw(bench.path("base"));
        Branch::create(&bench.path("branch"), None, &on, &anything).unwrap();
        bench
    }

    fn fresh(&self) -> MmioTransport {
        self.device(Block::branching(self.branch(), "fresh").unwrap())
    }

    fn work(&self, device: &mut MmioTransport) {
        let mut driver = Driver::start(device, &self.memory, ALL);
        let header = header(VIRTIO_BLK_T_OUT, 1);
        let parts = [Part::Out(&header), Part::Out(&[7; 512]), Part::In(1)];
        driver.request(device, &parts);
        driver.offer(&parts);
    }

    fn go_on(&self, device: &mut MmioTransport) {
        device.resume();
        lock(device.worker()).process(0);
    }
}

conforms!(conformance, super::Bench);

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn what_is_written_is_read_back_and_the_rest_is_the_base() {
    let bench = Bench::new();
    let mut device = bench.fresh();
    let data: Vec<u8> = (0..3 * 512u32).map(|i| (i * 7) as u8).collect();
    let write = header(VIRTIO_BLK_T_OUT, 5);
    assert_eq!(bench.request(&mut device, ALL, &write, &data, 0).0, OK);
    let flush = header(VIRTIO_BLK_T_FLUSH, 0);
    assert_eq!(bench.request(&mut device, ALL, &flush, &[], 0).0, OK);
    let read = header(VIRTIO_BLK_T_IN, 3);
    let expected = [&[1; 1024], &data[..], &[1; 512]].concat();
    let answer = bench.request(&mut device, ALL, &read, &[], expected.len());
    assert_eq!(answer, (OK, expected));
    let beyond = header(VIRTIO_BLK_T_IN, BYTES / 512);
    assert_eq!(bench.request(&mut device, ALL, &beyond, &[], 512).0, IOERR);
}

#[test]
fn a_discard_gives_space_back_and_zeroes_are_zeros() {
    let bench = Bench::new();
    for (mut device, path) in bench.both() {
        let mut ask = |request: u32, sector: u64, data: &[u8], room| {
            bench.request(&mut device, ALL, &header(request, sector), data, room)
        };
        assert_eq!(ask(VIRTIO_BLK_T_OUT, 0, &[9; 256 << 10], 0).0, OK);
        let before = allocated(&path);
        assert_eq!(ask(VIRTIO_BLK_T_DISCARD, 0, &range(0, 256, 0), 0).0, OK);
        let after = allocated(&path);
        assert!(after + (128 << 10) <= before, "{after} after {before}");
        // What the guest asked to be zeros is, with its space or without.
        for flags in [0, 1] {
            assert_eq!(ask(VIRTIO_BLK_T_OUT, 300, &[9; 4096], 0).0, OK);
            let zeroes = range(301, 5, flags);
            assert_eq!(ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &zeroes, 0).0, OK);
            let expected = [vec![9; 512], vec![0; 5 * 512], vec![9; 1024]].concat();
            assert_eq!(ask(VIRTIO_BLK_T_IN, 300, &[], 4096), (OK, expected));
        }
    }
}

#[test]
fn a_discarded_block_of_the_base_is_zeros() {
    let bench = Bench::new();
    let mut device = bench.fresh();
    let discard = header(VIRTIO_BLK_T_DISCARD, 0);
    let answer = bench.request(&mut device, ALL, &discard, &range(8, 8, 0), 0);
    assert_eq!(answer.0, OK);
    let read = header(VIRTIO_BLK_T_IN, 7);
    let expected = [vec![1; 512], vec![0; 4096], vec![1; 512]].concat();
    let answer = bench.request(&mut device, ALL, &read, &[], expected.len());
    assert_eq!(answer, (OK, expected));
}

#[test]
fn discards_that_cannot_be_meant_are_refused() {
    let bench = Bench::new();
    let mut device = bench.fresh();
    let last = BYTES / 512 - 1;
    let cases = [
        (VIRTIO_BLK_T_DISCARD, ALL, range(0, 1, 1), UNSUPP),
        (VIRTIO_BLK_T_DISCARD, ALL, range(0, 1, 2), UNSUPP),
        (VIRTIO_BLK_T_WRITE_ZEROES, ALL, range(0, 1, 2), UNSUPP),
        (VIRTIO_BLK_T_DISCARD, ALL, range(last, 2, 0), IOERR),
        (VIRTIO_BLK_T_DISCARD, ALL, range(u64::MAX, 2, 0), IOERR),
        (VIRTIO_BLK_T_DISCARD, ALL, range(0, u32::MAX, 0), IOERR),
        (
            VIRTIO_BLK_T_WRITE_ZEROES,
            ALL,
            range(0, MAX_ZEROES_SECTORS + 1, 0),
            IOERR,
        ),
        (
            VIRTIO_BLK_T_DISCARD,
            ALL,
            range(0, 1, 0)[..15].to_vec(),
            IOERR,
        ),
        (
            VIRTIO_BLK_T_DISCARD,
            ALL,
            [range(0, 1, 0), range(2, 1, 0)].concat(),
            IOERR,
        ),
        // Whoever has not said that he knows of it does not get it.
        (
            VIRTIO_BLK_T_DISCARD,
            VERSION_1 | FLUSH,
            range(0, 1, 0),
            UNSUPP,
        ),
        (
            VIRTIO_BLK_T_WRITE_ZEROES,
            VERSION_1 | DISCARD,
            range(0, 1, 0),
            UNSUPP,
        ),
        (VIRTIO_BLK_T_DISCARD, ALL, range(last, 1, 0), OK),
    ];
    for (request, features, data, status) in cases {
        let answer = bench.request(&mut device, features, &header(request, 0), &data, 0);
        assert_eq!(answer.0, status, "{request} {features:x} {data:?}");
    }
}

#[test]
fn a_disk_that_is_only_read_offers_no_discard() {
    let bench = Bench::new();
    let disk = Branch::open(&bench.path("branch"), Mode::Read, &anything).unwrap();
    let block = Block::branching(Arc::new(Mutex::new(disk)), "").unwrap();
    assert_eq!(
        block.features() & (READ_ONLY | DISCARD | WRITE_ZEROES),
        READ_ONLY
    );
    assert_eq!(block.config()[36..], [0; 24]);
    let mut device = bench.device(block);
    let write = header(VIRTIO_BLK_T_OUT, 0);
    let answer = bench.request(&mut device, VERSION_1, &write, &[2; 512], 0);
    assert_eq!(answer.0, IOERR);
}

#[test]
fn the_limits_of_discards_and_zeroes_are_told() {
    let bench = Bench::new();
    let config = Block::branching(bench.branch(), "").unwrap().config();
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    // max_discard_sectors, max_discard_seg, discard_sector_alignment, max_write_zeroes_sectors, max_write_zeroes_seg.
    let told = [36, 40, 44, 48, 52].map(word);
    assert_eq!(told, [1 << 21, 1, 8, 130_048, 1]);
    assert_eq!((config[56], config.len()), (1, 60));
}

#[test]
fn a_raw_image_is_raw_whatever_its_guest_writes_into_it() {
    let bench = Bench::new();
    let layer = fs::read(bench.path("branch")).unwrap();
    let mut image = layer.clone();
    image.truncate(64 << 10);
    fs::write(bench.path("raw"), &image).unwrap();
    let mut device = bench.device(Block::open(&bench.path("raw"), false, "").unwrap());
    let read = header(VIRTIO_BLK_T_IN, 0);
    let answer = bench.request(&mut device, ALL, &read, &[], 4096);
    assert_eq!(answer, (OK, layer[..4096].to_vec()));
}

#[test]
fn a_cut_between_two_writes_is_between_them() {
    let bench = Bench::new();
    let disk = bench.branch();
    let mut device = bench.device(Block::branching(Arc::clone(&disk), "").unwrap());
    let write = header(VIRTIO_BLK_T_OUT, 0);
    assert_eq!(bench.request(&mut device, ALL, &write, &[2; 512], 0).0, OK);
    let next = lock(&disk).plan().prepare().unwrap();
    let cut = lock(&disk).cut(next).unwrap();
    assert_eq!(bench.request(&mut device, ALL, &write, &[3; 512], 0).0, OK);
    let layer = cut.finish().unwrap();
    let branch = Branch::branch(&layer.path, Some(layer.id), &anything).unwrap();
    let mut sector = [0; 512];
    branch.read(0, &mut &mut sector[..]).unwrap();
    assert_eq!(sector, [2; 512]);
}
