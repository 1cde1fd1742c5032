use std::{fs, os::unix::fs::FileExt, path::PathBuf};

use tempfile::{NamedTempFile, TempDir};
use virtio_queue::desc::split::Descriptor;

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

const SECTORS: u64 = 64;

fn image() -> NamedTempFile {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(SECTORS * SECTOR_BYTES).unwrap();
    image
}

struct Machine {
    image: NamedTempFile,
    memory: GuestMemory,
    device: MmioTransport,
}

impl Machine {
    fn new(read_only: bool) -> Self {
        let image = image();
        let memory = driver::memory();
        let block = Block::open(image.path(), read_only, "disk0").unwrap();
        let device = driver::transport(block, &memory).0;
        Self {
            image,
            memory,
            device,
        }
    }

    /// Runs one request of an `OUT` part `data` and an `IN` part of `room` bytes; returns the status,
    /// the used length and what was read.
    fn request(&mut self, header: &[u8], data: &[u8], room: usize) -> (u8, u32, Vec<u8>) {
        let mut driver = Driver::start(&mut self.device, &self.memory, VERSION_1 | FLUSH);
        let parts = [
            Part::Out(header),
            Part::Out(data),
            Part::In(room),
            Part::In(1),
        ];
        let (used, mut parts) = driver.request(&mut self.device, &parts);
        let status = parts.pop().unwrap()[0];
        (status, used, parts.concat())
    }
}

struct Image {
    image: NamedTempFile,
    memory: GuestMemory,
}

impl Subject for Image {
    type Device = MmioTransport;
    type Saved = SavedBlock;
    const SPAN: u64 = MMIO_BYTES;

    fn new() -> Self {
        Self {
            image: image(),
            memory: driver::memory(),
        }
    }

    fn fresh(&self) -> MmioTransport {
        let block = Block::open(self.image.path(), false, "fresh").unwrap();
        driver::transport(block, &self.memory).0
    }

    fn work(&self, device: &mut MmioTransport) {
        let mut driver = Driver::start(device, &self.memory, VERSION_1 | FLUSH);
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

conforms!(conformance, super::Image);

#[test]
fn what_is_written_is_in_the_image_and_is_read_back() {
    let mut machine = Machine::new(false);
    let data: Vec<u8> = (0..1024u32).map(|i| (i * 7) as u8).collect();
    let (status, used, _) = machine.request(&header(VIRTIO_BLK_T_OUT, 5), &data, 0);
    assert_eq!((status, used), (OK, 1));
    let mut on_disk = vec![0; 1024];
    let image = machine.image.as_file();
    image.read_exact_at(&mut on_disk, 5 * SECTOR_BYTES).unwrap();
    assert_eq!(on_disk, data);
    let (status, used, read) = machine.request(&header(VIRTIO_BLK_T_IN, 5), &[], 1024);
    assert_eq!((status, used), (OK, 1025));
    assert_eq!(read, data);
    let (status, used, _) = machine.request(&header(VIRTIO_BLK_T_FLUSH, 0), &[], 0);
    assert_eq!((status, used), (OK, 1));
}

#[test]
fn a_request_may_be_cut_into_descriptors_anywhere() {
    let mut machine = Machine::new(false);
    let memory = machine.memory.clone();
    let mut driver = Driver::start(&mut machine.device, &memory, VERSION_1 | FLUSH);
    let data: Vec<u8> = (0..512u32).map(|i| (i * 3) as u8).collect();
    let write = [header(VIRTIO_BLK_T_OUT, 2), data.clone()].concat();
    for cut in [1, 4, 15, 16, 17, 400, 512] {
        let (front, back) = write.split_at(cut);
        let parts = [Part::Out(front), Part::Out(back), Part::In(1)];
        let (used, status) = driver.request(&mut machine.device, &parts);
        assert_eq!((used, status), (1, vec![vec![OK]]), "cut at {cut}");
        let read = header(VIRTIO_BLK_T_IN, 2);
        let parts = [Part::Out(&read), Part::In(cut), Part::In(513 - cut)];
        let (used, mut read) = driver.request(&mut machine.device, &parts);
        assert_eq!(read[1].pop(), Some(OK));
        assert_eq!((used, read.concat()), (513, data.clone()));
    }
}

#[test]
fn requests_beyond_the_disk_or_not_of_whole_sectors_fail() {
    let mut machine = Machine::new(false);
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (1 << 55, 512),
        (0, 511),
    ] {
        for request in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
            let (out, room) = match request {
                VIRTIO_BLK_T_IN => (0, len),
                _ => (len, 0),
            };
            let answer = machine.request(&header(request, sector), &vec![1; out], room);
            assert_eq!((answer.0, answer.1), (IOERR, 1), "{sector} {len}");
        }
    }
    assert_eq!(
        fs::metadata(machine.image.path()).unwrap().len(),
        SECTORS * SECTOR_BYTES
    );
}

