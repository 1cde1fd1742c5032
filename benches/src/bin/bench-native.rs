//! `cargo xtask bench native`: what the host's own `/dev/kvm` allows, at its own speed.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use benches::{Fermata, Figures, MEMORY_MIB, Row, Samples, chain::Chains, native, report};
use clap::Parser;

/// Memory that behaves like a file system: what is measured is the monitor, not a disk.
const SCRATCH: &str = "/dev/shm";

/// How long a guest that looks at its clock is held, in ms, and how often.
const HOLDS: [(u64, u32); 3] = [(1, 200), (100, 50), (1000, 20)];

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
    let mut rows = samples.rows();
    println!("\n{}", report::table(&rows));
    let mut others = chains(arguments.runs, scratch.path())?;
    println!("{}", report::chain_table(&others));
    for (ms, rounds) in HOLDS {
        let hold = Duration::from_millis(ms);
        others.extend(native::clock_steps(&fermata, hold, rounds, scratch.path())?);
    }
    println!("{}", report::list(&others));
    rows.extend(others);
    report::write_json(&rows, &arguments.json)?;
    Ok(())
}

/// Chains of layers. The first run is for nothing, as far as the page cache and the allocator go.
fn chains(runs: u32, scratch: &Path) -> Result<Vec<Row>> {
    let chains = Chains::make(scratch)?;
    chains.measure(0, &mut Figures::default())?;
    let mut figures = Figures::default();
    for run in 0..runs {
        chains.measure(run, &mut figures)?;
    }
    Ok(figures.rows(0))
}
