//! Whole disks.

mod branch;
mod check;
mod convert;
mod crash;
mod create;
mod hostile;
mod merge;
mod model;

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::{Disk, Foundation, LayerId, Merged, Mode, anything};

/// A directory, a base in it, and a disk on that.
struct Bench {
    dir: TempDir,
    base: Vec<u8>,
}

impl Bench {
    /// With a base of so many sectors that are not zero.
    fn new(sectors: usize) -> Self {
        Self::within(sectors, tempfile::tempdir().unwrap())
    }

    fn within(sectors: usize, dir: TempDir) -> Self {
        let base: Vec<u8> = (0..sectors * 512)
            .map(|at| (at / 512 % 250 + 1) as u8)
            .collect();
        std::fs::write(dir.path().join("base"), &base).unwrap();
        Self { dir, base }
    }

    /// As [`Bench::new`], where nothing waits for a disk.
    fn in_memory(sectors: usize) -> Self {
        Self::within(sectors, in_memory())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }

    fn on_base(&self, name: &str) -> Disk {
        let on = Foundation::Raw(self.path("base"));
        Disk::create(&self.path(name), None, &on, &anything).unwrap()
    }

    fn open(&self, name: &str) -> Disk {
        Disk::open(&self.path(name), Mode::Write, &anything).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// A directory in memory, if this host has such.
pub(crate) fn in_memory() -> TempDir {
    let memory = tempfile::tempdir_in("/dev/shm");
    memory.or_else(|_| tempfile::tempdir()).unwrap()
}

fn read(disk: &Disk, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    disk.read(offset, &mut &mut bytes[..]).unwrap();
    bytes
}

fn all(disk: &Disk) -> Vec<u8> {
    read(disk, 0, disk.bytes() as usize)
}

fn write(disk: &mut Disk, offset: u64, bytes: &[u8]) {
    disk.write(offset, &mut &*bytes).unwrap();
}

fn sealed(disk: &mut Disk) -> crate::LayerRef {
    disk.cut(disk.prepare().unwrap()).unwrap().finish().unwrap()
}

fn sound(path: &Path) {
    let checked = crate::check(path, &anything).unwrap();
    assert_eq!(checked.problems, Vec::<String>::new());
}

/// Merges the layers of `disk` from one to another.
fn merge(disk: &mut Disk, lowest: LayerId, topmost: LayerId) -> Merged {
    let merged = disk
        .merge(lowest, topmost)
        .unwrap()
        .write(&|| true)
        .unwrap();
    assert!(disk.adopt(&merged));
    merged
}
