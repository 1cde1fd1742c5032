//! A guest of a few instructions on this machine's own `/dev/kvm`, whatever that is.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result};
use control::{CpuModel, MachineConfig, Origin, Source};
use testbed::kvm::{self, Level};

use crate::{
    Bench, Console, Fermata, Files, Machine, Row, Samples, System,
    chronometer::{self, Step},
    fermata::FermataMachine,
    filler::{self, Filler},
};

/// Pauses in each run.
const PAUSES: u32 = 20;

/// Half to one millisecond on today's machines.
const CYCLES_A_TICK: u64 = 1 << 21;

/// What a guest that needs next to nothing gets.
const MIN_MEMORY_MIB: u64 = 64;

/// Intervals of the chronometer that are looked at after a hold: the one it fell into, and one that follows if that was
/// told of already.
const INTERVALS: usize = 2;

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
    let mut machine = filled(fermata, mem_mib, directory.path())?;
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

/// Starts the guest that fills all of its memory and writes to it from then on, with its files in `scratch`, and waits until it is full.
///
/// # Errors
///
/// When it does not run.
pub fn filled(fermata: &Fermata, mem_mib: u64, scratch: &Path) -> Result<FermataMachine> {
    let pace = Pace {
        pages_a_tick: PAGES_A_TICK,
        cycles_a_tick: CYCLES_A_TICK,
    };
    let kernel = scratch.join("kernel");
    filled_at(fermata, config(mem_mib, &kernel), pace, scratch).map(|(machine, _)| machine)
}

/// How fast a guest writes to its memory, a word in each page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// Pages that it writes to between two ticks. Each tick it prints a dot.
    pub(crate) pages_a_tick: u64,
    /// How far apart ticks are at least, in cycles of the TSC.
    pub(crate) cycles_a_tick: u64,
}

/// As [`filled`], in the machine of `config` and at this pace; with the guest's console.
pub(crate) fn filled_at(
    fermata: &Fermata,
    config: MachineConfig,
    pace: Pace,
    scratch: &Path,
) -> Result<(FermataMachine, Console)> {
    let filler = Filler {
        memory_bytes: (config.memory_mib << 20).min(filler::MAX_BYTES),
        pages_a_tick: pace.pages_a_tick,
        cycles_a_tick: pace.cycles_a_tick,
        user: to_cpl_3()?,
    };
    std::fs::write(&config.kernel, filler.kernel()).context("cannot write the guest")?;
    let mut console = Console::create(scratch.join("booted.console"))?;
    let machine = fermata.start(Origin::Boot(config), console.path())?;
    console.wait_for_output()?;
    Ok((machine, console))
}

/// Holds a guest that does nothing but look at its clock, for `hold`, as often as `rounds` says, with all files in an empty
/// directory under `scratch`. Gives what the clock went forward each time.
///
/// # Errors
///
/// When any of it fails.
pub fn clock_steps(
    fermata: &Fermata,
    hold: Duration,
    rounds: u32,
    scratch: &Path,
) -> Result<Option<Row>> {
    let directory = tempfile::tempdir_in(scratch).context("cannot make a scratch directory")?;
    let kernel = directory.path().join("kernel");
    let guest = chronometer::kernel(to_cpl_3()?);
    std::fs::write(&kernel, guest).context("cannot write the guest")?;
    let mut console = Console::create(directory.path().join("console"))?;
    let origin = Origin::Boot(config(MIN_MEMORY_MIB, &kernel));
    let mut machine = fermata.start(origin, console.path())?;
    console.wait_for_output()?;
    let mut steps = Vec::new();
    while steps.len() < rounds as usize {
        machine.hold_for(hold, || console.forget())?;
        // The hold is in one of them, unless it fell into the time of printing, which is in no step.
        let lines = console.next_lines(INTERVALS)?;
        let seen = lines.iter().filter_map(|line| Step::of_line(line));
        let longest = seen.max_by_key(|step| step.tsc);
        steps.extend(longest.map(|step| step.kvmclock.as_nanos() as f64 / 1000.0));
    }
    let row = Row::of(Bench::ClockStep, System::Fermata, MIN_MEMORY_MIB, &steps);
    Ok(row.map(|row| row.at(&format!("held for {} ms", hold.as_millis()))))
}

pub(crate) fn config(memory_mib: u64, kernel: &Path) -> MachineConfig {
    MachineConfig {
        cpu: CpuModel::Host,
        vcpus: 1,
        memory_mib,
        kernel: kernel.to_owned(),
        initrd: None,
        cmdline: String::new(),
        disks: Vec::new(),
        nets: Vec::new(),
        vsock: None,
        balloon: None,
        console_device: control::ConsoleDevice::default(),
    }
}

/// Whether guests of a few instructions run at the CPU's speed at CPL 3 alone.
pub(crate) fn to_cpl_3() -> Result<bool> {
    Ok(kvm::pick()?.level == Level::Nested)
}
