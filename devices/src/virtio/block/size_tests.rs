//! Disks that grow under a driver.

use std::{fs, sync::Mutex};

use branch_disk::{Disk as Branch, Foundation, Mode, anything};
use tempfile::TempDir;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INT_CONFIG,
    VIRTIO_MMIO_INTERRUPT_STATUS,
};

use super::*;
use crate::{
    Device,
    virtio::{
        MmioTransport,
        driver::{self, Driver, Part, VERSION_1},
    },
};

const BYTES: u64 = 1 << 20;
const LARGER: u64 = 3 << 20;

struct Bench {
    dir: TempDir,
    memory: GuestMemory,
}

impl Bench {
    fn new() -> Self {
        let bench = Self {
            dir: tempfile::tempdir().unwrap(),
            memory: driver::memory(),
        };
        fs::write(bench.dir.path().join("raw"), vec![1; BYTES as usize]).unwrap();
        let path = bench.dir.path().join("branch");
        Branch::create(&path, Some(BYTES), &Foundation::Nothing, &anything).unwrap();
        bench
    }

    fn raw(&self) -> Block {
        Block::open(&self.dir.path().join("raw"), false, "").unwrap()
    }

    fn branch(&self) -> Block {
        let path = self.dir.path().join("branch");
        let disk = Branch::open(&path, Mode::Write, &anything).unwrap();
        Block::branching(Arc::new(Mutex::new(disk)), "").unwrap()
    }
}

fn capacity(device: &mut MmioTransport) -> u64 {
    let mut sectors = [0; 8];
    crate::BusDevice::read(device, VIRTIO_MMIO_CONFIG.into(), &mut sectors);
    u64::from_le_bytes(sectors) * SECTOR_BYTES
}

fn write_last_sector(device: &mut MmioTransport, driver: &mut Driver<'_>, bytes: u64) -> u8 {
    let mut header = VIRTIO_BLK_T_OUT.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend((bytes / SECTOR_BYTES - 1).to_le_bytes());
    let parts = [Part::Out(&header), Part::Out(&[7; 512]), Part::In(1)];
    driver.request(device, &parts).1[0][0]
}

#[test]
fn a_driver_that_runs_is_told_and_can_use_what_is_new() {
    let bench = Bench::new();
    for block in [bench.raw(), bench.branch()] {
        let control = block.control();
        let (mut device, line) = driver::transport(block, &bench.memory);
        let mut driver = Driver::start(&mut device, &bench.memory, VERSION_1 | FLUSH);
        let failed = VIRTIO_BLK_S_IOERR as u8;
        assert_eq!(write_last_sector(&mut device, &mut driver, LARGER), failed);
        let generation = driver::get(&mut device, VIRTIO_MMIO_CONFIG_GENERATION);
        let edges = line.edges();
        control.grow(LARGER).unwrap();
        device.host_side().refresh_config();
        assert_eq!(line.edges(), edges + 1);
        let cause = driver::get(&mut device, VIRTIO_MMIO_INTERRUPT_STATUS);
        assert_ne!(cause & VIRTIO_MMIO_INT_CONFIG, 0);
        let now = driver::get(&mut device, VIRTIO_MMIO_CONFIG_GENERATION);
        assert_ne!(now, generation);
        assert_eq!((capacity(&mut device), control.bytes()), (LARGER, LARGER));
        assert_eq!(write_last_sector(&mut device, &mut driver, LARGER), 0);
        // Asked for once more, it is no news.
        control.grow(LARGER).unwrap();
        device.host_side().refresh_config();
        let again = driver::get(&mut device, VIRTIO_MMIO_CONFIG_GENERATION);
        assert_eq!(again, now);
    }
}

#[test]
fn a_driver_that_does_not_run_yet_is_not_interrupted() {
    let bench = Bench::new();
    let block = bench.raw();
    let control = block.control();
    let (mut device, line) = driver::transport(block, &bench.memory);
    control.grow(LARGER).unwrap();
    device.host_side().refresh_config();
    assert_eq!((line.edges(), capacity(&mut device)), (0, LARGER));
}

#[test]
fn what_has_grown_is_saved_and_restored_so() {
    let bench = Bench::new();
    for open in [Bench::raw, Bench::branch] {
        let block = open(&bench);
        let control = block.control();
        let device = driver::transport(block, &bench.memory).0;
        control.grow(LARGER).unwrap();
        let section = device.save(0).unwrap();
        drop((device, control));
        let mut device = driver::transport(open(&bench), &bench.memory).0;
        device.restore(&section).unwrap();
        assert_eq!(capacity(&mut device), LARGER);
    }
}

#[test]
fn what_cannot_be_meant_is_refused_and_changes_nothing() {
    let bench = Bench::new();
    for block in [bench.raw(), bench.branch()] {
        let control = block.control();
        for bytes in [0, BYTES - 512] {
            let refused = control.grow(bytes);
            assert!(matches!(refused, Err(DiskError::Smaller { .. })));
        }
        let refused = control.grow(BYTES + 1);
        assert!(matches!(refused, Err(DiskError::Size { .. })));
        assert_eq!(control.bytes(), BYTES);
    }
    let block = Block::open(&bench.dir.path().join("raw"), true, "").unwrap();
    let refused = block.control().grow(LARGER);
    assert!(matches!(refused, Err(DiskError::ReadOnly { .. })));
    block.control().grow(BYTES).unwrap(); // It has them.
    let image = fs::metadata(bench.dir.path().join("raw")).unwrap();
    assert_eq!(image.len(), BYTES);
}

#[test]
fn an_image_that_is_longer_already_is_neither_cut_nor_used_in_part() {
    let bench = Bench::new();
    let control = bench.raw().control();
    let path = bench.dir.path().join("raw");
    let image = fs::File::options().write(true).open(&path).unwrap();
    image.set_len(2 * LARGER).unwrap();
    let refused = control.grow(LARGER);
    assert!(matches!(refused, Err(DiskError::MoreThere { .. })));
    assert_eq!(control.bytes(), BYTES);
    assert_eq!(fs::metadata(path).unwrap().len(), 2 * LARGER);
    control.grow(2 * LARGER).unwrap();
    assert_eq!(control.bytes(), 2 * LARGER);
}
