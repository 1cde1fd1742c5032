//! `cargo xtask bench instant`: snapshots that a guest does not feel, forks, resets, and restores on demand, on the host's
//! own `/dev/kvm`.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use benches::{
    Fermata, Figures, Row,
    elsewhere::{self, MachineElsewhere},
    forks,
    instant::{self, Load},
    on_demand::SavedMachine,
    pre_copy, report, resets,
};
use clap::Parser;

/// Memory that behaves like a file system: what is measured is the monitor, not a disk.
const SCRATCH: &str = "/dev/shm";

/// Memory of the machine that is restored from a store, in MiB.
const RESTORED_MIB: u64 = 4096;

/// Pages that the guest touches whose working set is recorded: 64 MiB.
const TOUCHED_PAGES: u64 = 16_384;

/// Memory of the machines that are reset, in MiB.
const RESET_MIB: [u64; 2] = [256, 2048];

#[derive(Parser)]
#[command(about = "Saves, forks and restores guests of a few instructions")]
struct Arguments {
    /// File for the rows
    #[arg(long)]
    json: PathBuf,
    /// How many snapshots are taken of each machine
    #[arg(long, default_value_t = 100)]
    snapshots: u32,
    /// How often everything else is measured
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// Guest memory in MiB, several separated by commas; guests fill at most 3072
    #[arg(long, value_delimiter = ',', default_values_t = [256, 1024, 8192])]
    mem_mib: Vec<u64>,
    /// What is measured, several separated by commas
    #[arg(long, value_delimiter = ',', default_values_t = Part::ALL)]
    parts: Vec<Part>,
}

/// What can be measured alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// How long a guest stands still for a snapshot by copy-on-write.
    Stops,
    /// How fast it is beside such snapshots.
    Share,
    /// Snapshots by pre-copy.
    PreCopy,
    /// Forks.
    Forks,
    /// Resets.
    Resets,
    /// Restores on demand.
    Restores,
    /// Restores on demand of a guest whose working set is known.
    Touching,
    /// Restores where the machine's disk is not.
    Disks,
}

impl Part {
    const ALL: [Self; 8] = [
        Self::Stops,
        Self::Share,
        Self::PreCopy,
        Self::Forks,
        Self::Resets,
        Self::Restores,
        Self::Touching,
        Self::Disks,
    ];

    fn measure(self, fermata: &Fermata, arguments: &Arguments, scratch: &Path) -> Result<Vec<Row>> {
        match self {
            Self::Stops => stops(fermata, arguments, scratch),
            Self::Share => share(fermata, arguments.runs, scratch),
            Self::PreCopy => pre_copy::table(fermata, arguments.runs, scratch),
            Self::Forks => forks::measure(fermata, arguments.runs, scratch),
            Self::Resets => resets(fermata, arguments.runs, scratch),
            Self::Restores => restores(fermata, arguments.runs),
            Self::Touching => touching(fermata, arguments.runs),
            Self::Disks => disks(fermata, arguments.runs),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stops => "stops",
            Self::Share => "share",
            Self::PreCopy => "pre-copy",
            Self::Forks => "forks",
            Self::Resets => "resets",
            Self::Restores => "restores",
            Self::Touching => "touching",
            Self::Disks => "disks",
        })
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let scratch = tempfile::tempdir_in(SCRATCH).context("cannot make a scratch directory")?;
    let fermata = Fermata::new(scratch.path())?;
    let mut rows = Vec::new();
    for part in &arguments.parts {
        rows.extend(part.measure(&fermata, &arguments, scratch.path())?);
    }
    println!("{}", report::list(&rows));
    report::write_json(&rows, &arguments.json)
}

fn stops(fermata: &Fermata, arguments: &Arguments, scratch: &Path) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for mem_mib in &arguments.mem_mib {
        for load in [Load::Idle, Load::Busy] {
            let count = arguments.snapshots;
            rows.extend(instant::snapshots(fermata, *mem_mib, load, count, scratch)?);
        }
    }
    Ok(rows)
}

fn share(fermata: &Fermata, runs: u32, scratch: &Path) -> Result<Vec<Row>> {
    let loads = [Load::Busy, Load::Unpaced].into_iter();
    loads
        .filter_map(|load| instant::share(fermata, 256, load, runs, scratch).transpose())
        .collect()
}

fn resets(fermata: &Fermata, runs: u32, scratch: &Path) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for mem_mib in RESET_MIB {
        rows.extend(resets::measure(fermata, mem_mib, runs, scratch)?);
    }
    Ok(rows)
}

/// Of one machine from a store.
fn restores(fermata: &Fermata, runs: u32) -> Result<Vec<Row>> {
    let scratch = tempfile::tempdir_in(SCRATCH).context("cannot make a scratch directory")?;
    let machine = SavedMachine::make(fermata, RESTORED_MIB, scratch.path())?;
    // The first is for nothing, as far as the page cache goes.
    machine.measure(fermata, 0, scratch.path(), &mut Figures::default())?;
    let mut figures = Figures::default();
    for run in 0..runs {
        machine.measure(fermata, run, scratch.path(), &mut figures)?;
    }
    Ok(figures.rows(RESTORED_MIB))
}

/// Of one machine from a store whose disk is nowhere else.
fn disks(fermata: &Fermata, runs: u32) -> Result<Vec<Row>> {
    let scratch = tempfile::tempdir_in(SCRATCH).context("cannot make a scratch directory")?;
    let machine = MachineElsewhere::make(fermata, scratch.path())?;
    // As of restores.
    machine.measure(fermata, 0, &mut Figures::default())?;
    let mut figures = Figures::default();
    for run in 0..runs {
        machine.measure(fermata, run, &mut figures)?;
    }
    Ok(figures.rows(elsewhere::MEM_MIB))
}

/// Of one machine from a store whose guest touches pages all over its memory.
fn touching(fermata: &Fermata, runs: u32) -> Result<Vec<Row>> {
    let scratch = tempfile::tempdir_in(SCRATCH).context("cannot make a scratch directory")?;
    let path = scratch.path();
    let machine = SavedMachine::touching(fermata, RESTORED_MIB, TOUCHED_PAGES, path)?;
    machine.record(fermata, path)?;
    let mut figures = Figures::default();
    for run in 0..runs {
        machine.measure_touching(fermata, run, path, &mut figures)?;
    }
    Ok(figures.rows(RESTORED_MIB))
}
