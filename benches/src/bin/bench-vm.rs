//! `cargo xtask bench vm`: Linux guests on fermata and on QEMU, in turns.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use benches::{Fermata, LinuxGuest, MEMORY_MIB, Samples, measure, qemu::Qemu, report};
use clap::Parser;

/// Memory that behaves like a file system: what is measured is the monitors, not a disk.
const SCRATCH: &str = "/dev/shm";

/// More than a machine and its snapshot take, less than half of the emulated machine has.
const TOUCHED_MIB: u32 = 1536;

#[derive(Parser)]
#[command(about = "Boots, saves and restores Linux guests on fermata and on QEMU, in turns")]
struct Arguments {
    /// File for the rows
    #[arg(long)]
    json: PathBuf,
    /// How often each is measured
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// Guest memory in MiB, several separated by commas
    #[arg(long, value_delimiter = ',', default_values_t = MEMORY_MIB)]
    mem_mib: Vec<u64>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let scratch = tempfile::tempdir_in(SCRATCH).context("cannot make a scratch directory")?;
    let guest = LinuxGuest::copied_to(scratch.path())?;
    let subjects = Subjects {
        fermata: Fermata::new(scratch.path())?,
        qemu: Qemu::new()?,
        scratch: scratch.path(),
    };
    touch_memory(scratch.path())?;
    // Once for nothing: afterwards both programs and their libraries are in the page cache.
    subjects.measure_both(&guest, 0, &mut Samples::default())?;
    let mut samples = Samples::default();
    for mem_mib in arguments.mem_mib {
        let guest = LinuxGuest {
            mem_mib,
            ..guest.clone()
        };
        for run in 0..arguments.runs {
            println!("{mem_mib} MiB, run {} of {}", run + 1, arguments.runs);
            subjects.measure_both(&guest, run, &mut samples)?;
        }
    }
    let rows = samples.rows();
    report::write_json(&rows, &arguments.json)?;
    println!("\n{}", report::table(&rows));
    Ok(())
}

/// Fills a file and removes it. An emulated machine's memory is taken from its host when it is first
/// touched; whoever came first would pay for that.
fn touch_memory(scratch: &Path) -> Result<()> {
    let mut file = tempfile::tempfile_in(scratch).context("cannot make a scratch file")?;
    let block = vec![1; 1 << 20];
    for _ in 0..TOUCHED_MIB {
        file.write_all(&block)
            .with_context(|| format!("{SCRATCH} has no room for {TOUCHED_MIB} MiB"))?;
    }
    Ok(())
}

/// What is compared.
struct Subjects<'a> {
    fermata: Fermata,
    qemu: Qemu,
    scratch: &'a Path,
}

impl Subjects<'_> {
    /// Measures both, in an order that changes from run to run: whatever else the host does hits both.
    fn measure_both(&self, guest: &LinuxGuest, run: u32, samples: &mut Samples) -> Result<()> {
        let fermata = |samples: &mut _| measure(&self.fermata, guest, self.scratch, samples);
        let qemu = |samples: &mut _| measure(&self.qemu, guest, self.scratch, samples);
        if run.is_multiple_of(2) {
            fermata(samples)?;
            qemu(samples)
        } else {
            qemu(samples)?;
            fermata(samples)
        }
    }
}
