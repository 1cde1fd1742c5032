//! `cargo xtask bench native`: what the host's own `/dev/kvm` allows, at its own speed.

use std::path::PathBuf;

use anyhow::{Context, Result};
use benches::{Fermata, MEMORY_MIB, Samples, native, report};
use clap::Parser;

/// Memory that behaves like a file system: what is measured is the monitor, not a disk.
const SCRATCH: &str = "/dev/shm";

#[derive(Parser)]
#[command(about = "Holds, saves and restores a guest that keeps changing all of its memory")]
struct Arguments {
    /// File for the rows
    #[arg(long)]
    json: PathBuf,
    /// How often each is measured
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// Guest memory in MiB, several separated by commas; at most 1024
    #[arg(long, value_delimiter = ',', default_values_t = MEMORY_MIB)]
    mem_mib: Vec<u64>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let scratch = tempfile::tempdir_in(SCRATCH).context("cannot make a scratch directory")?;
    let fermata = Fermata::new(scratch.path())?;
    let mut samples = Samples::default();
    for mem_mib in arguments.mem_mib {
        for run in 0..arguments.runs {
            println!("{mem_mib} MiB, run {} of {}", run + 1, arguments.runs);
            native::measure(&fermata, mem_mib, scratch.path(), &mut samples)?;
        }
    }
    let rows = samples.rows();
    report::write_json(&rows, &arguments.json)?;
    println!("\n{}", report::table(&rows));
    Ok(())
}
