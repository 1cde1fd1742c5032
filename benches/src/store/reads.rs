//! Single pages, read anywhere.

use std::{path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use dedup::{OpenOptions, Store};

use super::pages::PAGE;

const READS: usize = 20_000;

/// A generator of numbers that look random: xorshift64*, by Vigna.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

/// Reads pages of one of the snapshot's images at random places, with no cache of decoded frames: the 50th and the 99th
/// percentile, in microseconds.
pub(super) fn measure(store: &Path, snapshot: &str, image: &str) -> Result<(f64, f64)> {
    let options = OpenOptions {
        frame_memory: 0,
        ..OpenOptions::default()
    };
    let name = image;
    let image = Store::open_dir(store, options)?.image(snapshot, name)?;
    let pages = image.size() / PAGE as u64;
    ensure!(pages > 0, "{name} is empty");
    let mut chance = Chance(7);
    let mut page = [0; PAGE];
    let mut times = Vec::with_capacity(READS);
    for _ in 0..READS {
        let at = chance.next() % pages * PAGE as u64;
        let begun = Instant::now();
        image.read_at(at, &mut page)?;
        times.push(begun.elapsed());
    }
    times.sort_unstable();
    let percentile = |percent: usize| {
        let time = times.get(times.len() * percent / 100);
        time.map(|time| time.as_secs_f64() * 1e6)
            .context("nothing was read")
    };
    Ok((percentile(50)?, percentile(99)?))
}
