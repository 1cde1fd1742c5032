//! A guest of a few instructions that goes on as many.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use control::{Origin, allow_many_files};
use system_tests::bare_metal;

use crate::{Bench, Fermata, Machine, Row, System, native::config, row::percentile};

/// How much memory the guest has, of which it writes to next to nothing, in MiB.
const MEMORY_MIB: u64 = 256;
/// How many are forked one after another.
const SINGLE: u32 = 100;
/// How many are forked at once.
const MANY: u32 = 100;

/// Forks a guest that does nothing, one at a time, and many at once as often as `runs` says; each in new processes and in prepared
/// ones, with all files in an empty directory under `scratch`. A fork's time is from the request, with the image made, until who
/// asked is told that its guest runs.
///
/// # Errors
///
/// When any of it fails.
pub fn measure(fermata: &Fermata, runs: u32, scratch: &Path) -> Result<Vec<Row>> {
    allow_many_files();
    let directory = tempfile::tempdir_in(scratch).context("cannot make a scratch directory")?;
    let scratch = directory.path();
    let kernel = scratch.join("kernel");
    fs::write(&kernel, bare_metal::halted()).context("cannot write the guest")?;
    let origin = Origin::Boot(config(MEMORY_MIB, &kernel));
    let parent = fermata.start(origin, &scratch.join("console"))?;
    let (image, _) = fermata.image(&parent)?;
    let mut rows = Vec::new();
    let mut add = |bench, setting, figures: &[f64]| {
        let row = Row::of(bench, System::Fermata, MEMORY_MIB, figures);
        rows.extend(row.map(|row| row.at(setting)));
    };
    for (prepared, setting) in [(false, "new process"), (true, "prepared process")] {
        let pool = fermata.pool(usize::from(prepared))?;
        let mut times = Vec::new();
        for _ in 0..SINGLE {
            fermata.fill(&pool, image.shape());
            let begun = Instant::now();
            let forks = fermata.fork(&pool, &image, 1, scratch)?;
            times.push(ms(begun.elapsed()));
            drop(forks);
        }
        add(Bench::Fork, setting, &times);
        add(Bench::ForkP99, setting, &[percentile(&times, 0.99)]);
    }
    for (prepared, setting) in [(0, "new processes"), (MANY, "prepared processes")] {
        let pool = fermata.pool(prepared as usize)?;
        let (mut times, mut private) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            fermata.fill(&pool, image.shape());
            let begun = Instant::now();
            let forks = fermata.fork(&pool, &image, MANY, scratch)?;
            times.push(ms(begun.elapsed()));
            for fork in &forks {
                private.push(private_kib(fork.pid())?);
            }
        }
        add(Bench::Fork100, setting, &times);
        add(Bench::ForkPrivate, setting, &private);
    }
    Ok(rows)
}

fn ms(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

/// What a process has of its own.
fn private_kib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let mut kib = 0;
    for line in text.lines().filter(|line| line.starts_with("Private_")) {
        let number = line.split_whitespace().nth(1);
        kib += number
            .and_then(|number| number.parse::<u64>().ok())
            .with_context(|| format!("{path} has a line {line:?}"))?;
    }
    Ok(kib as f64)
}
