//! The block device on a raw image, which grows while the driver is at work.

use std::{fs, num::NonZeroU64, path::PathBuf, time::Duration};

use devices::{
    BusDevice, RateLimit, StoppedClock,
    virtio::{
        MmioTransport, VirtioDevice,
        block::{Block, DiskControl, DiskError, DiskLimits, SECTOR_BYTES},
    },
};
use fuzz_harness::Input;
use virtio_bindings::{virtio_blk::*, virtio_mmio::VIRTIO_MMIO_CONFIG};

use crate::{
    Bench, Part, Subject,
    guest::{self, any_part},
    scratch::Scratch,
};

pub(crate) const SECTORS: u64 = 128;
pub(crate) const BYTES: usize = (SECTORS * SECTOR_BYTES) as usize;
const FILL: u8 = 0x5a;
/// A disk grows up to so many sectors.
const MOST_SECTORS: u64 = 4 * SECTORS;

thread_local! {
    static SCRATCH: Scratch = Scratch::new();
}

/// An image of [`BYTES`], or more once it has grown.
pub struct Raw {
    path: PathBuf,
    read_only: bool,
    keep_reads: bool,
    throttled: Throttled,
    control: Option<DiskControl>,
}

/// A disk's limits, and what tells them the time.
pub(crate) struct Throttled {
    limits: DiskLimits,
    clock: StoppedClock,
}

impl Throttled {
    pub(crate) fn new(how: u8) -> Self {
        Self {
            limits: Self::limits(how),
            clock: StoppedClock::new(),
        }
    }

    /// None, or on writes, on all requests, or on both, so that what a program asks for has to wait. Who forges what was saved may
    /// set any.
    fn limits(how: u8) -> DiskLimits {
        let limit = |on: bool, bytes, operations| RateLimit {
            bytes_per_second: NonZeroU64::new(bytes).filter(|_| on),
            operations_per_second: NonZeroU64::new(operations).filter(|_| on),
        };
        DiskLimits {
            total: limit(how & 8 != 0, 20_000, 20),
            reads: RateLimit::default(),
            writes: limit(how & 4 != 0, 5_000, 10),
        }
    }

    pub(crate) fn limit(&self, block: Block) -> Block {
        let mut block = block.limited(self.limits);
        block.stop_clock(&self.clock);
        block
    }

    /// Lets time pass, or changes the limits.
    pub(crate) fn outside(
        &self,
        control: &Option<DiskControl>,
        transport: &MmioTransport,
        input: &mut Input<'_>,
    ) {
        if input.flag() {
            self.clock
                .pass(Duration::from_millis(10 * u64::from(input.byte())));
        } else {
            of_device(control).set_limits(Self::limits(input.byte()));
        }
        transport.serve(0);
    }

    /// Lets so much time pass that everything is paid for.
    fn pass_all(&self) {
        self.clock.pass(Duration::from_secs(1 << 50));
    }
}

impl Subject for Raw {
    fn new(input: &mut Input<'_>) -> Self {
        let path = SCRATCH.with(|scratch| scratch.path("disk"));
        fs::write(&path, [FILL; BYTES]).expect("there is room");
        let how = input.byte();
        Self {
            path,
            read_only: how & 1 != 0,
            keep_reads: how & 2 != 0,
            throttled: Throttled::new(how),
            control: None,
        }
    }

    fn device(&mut self) -> Box<dyn VirtioDevice> {
        // It has the image open.
        self.control = None;
        let block = Block::open(&self.path, self.read_only, "disk").expect("nobody else has it");
        let block = self.throttled.limit(block);
        let block = aside(block, self.keep_reads);
        self.control = Some(block.control());
        Box::new(block)
    }

    fn compose(&mut self, _queue: u16, input: &mut Input<'_>) -> Vec<Part> {
        compose(sectors(&self.control), input)
    }

    fn outside(&mut self, transport: &MmioTransport, input: &mut Input<'_>) {
        if input.flag() {
            return self.throttled.outside(&self.control, transport, input);
        }
        let sectors = sectors(&self.control);
        match grow(&self.control, transport, input) {
            Err(DiskError::ReadOnly { .. }) => assert!(self.read_only),
            Err(error) => panic!("{error}"),
            Ok(()) => assert!(!self.read_only || sectors == SECTORS),
        }
    }

    fn prove(&mut self, bench: &mut Bench) {
        prove(
            bench,
            self.read_only,
            sectors(&self.control),
            &self.throttled,
        );
    }

    fn finish(self) {
        let content = fs::read(&self.path).expect("it is there");
        let bytes = sectors(&self.control) * SECTOR_BYTES;
        assert_eq!(content.len() as u64, bytes, "the image has another size");
        if self.read_only {
            assert!(
                content.iter().all(|byte| *byte == FILL),
                "it was written to"
            );
        }
    }
}

/// The disk; if `keep_reads`, each of its reads is made in the round behind the one that it was asked for in.
pub(crate) fn aside(block: Block, keep_reads: bool) -> Block {
    if !keep_reads {
        return block;
    }
    let block = block.reading_aside().expect("there are eventfds");
    block.keep_reads();
    block
}

