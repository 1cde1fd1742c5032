//! What every monitor is put through, in the same steps and by the same clock.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use testbed::{
    environment,
    guest::{self, Role},
};

use crate::{Bench, Console, MEMORY_MIB, Samples, System};

/// A line of the guest that it prints once everything it does is under way: it has counted to three.
pub(crate) const SETTLED: &str = "fermata-guest: count 3 ";

/// Half of the guest's nap between two lines.
pub(crate) const HALF_A_NAP: Duration = Duration::from_millis(100);

/// What boots Linux guests, takes snapshots of them, and restores those.
pub trait Monitor {
    /// A machine of it. Dropped, it is gone at once, with its process.
    type Machine: Machine;
    /// Its name in the results.
    const SYSTEM: System;

    /// Starts a process that boots `guest`; returns before the guest is up.
    ///
    /// # Errors
    ///
    /// When it does not start.
    fn boot(&self, guest: &LinuxGuest, console: &Path) -> Result<Self::Machine>;

    /// Starts a process that goes on from the snapshot of `guest` in `files`; returns before the guest
    /// runs.
    ///
    /// # Errors
    ///
    /// When it does not start.
    fn restore(&self, guest: &LinuxGuest, files: &Files, console: &Path) -> Result<Self::Machine>;
}

/// A machine that runs.
pub trait Machine {
    /// Takes a snapshot after which the guest goes on; returns when the files are complete and durable.
    ///
    /// # Errors
    ///
    /// When it is not taken.
    fn snapshot(&mut self, files: &Files) -> Result<Saved>;

    /// Its process.
    fn pid(&self) -> u32;
}

/// What a snapshot took.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    /// From the request until the files were durable.
    pub total: Duration,
    /// How long the guest did not run.
    pub downtime: Duration,
}

/// Where a snapshot goes. A monitor that needs one file uses the second.
#[derive(Clone, Debug)]
pub struct Files {
    /// The state of the machine.
    pub state: PathBuf,
    /// Its memory.
    pub memory: PathBuf,
}

impl Files {
    /// In `directory`.
    pub fn in_directory(directory: &Path) -> Self {
        Self {
            state: directory.join("machine.state"),
            memory: directory.join("machine.memory"),
        }
    }
}

/// What the machines boot.
#[derive(Clone, Debug)]
pub struct LinuxGuest {
    /// A bzImage.
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    pub initrd: PathBuf,
    /// Its command line.
    pub cmdline: String,
    /// Its memory in MiB.
    pub mem_mib: u64,
}

impl LinuxGuest {
    /// The guest that the environment names, its files copied to `directory`, so that reading them costs
    /// the same each time. Its memory is the least of [`MEMORY_MIB`].
    ///
    /// # Errors
    ///
    /// When the environment does not say where they are, or they cannot be copied.
    pub fn copied_to(directory: &Path) -> Result<Self> {
        let copy = |variable: &str, name: &str| -> Result<PathBuf> {
            let from = environment::path(variable)?;
            let to = directory.join(name);
            std::fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
            Ok(to)
        };
        Ok(Self {
            kernel: copy(environment::GUEST_KERNEL, "vmlinuz")?,
            initrd: copy(environment::GUEST_INITRD, "initrd")?,
            cmdline: guest::command_line(Role::Counter),
            mem_mib: MEMORY_MIB[0],
        })
    }
}

/// Boots `guest` on `monitor`, takes a snapshot, and restores it in a fresh process, with all files in
/// an empty directory under `scratch`. Adds the four times to `samples`.
///
/// # Errors
///
/// When any of it fails.
pub fn measure<M: Monitor>(
    monitor: &M,
    guest: &LinuxGuest,
    scratch: &Path,
    samples: &mut Samples,
) -> Result<()> {
    let directory = tempfile::tempdir_in(scratch).context("cannot make a scratch directory")?;
    let mut add = |bench, time| samples.add(guest.mem_mib, bench, M::SYSTEM, time);
    let files = Files::in_directory(directory.path());

    let mut console = Console::create(directory.path().join("booted.console"))?;
    let begun = Instant::now();
    let mut machine = monitor.boot(guest, console.path())?;
    console.wait_for(guest::READY)?;
    add(Bench::Boot, begun.elapsed());

    console.wait_for(SETTLED)?;
    // The guest is cut in the middle of its nap, whichever monitor runs it: what is left of the nap is
    // part of the time to its first output after the restore.
    std::thread::sleep(HALF_A_NAP);
    let saved = machine.snapshot(&files)?;
    add(Bench::Snapshot, saved.total);
    add(Bench::Downtime, saved.downtime);
    drop(machine);

    let mut console = Console::create(directory.path().join("restored.console"))?;
    let begun = Instant::now();
    let machine = monitor.restore(guest, &files, console.path())?;
    console.wait_for_output()?;
    add(Bench::Restore, begun.elapsed());
    drop(machine);
    Ok(())
}
