//! `cargo xtask bench io`: disks, networks, boot and memory of Linux guests on fermata and on QEMU, in turns.

use std::{fmt, path::PathBuf};

use anyhow::{Context, Result};
use benches::{
    Fermata, Figures, LinuxGuest, MEMORY_MIB,
    io::{self, Plan},
    qemu::Qemu,
    report,
};
use clap::Parser;

/// Memory that behaves like a file system: what is measured is the monitors, not a disk.
const SCRATCH: &str = "/dev/shm";

#[derive(Parser)]
#[command(about = "fio and iperf3 in Linux guests on fermata and on QEMU, in turns")]
struct Arguments {
    /// File for the rows
    #[arg(long)]
    json: PathBuf,
    /// How often each is measured
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// Seconds of each of fio's jobs
    #[arg(long, default_value_t = 1)]
    fio: u32,
    /// Seconds of each direction of iperf3
    #[arg(long, default_value_t = 2)]
    iperf: u32,
    /// vCPUs of the guests whose disks and networks are measured. With more than the host has CPUs, guests spend their time
    /// waiting for locks whose holders do not run
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// What is measured, several separated by commas
    #[arg(long, value_delimiter = ',', default_values_t = Part::ALL)]
    parts: Vec<Part>,
}

/// What can be measured alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Boot times, and what idle monitors take.
    Idle,
    /// Disks.
    Disks,
    /// Network devices.
    Nets,
}

impl Part {
    const ALL: [Self; 3] = [Self::Idle, Self::Disks, Self::Nets];
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "idle",
            Self::Disks => "disks",
            Self::Nets => "nets",
        })
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let scratch = tempfile::tempdir_in(SCRATCH).context("cannot make a scratch directory")?;
    let mut figures = Figures::default();
    let has = |part| arguments.parts.contains(&part);
    if has(Part::Idle) {
        idle(&arguments, scratch.path(), &mut figures)?;
    }
    let plan = Plan {
        disks: has(Part::Disks),
        nets: has(Part::Nets),
        vcpus: arguments.vcpus,
        runs: arguments.runs,
        fio: arguments.fio,
        iperf: arguments.iperf,
    };
    if plan.disks || plan.nets {
        io::measure(scratch.path(), plan, &mut figures)?;
    }
    let rows = figures.rows(MEMORY_MIB[0]);
    report::write_json(&rows, &arguments.json)?;
    println!("\n{}", report::io_table(&rows));
    println!("{}", report::chain_table(&rows));
    Ok(())
}

/// Boot times and what idle monitors take. The first round is for nothing: afterwards programs and libraries are in
/// the page cache.
fn idle(arguments: &Arguments, scratch: &std::path::Path, figures: &mut Figures) -> Result<()> {
    let guest = LinuxGuest::copied_to(scratch)?;
    let (fermata, qemu) = (Fermata::new(scratch)?, Qemu::new()?);
    let mut ignored = Figures::default();
    for run in 0..=arguments.runs {
        println!("boot, run {run} of {}", arguments.runs);
        let figures = if run == 0 {
            &mut ignored
        } else {
            &mut *figures
        };
        let ours = |figures: &mut _| io::measure_idle(&fermata, &guest, scratch, figures);
        let theirs = |figures: &mut _| io::measure_idle(&qemu, &guest, scratch, figures);
        if run.is_multiple_of(2) {
            ours(figures)?;
            theirs(figures)?;
        } else {
            theirs(figures)?;
            ours(figures)?;
        }
    }
    Ok(())
}