/// Sectors of the disk that the device has.
pub(crate) fn sectors(control: &Option<DiskControl>) -> u64 {
    of_device(control).bytes() / SECTOR_BYTES
}

/// Has the disk become larger, if it is not too large, and the driver told of it.
pub(crate) fn grow(
    control: &Option<DiskControl>,
    transport: &MmioTransport,
    input: &mut Input<'_>,
) -> Result<(), DiskError> {
    let control = of_device(control);
    let bytes = control.bytes() + u64::from(input.byte()) * SECTOR_BYTES;
    if bytes <= MOST_SECTORS * SECTOR_BYTES {
        control.grow(bytes)?;
        transport.host_side().refresh_config();
    }
    Ok(())
}

fn of_device(control: &Option<DiskControl>) -> &DiskControl {
    control.as_ref().expect("there is a device")
}

/// A request of a disk's of so many sectors.
pub(crate) fn compose(sectors: u64, input: &mut Input<'_>) -> Vec<Part> {
    let request = match input.byte() {
        255 => input.word(),
        other => [
            VIRTIO_BLK_T_IN,
            VIRTIO_BLK_T_OUT,
            VIRTIO_BLK_T_FLUSH,
            VIRTIO_BLK_T_GET_ID,
            VIRTIO_BLK_T_DISCARD,
            VIRTIO_BLK_T_WRITE_ZEROES,
        ][usize::from(other % 6)],
    };
    let mut header = request.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector(sectors, input).to_le_bytes());
    let data = match request {
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            let mut range = sector(sectors, input).to_le_bytes().to_vec();
            let sectors = match input.byte() {
                255 => input.word(),
                sectors => sectors.into(),
            };
            range.extend(sectors.to_le_bytes());
            range.extend(u32::from(input.byte() % 3).to_le_bytes());
            vec![Part::Out(range)]
        }
        VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => {
            let bytes = 512 * usize::from(input.byte() % 9);
            vec![if request == VIRTIO_BLK_T_IN {
                Part::In(bytes as u32)
            } else {
                Part::Out(vec![input.byte(); bytes])
            }]
        }
        _ => vec![any_part(input)],
    };
    let mut parts = [vec![Part::Out(header)], data, vec![Part::In(1)]].concat();
    // Sometimes another shape.
    match input.byte() {
        0..200 => {}
        200..220 => parts.swap(0, 1),
        220..240 => parts.truncate(2),
        _ => parts.extend(guest::any_parts(input)),
    }
    parts
}

fn sector(sectors: u64, input: &mut Input<'_>) -> u64 {
    match input.byte() {
        sector @ 0..200 => u64::from(sector) % SECTORS,
        near @ 200..250 => sectors.wrapping_sub(u64::from(near % 4)),
        _ => input.long(),
    }
}

/// What is written is read, by each of several requests of one round too, and the driver knows how large the disk is.
pub(crate) fn prove(bench: &mut Bench, read_only: bool, sectors: u64, throttled: &Throttled) {
    let header = |request: u32, sector: u64| {
        let mut bytes = u64::from(request).to_le_bytes().to_vec();
        bytes.extend(sector.to_le_bytes());
        Part::Out(bytes)
    };
    let ok = vec![VIRTIO_BLK_S_OK as u8];
    let pattern: Vec<u8> = (0..1024).map(|at| (at % 251) as u8).collect();
    let parts = [
        header(VIRTIO_BLK_T_OUT, 5),
        Part::Out(pattern.clone()),
        Part::In(1),
    ];
    throttled.pass_all();
    let (len, status) = bench.request(0, &parts);
    let expected = if read_only {
        vec![VIRTIO_BLK_S_IOERR as u8]
    } else {
        ok.clone()
    };
    assert_eq!((len, status), (1, vec![expected]));
    let parts = [header(VIRTIO_BLK_T_IN, 5), Part::In(1024), Part::In(1)];
    throttled.pass_all();
    let (len, room) = bench.request(0, &parts);
    let expected = if read_only { vec![FILL; 1024] } else { pattern };
    assert_eq!((len, room), (1025, vec![expected.clone(), ok.clone()]));
    let of_one_round = [(5, 0), (6, 512)].map(|(sector, at)| {
        let parts = [header(VIRTIO_BLK_T_IN, sector), Part::In(512), Part::In(1)];
        (bench.guest.offer(0, &parts), &expected[at..at + 512])
    });
    throttled.pass_all();
    bench.notify(0);
    throttled.pass_all();
    // The one that had to wait for its limit may have to wait for the disk as well.
    for _ in 0..2 {
        bench.device().serve(0);
    }
    for (offered, expected) in of_one_round {
        let outcome = bench.guest.outcome(&offered);
        assert_eq!(outcome, Some((513, vec![expected.to_vec(), ok.clone()])));
    }
    let mut capacity = [0; 8];
    bench
        .device()
        .read(VIRTIO_MMIO_CONFIG.into(), &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), sectors);
    let parts = [header(VIRTIO_BLK_T_FLUSH, 0), Part::In(1)];
    throttled.pass_all();
    assert_eq!(bench.request(0, &parts), (1, vec![ok]));
}
