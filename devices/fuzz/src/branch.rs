//! The block device on a disk that branches, which is cut and grows while the driver is at work.

use std::{
    fs, io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use branch_disk::{Disk, Foundation, LayerId, Mode, Origin, Rebuild, anything};
use devices::virtio::{
    MmioTransport, VirtioDevice,
    block::{Block, DiskControl, SECTOR_BYTES, SharedDisk},
};
use fuzz_harness::Input;

use crate::{
    Bench, Part, Subject,
    block::{self, Throttled},
    scratch::Scratch,
};

/// A program may cut a disk so often; each makes a file.
const MOST_CUTS: u32 = 6;

thread_local! {
    static SCRATCH: Scratch = Scratch::new();
}

/// What the lower half of the disk is.
const FILL: u8 = 0x5a;
const HALF: usize = block::BYTES / 2;

/// A disk on a raw base of half its size, or on a layer that is not here, and a layer that was sealed.
pub struct Branching {
    disk: SharedDisk,
    path: PathBuf,
    comes: Option<Rebuild>,
    cuts: u32,
    keep_reads: bool,
    throttled: Throttled,
    control: Option<DiskControl>,
}

impl Subject for Branching {
    fn new(input: &mut Input<'_>) -> Self {
        let [base, path] = SCRATCH.with(|scratch| {
            scratch.clear();
            ["base", "disk"].map(|name| scratch.path(name))
        });
        let how = input.byte();
        let comes = (how & 1 != 0).then(|| {
            let origin = Arc::new(Elsewhere);
            let rebuild = Rebuild::begin(&path, LayerId([1; 16]), origin, &anything);
            rebuild.expect("there is room")
        });
        let disk = match &comes {
            Some(rebuild) => rebuild.branch(&anything),
            None => {
                fs::write(&base, [FILL; HALF]).expect("there is room");
                let on = Foundation::Raw(base);
                Disk::create(&path, Some(block::BYTES as u64), &on, &anything)
            }
        };
        let mut disk = disk.expect("there is room");
        disk.write(1024, &mut &[1; 3072][..])
            .expect("there is room");
        cut(&mut disk);
        Self {
            path: disk.path().to_owned(),
            disk: Arc::new(Mutex::new(disk)),
            comes,
            cuts: 0,
            keep_reads: how & 2 != 0,
            throttled: Throttled::new(how),
            control: None,
        }
    }

    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let block = Block::branching(Arc::clone(&self.disk), "disk").expect("it is in order");
        let block = self.throttled.limit(block);
        let block = block::aside(block, self.keep_reads);
        self.control = Some(block.control());
        Box::new(block)
    }

    fn compose(&mut self, _queue: u16, input: &mut Input<'_>) -> Vec<Part> {
        block::compose(block::sectors(&self.control), input)
    }

    /// It is cut, as for a snapshot; or grows.
    fn outside(&mut self, transport: &MmioTransport, input: &mut Input<'_>) {
        if input.flag() {
            return self.throttled.outside(&self.control, transport, input);
        }
        if self.cuts >= MOST_CUTS {
            return;
        }
        self.cuts += 1;
        if input.flag() {
            block::grow(&self.control, transport, input).expect("there is room");
        } else {
            cut(&mut self.disk.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn prove(&mut self, bench: &mut Bench) {
        let sectors = block::sectors(&self.control);
        block::prove(bench, false, sectors, &self.throttled);
    }

    fn finish(self) {
        let bytes = block::sectors(&self.control) * SECTOR_BYTES;
        drop((self.disk, self.control));
        if let Some(rebuild) = self.comes {
            rebuild.finish(&|| true).expect("there is room");
        }
        let rule = |path: &Path| path.starts_with("/");
        branch_disk::check(&self.path, &rule)
            .expect("the disk is in order, whatever the guest does");
        let disk = Disk::open(&self.path, Mode::Read, &rule).expect("the disk is in order");
        let mut all = vec![0; bytes as usize];
        disk.read(0, &mut &mut all[..])
            .expect("the disk is in order");
    }
}

/// What a layer is that is not here.
struct Elsewhere;

impl Origin for Elsewhere {
    fn bytes(&self) -> u64 {
        block::BYTES as u64
    }

    fn each_data(&self, found: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        found(0..HALF as u64);
        Ok(())
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let half = HALF.saturating_sub(offset as usize).min(buffer.len());
        buffer[..half].fill(FILL);
        buffer[half..].fill(0);
        Ok(())
    }
}

fn cut(disk: &mut Disk) {
    let next = disk.prepare().expect("there is room");
    let cut = disk.cut(next).expect("it is the next of this disk");
    cut.finish().expect("there is room");
}
