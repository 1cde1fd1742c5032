//! Disks that branch: a chain of many layers beside one layer with the same content.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use branch_disk::{Disk, Foundation, anything};

use crate::{Bench, Figures, System};

const DISK_BYTES: u64 = 256 << 20;

/// Layers of the deep chain.
pub(crate) const DEPTH: u64 = 50;

/// The least that was written in one go, and so lies in one layer,
pub(crate) const SMALL: u64 = 64 << 10;

/// and the others.
const EXTENTS: [(&str, u64); 2] = [("1 MiB", 1 << 20), ("64 KiB", SMALL)];

/// The names of both disks with small extents in the results.
pub(crate) const SMALL_SETTINGS: [&str; 2] = ["1 layer, 64 KiB", "50 layers, 64 KiB"];

/// Requests of one measurement, and their bytes.
const RANDOM: (u64, usize) = (50_000, 4096);
const SEQUENTIAL: (u64, usize) = (DISK_BYTES / (128 << 10), 128 << 10);

/// Parts of a measurement, in each of which every disk has its turn.
const SLICES: u64 = 64;

/// Disks whose content is the same, written in the same pieces.
#[derive(Debug)]
pub struct Chains {
    disks: Vec<(&'static str, Disk)>,
}

impl Chains {
    /// Makes them in `scratch`, all of whose sectors some layer has.
    ///
    /// # Errors
    ///
    /// When a disk cannot be written.
    pub fn make(scratch: &Path) -> Result<Self> {
        let mut disks = Vec::new();
        for (extent, bytes) in EXTENTS {
            for (depth, name) in [(1, "1 layer"), (DEPTH, "50 layers")] {
                let path = scratch.join(format!("{extent}, {name}.disk").replace(' ', "-"));
                let disk = disk(&path, DISK_BYTES, depth, bytes)
                    .with_context(|| format!("cannot make {}", path.display()))?;
                disks.push((setting(extent, depth), disk));
            }
        }
        Ok(Self { disks })
    }

    /// Reads all of them, a slice of each in turn, in an order that alternates: whatever else the host does hits all.
    ///
    /// # Errors
    ///
    /// When a disk cannot be read.
    pub fn measure(&self, run: u32, figures: &mut Figures) -> Result<()> {
        for (bench, (requests, bytes)) in [
            (Bench::ChainRandRead, RANDOM),
            (Bench::ChainSeqRead, SEQUENTIAL),
        ] {
            let mut times = vec![Duration::ZERO; self.disks.len()];
            let mut buffer = vec![0; bytes];
            for slice in 0..SLICES {
                let mut order: Vec<_> = self.disks.iter().zip(&mut times).collect();
                let begin = slice as usize % order.len();
                order.rotate_left(begin);
                let blocks = blocks(bench, (run, slice), requests / SLICES, bytes as u64);
                for ((_, disk), time) in order {
                    let begun = Instant::now();
                    for block in &blocks {
                        disk.read(block * bytes as u64, &mut &mut buffer[..])?;
                    }
                    *time += begun.elapsed();
                }
            }
            let megabytes = (requests / SLICES * SLICES) as f64 * bytes as f64 / 1e6;
            for ((setting, _), time) in self.disks.iter().zip(times) {
                figures.add(
                    bench,
                    System::Fermata,
                    setting,
                    megabytes / time.as_secs_f64(),
                );
            }
        }
        Ok(())
    }
}

/// The blocks of `bytes` that one slice of a run reads, the same of each disk.
fn blocks(bench: Bench, (run, slice): (u32, u64), count: u64, bytes: u64) -> Vec<u64> {
    let there = DISK_BYTES / bytes;
    let mut random = Random((u64::from(run) << 32) | (slice + 1));
    let block = |n: u64| match bench {
        Bench::ChainRandRead => random.next() % there,
        _ => (slice * count + n) % there,
    };
    (0..count).map(block).collect()
}

fn setting(extent: &str, depth: u64) -> &'static str {
    match (extent, depth == 1) {
        ("1 MiB", true) => "1 layer, 1 MiB",
        ("1 MiB", false) => "50 layers, 1 MiB",
        (_, true) => SMALL_SETTINGS[0],
        (_, false) => SMALL_SETTINGS[1],
    }
}

/// A disk of `bytes` and `depth` layers, in which each extent lies in any of them, on nothing.
///
/// # Errors
///
/// When it cannot be written.
pub(crate) fn disk(path: &Path, bytes: u64, depth: u64, extent: u64) -> Result<Disk> {
    let mut disk = Disk::create(path, Some(bytes), &Foundation::Nothing, &anything)?;
    let mut random = Random(7);
    let owners: Vec<u64> = (0..bytes / extent).map(|_| random.next() % DEPTH).collect();
    let content = vec![0xa5; extent as usize];
    for layer in 0..DEPTH {
        for (at, owner) in owners.iter().enumerate() {
            if *owner == layer {
                disk.write(at as u64 * extent, &mut &content[..])?;
            }
        }
        if depth > 1 && layer + 1 < DEPTH {
            disk.cut(disk.prepare()?)?.finish()?;
        }
    }
    disk.flush()?;
    Ok(disk)
}

/// Vigna's xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
}
