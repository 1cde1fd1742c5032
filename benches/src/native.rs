//! A guest of a few instructions on this machine's own `/dev/kvm`, whatever that is.

use std::path::Path;

use anyhow::{Context, Result};
use control::{CpuModel, MachineConfig, Origin, Source};
use testbed::kvm::{self, Level};

use crate::{Bench, Console, Fermata, Files, Machine, Samples, System, filler::Filler};

/// Pauses in each run.
const PAUSES: u32 = 20;

/// Half to one millisecond on today's machines.
const CYCLES_A_TICK: u64 = 1 << 21;

/// Between 400 and 800 MiB a second.
const PAGES_A_TICK: u64 = 100;

/// Fills a machine of `mem_mib`, holds it, takes a snapshot, and restores that in a fresh process, with
/// all files in an empty directory under `scratch`. Adds the times to `samples`.
///
/// # Errors
///
/// When any of it fails.
pub fn measure(
    fermata: &Fermata,
    mem_mib: u64,
    scratch: &Path,
    samples: &mut Samples,
) -> Result<()> {
    let directory = tempfile::tempdir_in(scratch).context("cannot make a scratch directory")?;
    let mut add = |bench, time| samples.add(mem_mib, bench, System::Fermata, time);
    let files = Files::in_directory(directory.path());
    let kernel = directory.path().join("kernel");
    let filler = Filler {
        memory_bytes: mem_mib << 20,
        pages_a_tick: PAGES_A_TICK,
        cycles_a_tick: CYCLES_A_TICK,
        user: kvm::pick()?.level == Level::Nested,
    };
    std::fs::write(&kernel, filler.kernel()).context("cannot write the guest")?;
    let config = MachineConfig {
        cpu: CpuModel::Host,
        vcpus: 1,
        memory_mib: mem_mib,
        kernel,
        initrd: None,
        cmdline: String::new(),
        disks: Vec::new(),
        nets: Vec::new(),
        vsock: None,
    };

    let mut console = Console::create(directory.path().join("booted.console"))?;
    let mut machine = fermata.start(Origin::Boot(config), console.path())?;
    console.wait_for_output()?;
    for _ in 0..PAUSES {
        add(Bench::Pause, machine.pause()?);
    }
    let saved = machine.snapshot(&files)?;
    add(Bench::Snapshot, saved.total);
    add(Bench::Downtime, saved.downtime);
    drop(machine);

    let mut console = Console::create(directory.path().join("restored.console"))?;
    let begun = std::time::Instant::now();
    let Files { state, memory } = files;
    let machine = fermata.start(
        Origin::Restore(Source::files(state, memory)),
        console.path(),
    )?;
    console.wait_for_output()?;
    add(Bench::Restore, begun.elapsed());
    drop(machine);
    Ok(())
}
