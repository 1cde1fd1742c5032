//! A guest of a few instructions that goes back to where it was forked, over and over.

use std::{
    fs::{self, File},
    num::NonZeroU32,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use control::{Origin, ResetReport, RunsEnd, RunsReport};
use rustix::{
    process::Pid,
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

use crate::{
    Bench, Console, Fermata, Machine, Row, System,
    dirtier::Dirtier,
    fermata::FermataMachine,
    filler::MAX_BYTES,
    native::{config, to_cpl_3},
    row::percentile,
};

/// Pages that the guest writes to between two resets, and how far apart they are: in memory that is full, so that what was there has
/// to come back.
const PAGES: u64 = 64;
const STRIDE_BYTES: u64 = 37 * 4096;

/// How many resets there are in a measurement, and how many before the first.
const RESETS: NonZeroU32 = NonZeroU32::new(10_000).unwrap();
const WARM_UP: NonZeroU32 = NonZeroU32::new(100).unwrap();

/// How long the guest may take to write to its pages.
const PATIENCE: Duration = Duration::from_secs(60);

/// Resets a fork of a guest of `mem_mib`, each time that it has written to 64 pages and said so, as often as `runs` says, with its VMM on
/// all CPUs and on one, and with all files in an empty directory under `scratch`: each time by a request, or by one for all that has the
/// guest run over and over. In the rate is everything: the request, the reset, and what the guest does.
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
    let mut rows = Vec::new();
    let all = sched_getaffinity(None)?;
    for (cpus, setting) in [(all, "all CPUs"), (one_of(&all), "one CPU")] {
        bind(fork.pid(), &cpus)?;
        let of_runs = by_runs(fork, runs)?;
        rows.extend(of_runs.rows(mem_mib, &format!("{setting}, runs")));
        // The machine is held, and its guest has not said anything since.
        let mut count = said.metadata()?.len();
        fork.resume()?;
        let said_so = || {
            count += 1;
            wait_for(&said, count)
        };
        let mut cycle = fork.resets(said_so)?;
        let of_requests = by_requests(&mut cycle, runs)?;
        rows.extend(of_requests.rows(mem_mib, &format!("{setting}, requests")));
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

/// What was measured.
#[derive(Default)]
struct Measured {
    /// Resets a second.
    rates: Vec<f64>,
    /// Microseconds that one took.
    times: Vec<f64>,
    /// Of how many out of a hundred none took longer, where each is known.
    p99: Option<f64>,
}

impl Measured {
    fn rows(&self, mem_mib: u64, setting: &str) -> Vec<Row> {
        let setting = format!("{PAGES} pages, {setting}");
        let rows = [
            (Bench::ResetRate, self.rates.as_slice()),
            (Bench::Reset, &self.times),
            (Bench::ResetP99, self.p99.as_slice()),
        ];
        let rows = rows
            .into_iter()
            .filter_map(|(bench, figures)| Row::of(bench, System::Fermata, mem_mib, figures));
        rows.map(|row| row.at(&setting)).collect()
    }
}

/// One request has the guest run and be reset over and over. How long a reset took is known of all together.
fn by_runs(machine: &FermataMachine, runs: u32) -> Result<Measured> {
    machine.runs(WARM_UP)?;
    let mut measured = Measured::default();
    for _ in 0..runs {
        let begun = Instant::now();
        let report = machine.runs(RESETS)?;
        let count = f64::from(RESETS.get());
        measured.rates.push(count / begun.elapsed().as_secs_f64());
        let RunsReport {
            done,
            ended,
            dirty_pages,
            reset_us,
            ..
        } = report;
        ensure!(
            ended == RunsEnd::AllDone && done == RESETS.get(),
            "the runs ended otherwise: {report:?}"
        );
        // It writes to the pages of generation and clock besides.
        ensure!(
            dirty_pages >= PAGES * u64::from(done),
            "{done} resets undid {dirty_pages} pages"
        );
        measured.times.push(reset_us as f64 / count);
    }
    Ok(measured)
}

/// Each reset is asked for once the guest has printed that it is done.
fn by_requests(cycle: &mut impl FnMut() -> Result<ResetReport>, runs: u32) -> Result<Measured> {
    for _ in 0..WARM_UP.get() {
        cycle()?;
    }
    let mut measured = Measured::default();
    for _ in 0..runs {
        let begun = Instant::now();
        let mut reports: Vec<ResetReport> = Vec::new();
        for _ in 0..RESETS.get() {
            reports.push(cycle()?);
        }
        let rate = f64::from(RESETS.get()) / begun.elapsed().as_secs_f64();
        measured.rates.push(rate);
        let few = reports.iter().map(|report| report.dirty_pages).min();
        ensure!(few >= Some(PAGES), "a reset undid {few:?} pages");
        let times = reports.iter().map(|report| report.total_us as f64);
        measured.times.extend(times);
    }
    measured.p99 = Some(percentile(&measured.times, 0.99));
    Ok(measured)
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
