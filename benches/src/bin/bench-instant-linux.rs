//! The part of `cargo xtask bench instant` that wants Linux guests, in the emulated machine: beside QEMU.

use std::path::PathBuf;

use anyhow::{Context, Result};
use benches::{Fermata, Figures, LinuxGuest, linux_instant, qemu::Qemu, report};
use clap::Parser;

/// Memory that behaves like a file system: what is measured is the monitors, not a disk.
const SCRATCH: &str = "/dev/shm";

#[derive(Parser)]
#[command(about = "Saves and restores running Linux guests on fermata and on QEMU, in turns")]
struct Arguments {
    /// File for the rows
    #[arg(long)]
    json: PathBuf,
    /// How often each is measured
    #[arg(long, default_value_t = 5)]
    runs: u32,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let scratch = tempfile::tempdir_in(SCRATCH).context("cannot make a scratch directory")?;
    let guest = LinuxGuest::copied_to(scratch.path())?;
    let (fermata, qemu) = (Fermata::new(scratch.path())?, Qemu::new()?);
    let directory = scratch.path().join("machines");
    std::fs::create_dir(&directory)?;
    let bed = linux_instant::Bed::new(&fermata, &qemu, &guest, &directory);
    let mut figures = Figures::default();
    bed.save_at_work(arguments.runs, &mut figures)?;
    let saved = bed.save(arguments.runs, &mut figures)?;
    saved.warm()?;
    for run in 0..arguments.runs {
        saved.restore(run, &mut figures)?;
    }
    let rows = figures.rows(linux_instant::MEM_MIB);
    println!("{}", report::list(&rows));
    report::write_json(&rows, &arguments.json)
}
