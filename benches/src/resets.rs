//! A guest of a few instructions that goes back to where it was forked, over and over.

use std::{
    fs::{self, File},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use control::{Origin, ResetReport};
use rustix::{
    process::Pid,
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

use crate::{
    Bench, Console, Fermata, Machine, Row, System,
    dirtier::Dirtier,
    filler::MAX_BYTES,
    native::{config, to_cpl_3},
    row::percentile,
};

/// Pages that the guest writes to between two resets, and how far apart they are: in memory that is full, so that what was there has
/// to come back.
const PAGES: u64 = 64;
const STRIDE_BYTES: u64 = 37 * 4096;

/// How many resets there are in a run, and how many before the first.
const RESETS: u32 = 10_000;
const WARM_UP: u32 = 100;

/// How long the guest may take to write to its pages.
const PATIENCE: Duration = Duration::from_secs(60);

/// Resets a fork of a guest of `mem_mib`, each time that it has written to 64 pages and said so, as often as `runs` says, with its VMM on
/// all CPUs and on one, and with all files in an empty directory under `scratch`. In the rate is everything: the request, the reset, and
/// what the guest does.
///
/// # Errors
///
/// When any of it fails, or a reset has not undone so many pages.
pub fn measure(fermata: &Fermata, mem_mib: u64, runs: u32, scratch: &Path) -> Result<Vec<Row>> {
    let directory = tempfile::tempdir_in(scratch).context("cannot make a scratch directory")?;
    let scratch = directory.path();
    let kernel = scratch.join("kernel");
    let guest = Dirtier {
        memory_bytes: (mem_mib << 20).min(MAX_BYTES),
        pages: PAGES,
        stride_bytes: STRIDE_BYTES,
        user: to_cpl_3()?,
    };
    fs::write(&kernel, guest.kernel()).context("cannot write the guest")?;
    let mut console = Console::create(scratch.join("console"))?;
    let parent = fermata.start(Origin::Boot(config(mem_mib, &kernel)), console.path())?;
    console.wait_for_output()?;
    let (image, _) = fermata.image(&parent)?;
    drop(parent);
    let pool = fermata.pool(0)?;
    let forks = fermata.fork(&pool, &image, 1, scratch)?;
    let fork = forks.first().context("no fork was made")?;
    let said = File::open(scratch.join("fork0.console")).context("the fork has no console")?;
    let mut count = 0;
    let said_so = || {
        count += 1;
        wait_for(&said, count)
    };
    let mut cycle = fork.resets(said_so)?;
    let mut rows = Vec::new();
    let all = sched_getaffinity(None)?;
    for (cpus, setting) in [(all, "all CPUs"), (one_of(&all), "one CPU")] {
        bind(fork.pid(), &cpus)?;
        rows.extend(run(&mut cycle, mem_mib, runs, setting)?);
    }
    Ok(rows)
}

/// The last of `cpus`.
fn one_of(cpus: &CpuSet) -> CpuSet {
    let mut one = CpuSet::new();
    if let Some(last) = (0..CpuSet::MAX_CPU).rev().find(|cpu| cpus.is_set(*cpu)) {
        one.set(last);
    }
    one
}

/// Has all threads of a process run on `cpus`.
fn bind(pid: u32, cpus: &CpuSet) -> Result<()> {
    let threads = format!("/proc/{pid}/task");
    for thread in fs::read_dir(&threads).with_context(|| format!("cannot read {threads}"))? {
        let name = thread?.file_name();
        let id = name.to_str().and_then(|id| id.parse().ok());
        sched_setaffinity(id.and_then(Pid::from_raw), cpus)?;
    }
    Ok(())
}

fn run(
    cycle: &mut impl FnMut() -> Result<ResetReport>,
    mem_mib: u64,
    runs: u32,
    setting: &str,
) -> Result<Vec<Row>> {
    for _ in 0..WARM_UP {
        cycle()?;
    }
    let (mut rates, mut times) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        let begun = Instant::now();
        let mut reports: Vec<ResetReport> = Vec::new();
        for _ in 0..RESETS {
            reports.push(cycle()?);
        }
        rates.push(f64::from(RESETS) / begun.elapsed().as_secs_f64());
        // It prints on, and writes to the pages of generation and clock besides.
        let few = reports.iter().map(|report| report.dirty_pages).min();
        ensure!(few >= Some(PAGES), "a reset undid {few:?} pages");
        times.extend(reports.iter().map(|report| report.total_us as f64));
    }
    let p99 = [percentile(&times, 0.99)];
    let setting = format!("{PAGES} pages, {setting}");
    let rows = [
        (Bench::ResetRate, rates.as_slice()),
        (Bench::Reset, &times),
        (Bench::ResetP99, &p99),
    ];
    let rows = rows
        .into_iter()
        .filter_map(|(bench, figures)| Row::of(bench, System::Fermata, mem_mib, figures));
    Ok(rows.map(|row| row.at(&setting)).collect())
}

/// Waits until so many bytes were printed.
fn wait_for(console: &File, bytes: u64) -> Result<()> {
    let begun = Instant::now();
    while console.metadata()?.len() < bytes {
        ensure!(begun.elapsed() < PATIENCE, "the guest prints nothing");
        std::thread::yield_now();
    }
    Ok(())
}
