//! Crashes while a layer is made of what somebody else has kept of it, and a disk stands on it.

use std::{io, ops::Range, sync::Arc};

use super::*;
use crate::{Origin, Rebuild};

const ID: LayerId = LayerId([1; 16]);

/// What there is of the disk elsewhere.
struct Kept;

fn kept() -> Vec<u32> {
    let mut content = base();
    content.resize(SECTORS as usize, 0);
    content
}

impl Origin for Kept {
    fn bytes(&self) -> u64 {
        SECTORS * 512
    }

    fn each_data(&self, found: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        found(0..BASE_SECTORS as u64 * 512);
        Ok(())
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let content = stamped(&kept());
        buffer.copy_from_slice(&content[offset as usize..][..buffer.len()]);
        Ok(())
    }
}

/// Works on a disk while what it stands on comes. Gives its name, and what was done.
fn work(dir: &Path) -> (PathBuf, Vec<Event>) {
    tape::start();
    let layer = dir.join("d.layer");
    let rebuild = Rebuild::begin(&layer, ID, Arc::new(Kept), &anything).unwrap();
    let mut disk = rebuild.branch(&anything).unwrap();
    let head = disk.path().file_name().unwrap().into();
    let flush = |disk: &mut Disk| {
        disk.flush().unwrap();
        tape::note(Event::Told(Told::Flushed));
    };
    let mut stamp = 0;
    let mut put = |disk: &mut Disk, at: u64, len: u64| {
        stamp += 1;
        let (start, end) = (at, at + len);
        tape::note(Event::Told(Told::Begins { start, end, stamp }));
        write(disk, at * 512, &stamped(&vec![stamp; len as usize]));
    };
    flush(&mut disk);
    put(&mut disk, 3, 9);
    flush(&mut disk);
    read(&disk, 50 * 512, 512);
    put(&mut disk, 90, 30);
    rebuild.finish(&|| true).unwrap();
    let layer = layer.file_name().unwrap().into();
    let content = kept();
    tape::note(Event::Told(Told::Snapshot { layer, content }));
    put(&mut disk, 5, 2);
    flush(&mut disk);
    drop((disk, rebuild));
    (head, tape::stop())
}

#[test]
fn every_point_of_a_rebuild_can_be_the_last() {
    let dir = in_memory();
    let (head, events) = work(dir.path());
    for at in begin(&events)..=events.len() {
        for seed in 1..7u32 {
            let dir = crashed(&events, at, seed.wrapping_mul(0x9e37_79b9));
            let (possible, snapshots) = expected(&events[..at]);
            let layer = dir.path().join("d.layer");
            assert!(layer.exists() || snapshots.is_empty());
            if !layer.exists() {
                crate::rebuild(&layer, ID, Arc::new(Kept), &anything).unwrap();
            }
            sound(&layer);
            let whole = Disk::open(&layer, Mode::Read, &anything).unwrap();
            assert!(stamps(&all(&whole)) == kept());
            let head = dir.path().join(&head);
            let disk = Disk::open(&head, Mode::Write, &anything).unwrap();
            let found = stamps(&all(&disk));
            for (found, possible) in found.iter().zip(&possible) {
                assert!(possible.contains(found), "{found} is not of {possible:?}");
            }
        }
    }
}
