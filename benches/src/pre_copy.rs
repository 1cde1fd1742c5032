//! The rows of VNsnap's Table 1 (Kangarlou, Xu and Eugster, 2008): a guest of 600 MB that is saved while it runs, by streaming its
//! memory to where it is kept, or to memory first.

use std::{os::unix::fs::MetadataExt, path::Path};

use anyhow::{Context, Result, ensure};
use control::{Destination, MemoryCopy, SnapshotReport};

use crate::{
    Bench, Fermata, Row, System,
    fermata::{FermataMachine, in_store},
    instant::{Load, new_store, usual},
    receiver::{Keeps, Receiver},
};

const MEM_MIB: u64 = 600;
const PAGE_BYTES: u64 = 4096;

/// Which of VNsnap's daemons.
#[derive(Clone, Copy)]
enum Daemon {
    /// VNsnap-disk: pages go to the memory file as they come.
    Streaming,
    /// VNsnap-memory: they go to memory, and what is there in the end into a store.
    Memory,
}

impl Daemon {
    fn name(self) -> &'static str {
        match self {
            Self::Streaming => "streaming",
            Self::Memory => "memory",
        }
    }
}

/// Whether the daemon is this machine's own process, or another one that it reaches over TCP.
#[derive(Clone, Copy)]
enum Reach {
    Here,
    OverTcp,
}

impl Reach {
    fn name(self) -> &'static str {
        match self {
            Self::Here => "",
            Self::OverTcp => " over TCP",
        }
    }
}

/// What was measured of one snapshot.
struct Measured {
    report: SnapshotReport,
    /// What is kept of its memory, of how much it has: without the holes of a file, and before a store compresses it.
    size: f64,
}

/// Saves one machine after the other so many times, and prints the table.
///
/// # Errors
///
/// When any of it fails.
pub fn table(fermata: &Fermata, runs: u32, scratch: &Path) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    println!(
        "daemon              application  duration (s)  iterations  downtime (ms)  pages in last  size"
    );
    for (daemon, reach) in [
        (Daemon::Streaming, Reach::Here),
        (Daemon::Memory, Reach::Here),
        (Daemon::Streaming, Reach::OverTcp),
        (Daemon::Memory, Reach::OverTcp),
    ] {
        let name = format!("{}{}", daemon.name(), reach.name());
        for load in [Load::Idle, Load::Busy] {
            let measured = machines(fermata, daemon, reach, load, runs, scratch)?;
            let figures = |figure: &dyn Fn(&Measured) -> f64| -> Vec<f64> {
                measured.iter().map(figure).collect()
            };
            let report = |of: fn(&SnapshotReport) -> f64| figures(&|each| of(&each.report));
            let stops = report(|report| report.downtime_us as f64 / 1000.0);
            let totals = report(|report| report.total_us as f64 / 1000.0);
            let median = |figures: &[f64]| crate::row::percentile(figures, 0.5);
            println!(
                "{name:18}  {:11}  {:12.2}  {:10.0}  {:13.2}  {:13.0}  {:4.2}",
                load.name(),
                median(&totals) / 1000.0,
                // The last is the one for which it stands still.
                median(&report(|report| f64::from(report.rounds) + 1.0)),
                median(&stops),
                median(&report(
                    |report| (report.last_round_bytes / PAGE_BYTES) as f64
                )),
                median(&figures(&|each| each.size)),
            );
            let setting = format!("{name}, {}", load.name());
            let of = |bench, figures: &[f64]| Row::of(bench, System::Fermata, MEM_MIB, figures);
            let stop = of(Bench::PrecopyStop, &stops);
            let total = of(Bench::PrecopyTotal, &totals);
            rows.extend(
                [stop, total]
                    .into_iter()
                    .flatten()
                    .map(|row| row.at(&setting)),
            );
        }
    }
    Ok(rows)
}

fn machines(
    fermata: &Fermata,
    daemon: Daemon,
    reach: Reach,
    load: Load,
    runs: u32,
    scratch: &Path,
) -> Result<Vec<Measured>> {
    let directory = tempfile::tempdir_in(scratch).context("cannot make a scratch directory")?;
    let (mut machine, _, _wire) = usual(fermata, MEM_MIB, load.pace(), directory.path())?;
    (0..runs)
        .map(|_| save(&mut machine, daemon, reach, directory.path()))
        .collect()
}

/// Saves all of its memory.
fn save(
    machine: &mut FermataMachine,
    daemon: Daemon,
    reach: Reach,
    scratch: &Path,
) -> Result<Measured> {
    // What is in a store already would not be copied.
    let directory = tempfile::tempdir_in(scratch).context("cannot make a scratch directory")?;
    let path = directory.path();
    let memory = path.join("snapshot.memory");
    let receiver = match (daemon, reach) {
        (_, Reach::Here) => None,
        (Daemon::Streaming, Reach::OverTcp) => Some(Receiver::start(Keeps::InFiles(path), path)?),
        (Daemon::Memory, Reach::OverTcp) => {
            Some(Receiver::start(Keeps::InStore(&new_store(path)?), path)?)
        }
    };
    let to = match (&receiver, daemon) {
        (Some(receiver), _) => receiver.destination("snapshot"),
        (None, Daemon::Streaming) => Destination::files(path.join("snapshot.state"), &memory),
        (None, Daemon::Memory) => in_store(&new_store(path)?, "snapshot"),
    };
    let report = machine.live(to, Some(MemoryCopy::PreCopy))?;
    ensure!(
        report.copied_bytes >= report.written_bytes / 2,
        "hardly anything was copied before the guest stood still: {report:?}"
    );
    let kept = match daemon {
        Daemon::Streaming => memory.metadata()?.blocks() * 512,
        Daemon::Memory => report.written_bytes,
    };
    Ok(Measured {
        size: kept as f64 / report.memory_bytes as f64,
        report,
    })
}