#[test]
fn a_disk_that_shrinks_is_an_error_of_the_request() {
    let mut machine = Machine::new(false);
    machine.image.as_file().set_len(SECTOR_BYTES).unwrap();
    let answer = machine.request(&header(VIRTIO_BLK_T_IN, 0), &[], 1024);
    assert_eq!(answer.0, IOERR);
    let answer = machine.request(&header(VIRTIO_BLK_T_IN, 0), &[], 512);
    assert_eq!(answer.0, OK);
}

#[test]
fn the_guest_learns_the_identity() {
    let mut machine = Machine::new(false);
    let (status, used, id) = machine.request(&header(VIRTIO_BLK_T_GET_ID, 0), &[], ID_BYTES);
    assert_eq!((status, used), (OK, 21));
    assert_eq!(&id, b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn other_requests_are_unsupported() {
    let mut machine = Machine::new(false);
    let answer = machine.request(&header(99, 0), &[0; 16], 0);
    assert_eq!((answer.0, answer.1), (UNSUPP, 1));
}

#[test]
fn a_read_only_disk_says_so_and_is_not_written() {
    let mut machine = Machine::new(true);
    assert_eq!(
        lock(machine.device.worker()).device.features() & READ_ONLY,
        READ_ONLY
    );
    let answer = machine.request(&header(VIRTIO_BLK_T_OUT, 0), &[1; 512], 0);
    assert_eq!(answer.0, IOERR);
    let (status, _, data) = machine.request(&header(VIRTIO_BLK_T_IN, 0), &[], 512);
    assert_eq!((status, data), (OK, vec![0; 512]));
}

#[test]
fn the_configuration_space_gives_capacity_and_limits() {
    let mut machine = Machine::new(false);
    let mut config = [0xff; 20];
    crate::BusDevice::read(&mut machine.device, 0x100, &mut config);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[8..12], (256u32 << 10).to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[16..], [0; 4]);
}

fn metric(device: &MmioTransport, name: &str) -> u64 {
    let list = Device::metrics(device);
    list.iter().find(|(n, _)| *n == name).unwrap().1
}

#[test]
fn a_driver_that_does_not_flush_has_every_write_flushed_also_after_a_restore() {
    for (features, flushes) in [(VERSION_1, 1), (VERSION_1 | FLUSH, 0)] {
        let subject = Image::new();
        let header = header(VIRTIO_BLK_T_OUT, 1);
        let parts = [Part::Out(&header), Part::Out(&[7; 512]), Part::In(1)];
        let mut device = subject.fresh();
        let mut driver = Driver::start(&mut device, &subject.memory, features);
        driver.request(&mut device, &parts);
        assert_eq!(metric(&device, "flushes"), flushes);
        let section = device.save(0).unwrap();
        drop(device);
        let mut device = subject.fresh();
        device.restore(&section).unwrap();
        driver.request(&mut device, &parts);
        assert_eq!(metric(&device, "writes"), 1);
        assert_eq!(metric(&device, "flushes"), flushes);
    }
}

#[test]
fn the_largest_request_is_served_and_a_larger_one_fails() {
    const TABLE: u64 = 0x4000;
    const HEADER: u64 = 0x6000;
    const STATUS: u64 = 0x6010;
    /// All parts of the data are in the same half of guest memory.
    const DATA: u64 = driver::MEMORY_BYTES / 2;
    let image = image();
    image.as_file().set_len(2 * MAX_REQUEST_BYTES).unwrap();
    let memory = driver::memory();
    let block = Block::open(image.path(), false, "").unwrap();
    let mut device = driver::transport(block, &memory).0;
    let pieces = MAX_REQUEST_BYTES / DATA;
    assert_eq!(pieces * DATA, MAX_REQUEST_BYTES);
    for (pieces, status) in [(pieces, OK), (pieces + 1, IOERR)] {
        let driver = Driver::start(&mut device, &memory, VERSION_1 | FLUSH | 1 << 28);
        let header: [u8; 16] = header(VIRTIO_BLK_T_IN, 0).try_into().unwrap();
        driver.store(HEADER, header);
        driver.store(STATUS, 0xffu8);
        let mut table = vec![Descriptor::new(HEADER, 16, 1, 1)];
        for next in 2..pieces as u16 + 2 {
            table.push(Descriptor::new(DATA, DATA as u32, 1 | 2, next));
        }
        table.push(Descriptor::new(STATUS, 1, 2, 0));
        for (descriptor, slot) in table.iter().zip(0..) {
            driver.store(TABLE + 16 * slot, *descriptor);
        }
        driver.describe(0, TABLE, 16 * table.len() as u32, 4, 0);
        driver.publish(0);
        lock(device.worker()).process(0);
        assert_eq!(driver.used(), 1);
        assert_eq!(driver.load::<u8>(STATUS), status);
    }
}

#[test]
fn an_image_in_use_is_refused_but_readers_share() {
    let image = image();
    let open = |read_only| Block::open(image.path(), read_only, "");
    let writer = open(false).unwrap();
    assert!(matches!(open(false), Err(DiskError::InUse { .. })));
    assert!(matches!(open(true), Err(DiskError::InUse { .. })));
    drop(writer);
    let reader = open(true).unwrap();
    let other = open(true).unwrap();
    assert!(matches!(open(false), Err(DiskError::InUse { .. })));
    drop((reader, other));
    open(false).unwrap();
}

#[test]
fn what_is_not_a_disk_is_refused() {
    let folder = TempDir::new().unwrap();
    let open = |name: &str, read_only| Block::open(&folder.path().join(name), read_only, "");
    assert!(matches!(open("none", true), Err(DiskError::Open { .. })));
    assert!(matches!(open(".", true), Err(DiskError::NotADisk { .. })));
    let fifo = folder.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    assert!(matches!(
        open("fifo", true),
        Err(DiskError::NotADisk { .. })
    ));
    fs::write(folder.path().join("odd"), [0; 513]).unwrap();
    assert!(matches!(
        open("odd", true),
        Err(DiskError::PartialSector { bytes: 513, .. })
    ));
    let long = Block::open(&folder.path().join("odd"), true, "twenty-one characters");
    assert!(matches!(long, Err(DiskError::LongId { .. })));
}

/// The section of a disk on `image`, with an identity.
fn saved(image: &NamedTempFile) -> Section {
    let block = Block::open(image.path(), false, "saved").unwrap();
    let device = driver::transport(block, &driver::memory()).0;
    device.save(0).unwrap()
}

#[test]
fn a_section_names_the_image_and_its_identity_is_restored() {
    let image = image();
    let section = saved(&image);
    let state: SavedBlock = section.decode().unwrap();
    assert_eq!(
        PathBuf::from(&state.path),
        image.path().canonicalize().unwrap()
    );
    assert_eq!(state.capacity_sectors, SECTORS);
    assert_eq!((state.read_only, state.id.as_str()), (false, "saved"));
    let mut block = Block::open(image.path(), false, "other").unwrap();
    block.restore(&section).unwrap();
    assert_eq!(block.id, "saved");
}

#[test]
fn another_disk_than_the_saved_one_is_refused() {
    let image = image();
    let section = saved(&image);
    let mut block = Block::open(image.path(), true, "").unwrap();
    assert!(matches!(
        block.restore(&section),
        Err(Error::Disk(DiskError::ModeChanged { .. }))
    ));
    image
        .as_file()
        .set_len((SECTORS + 1) * SECTOR_BYTES)
        .unwrap();
    drop(block);
    let mut block = Block::open(image.path(), false, "").unwrap();
    let error = block.restore(&section).unwrap_err().to_string();
    assert!(error.contains("has 65 sectors, but had 64"), "{error}");
}
