//! Snapshots that a guest does not feel.

use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use control::{MemoryCopy, SnapshotReport};
use dedup::{CreateOptions, OpenOptions, Store};

use crate::{
    Bench, Console, Fermata, Row, System,
    attached::{Wire, attached},
    fermata::FermataMachine,
    native::{self, Pace},
    row::percentile,
};

/// What a guest does while it is saved.
#[derive(Clone, Copy, Debug)]
pub enum Load {
    /// It writes to one page a tick.
    Idle,
    /// It writes to 125 MB/s of pages, one after the other.
    Busy,
    /// It writes to one page after the other as fast as it can.
    Unpaced,
}

const BUSY_BYTES_A_SECOND: u64 = 125_000_000;
/// Half to one millisecond on today's machines.
const CYCLES_A_TICK: u64 = 1 << 21;
const PAGE_BYTES: u64 = 4096;

/// How long a guest is watched without snapshots, and with them.
const WATCHED: Duration = Duration::from_secs(4);

impl Load {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Busy => "125 MB/s",
            Self::Unpaced => "as fast as it can",
        }
    }

    /// How a guest writes that does it.
    pub(crate) fn pace(self) -> Pace {
        let ticks_a_second = ticks_a_second();
        let pages_a_tick = match self {
            Self::Idle => 1,
            Self::Busy => BUSY_BYTES_A_SECOND / PAGE_BYTES / ticks_a_second,
            Self::Unpaced => 4096,
        };
        let cycles_a_tick = match self {
            Self::Idle | Self::Busy => CYCLES_A_TICK,
            Self::Unpaced => 0,
        };
        Pace {
            pages_a_tick,
            cycles_a_tick,
        }
    }
}

/// Saves a machine of `mem_mib` so many times into a store under `scratch`, while its guest does what `load` says. The first
/// snapshot, which saves all of its memory, is in no row.
///
/// # Errors
///
/// When any of it fails, or the guest stands still until it is saved.
pub fn snapshots(
    fermata: &Fermata,
    mem_mib: u64,
    load: Load,
    count: u32,
    scratch: &Path,
) -> Result<Vec<Row>> {
    let directory = tempfile::tempdir_in(scratch).context("cannot make a scratch directory")?;
    let store = new_store(directory.path())?;
    let pace = load.pace();
    let (mut machine, _, _wire) = usual(fermata, mem_mib, pace, directory.path())?;
    let first = machine.store(&store, "first")?;
    println!(
        "{mem_mib} MiB, {}: for the first, the guest stood still for {} µs after {} rounds; it took {} ms",
        load.name(),
        first.downtime_us,
        first.rounds,
        first.total_us / 1000
    );
    let mut reports: Vec<SnapshotReport> = Vec::new();
    for number in 0..count {
        let report = machine.store(&store, &format!("snapshot-{number}"))?;
        ensure!(
            report.copy == MemoryCopy::CopyOnWrite,
            "the guest stood still until it was saved"
        );
        reports.push(report);
    }
    let figures = |figure: &dyn Fn(&SnapshotReport) -> f64| -> Vec<f64> {
        reports.iter().map(figure).collect()
    };
    let stops = figures(&|report| report.downtime_us as f64 / 1000.0);
    let totals = figures(&|report| report.total_us as f64 / 1000.0);
    let new = figures(&|report| {
        let new = report.stored.as_ref().map_or(0, |stored| stored.new_bytes);
        new as f64 / f64::from(1 << 20)
    });
    let rows = [
        (Bench::CowStop, stops.as_slice()),
        (Bench::CowStopP99, &[percentile(&stops, 0.99)]),
        (Bench::CowTotal, &totals),
        (Bench::CowSaved, &new),
    ];
    let rows = rows
        .into_iter()
        .filter_map(|(bench, figures)| Row::of(bench, System::Fermata, mem_mib, figures));
    let setting = format!("{mem_mib} MiB, {}", load.name());
    Ok(rows.map(|row| row.at(&setting)).collect())
}

/// How fast a guest of `mem_mib` that does what `load` says does it beside one snapshot after the other, of how fast it does
/// without, as often as `runs` says.
///
/// # Errors
///
/// When any of it fails.
pub fn share(
    fermata: &Fermata,
    mem_mib: u64,
    load: Load,
    runs: u32,
    scratch: &Path,
) -> Result<Option<Row>> {
    let directory = tempfile::tempdir_in(scratch).context("cannot make a scratch directory")?;
    let store = new_store(directory.path())?;
    let pace = load.pace();
    let (mut machine, console, _wire) = usual(fermata, mem_mib, pace, directory.path())?;
    let mut shares = Vec::new();
    for run in 0..runs {
        let without = ticks_while(&console, || {
            thread::sleep(WATCHED);
            Ok(())
        })?;
        let with = ticks_while(&console, || {
            let begun = Instant::now();
            let mut number = 0;
            while begun.elapsed() < WATCHED {
                machine.store(&store, &format!("snapshot-{run}-{number}"))?;
                number += 1;
            }
            Ok(())
        })?;
        shares.push(100.0 * with / without);
    }
    let row = Row::of(Bench::CowShare, System::Fermata, mem_mib, &shares);
    Ok(row.map(|row| row.at(load.name())))
}

/// A machine with what users' machines have, whose guest has filled its memory and goes on at this pace.
pub(crate) fn usual(
    fermata: &Fermata,
    mem_mib: u64,
    pace: Pace,
    scratch: &Path,
) -> Result<(FermataMachine, Console, Wire)> {
    let config = native::config(mem_mib, &scratch.join("kernel"));
    let (config, wire) = attached(config, scratch)?;
    let (machine, console) = native::filled_at(fermata, config, pace, scratch)?;
    Ok((machine, console, wire))
}

/// Ticks a second while `work` is done.
fn ticks_while(console: &Console, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begun = Instant::now();
    let before = console.printed_bytes()?;
    work()?;
    let ticks = console.printed_bytes()? - before;
    Ok(ticks as f64 / begun.elapsed().as_secs_f64())
}

pub(crate) fn new_store(directory: &Path) -> Result<PathBuf> {
    let path = directory.join("store");
    Store::create_dir(&path, &CreateOptions::default(), OpenOptions::default())?;
    Ok(path)
}

/// By this host's TSC.
#[allow(unsafe_code)]
fn ticks_a_second() -> u64 {
    // SAFETY: every CPU that fermata runs on has it.
    let cycles = || unsafe { std::arch::x86_64::_rdtsc() };
    let (begun, first) = (Instant::now(), cycles());
    thread::sleep(Duration::from_millis(50));
    let passed = cycles().wrapping_sub(first) as f64;
    let ticks = passed / begun.elapsed().as_secs_f64() / CYCLES_A_TICK as f64;
    (ticks as u64).max(1)
}
