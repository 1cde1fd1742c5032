//! A guest that is told what to do.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use control::{AfterSnapshot, CpuModel, DiskConfig, DiskLimits, MachineConfig, Origin};
use cpio::newc::{self, ModeFileType};
use testbed::environment;

use super::{MEMORY_MIB, sparse};
use crate::fermata::FermataMachine;
use crate::{Console, Fermata, Files, Machine, VCPUS};

/// Emulated guests take minutes for what hardware does in seconds.
const PATIENCE: Duration = Duration::from_secs(600);

/// Bytes that the guest reads to see what it is to do; a disk has no fewer.
const ORDER_BYTES: usize = 4096;

/// What guests are started with.
#[derive(Debug)]
pub struct Bench {
    fermata: Fermata,
    /// For all files in work; memory.
    scratch: PathBuf,
    /// For finished images.
    results: PathBuf,
}

/// Which guest to boot.
pub(super) struct Guest<'a> {
    /// Its first process.
    pub(super) init: &'a str,
    /// Its disks, before the one with the orders.
    pub(super) disks: &'a [PathBuf],
}

impl Bench {
    /// Guests whose files lie in `scratch` and whose images go to the share that the environment names.
    ///
    /// # Errors
    ///
    /// When there is no VMM, or the environment says nothing.
    pub fn new(scratch: &Path) -> Result<Self> {
        Ok(Self {
            fermata: Fermata::new(scratch)?,
            scratch: scratch.to_owned(),
            results: environment::path(environment::SHARE)?,
        })
    }

    /// Boots `guest` and waits until it takes orders.
    pub(super) fn boot(&self, guest: &Guest<'_>) -> Result<Worker<'_>> {
        let initrd = self.scratch("initrd");
        write_initrd(guest.init, &initrd)?;
        let orders = self.scratch("orders");
        std::fs::write(&orders, [0; ORDER_BYTES]).context("cannot write orders")?;
        let disks = guest.disks.iter().chain([&orders]);
        let config = MachineConfig {
            cpu: CpuModel::Host,
            vcpus: VCPUS,
            memory_mib: MEMORY_MIB,
            kernel: environment::path(environment::GUEST_KERNEL)?,
            initrd: Some(initrd),
            cmdline: "console=ttyS0 quiet panic=-1 reboot=t rdinit=/bench-init".into(),
            disks: disks
                .map(|path| DiskConfig {
                    path: path.clone(),
                    read_only: false,
                    format: control::DiskFormat::Raw,
                    serial: None,
                    limits: DiskLimits::default(),
                })
                .collect(),
            nets: Vec::new(),
            vsock: None,
            balloon: None,
            console_device: control::ConsoleDevice::default(),
        };
        let mut worker = self.start(Origin::Boot(config), 0)?;
        let ready = "bench-guest: ready.";
        worker.console.wait_for_either(ready, ready, PATIENCE)?;
        Ok(worker)
    }

    /// Goes on from where a guest was frozen, with its disks as they were then.
    pub(super) fn thaw(&self, frozen: &Frozen) -> Result<Worker<'_>> {
        for disk in &frozen.disks {
            copy_with_time(&aside(disk), disk)?;
        }
        let Files { state, memory } = frozen.files.clone();
        self.start(
            Origin::Restore(control::Source::files(state, memory)),
            frozen.done,
        )
    }

    fn start(&self, origin: Origin, done: u32) -> Result<Worker<'_>> {
        let console = Console::create(self.scratch("console"))?;
        Ok(Worker {
            machine: self.fermata.start(origin, console.path())?,
            console,
            bench: self,
            done,
        })
    }

    /// The path of a file in work.
    pub(super) fn scratch(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// The path of a file that is to be kept.
    pub(super) fn result(&self, name: &str) -> PathBuf {
        self.results.join(name)
    }

    /// Keeps a disk as it is.
    pub(super) fn keep_disk(&self, disk: &Path, name: &str) -> Result<()> {
        let len = std::fs::metadata(disk)
            .context("cannot look at a disk")?
            .len();
        sparse::copy(disk, len, &self.result(name))
    }
}

/// A guest at work. Dropped, it is gone.
pub(super) struct Worker<'a> {
    machine: FermataMachine,
    console: Console,
    bench: &'a Bench,
    /// Orders so far.
    done: u32,
}

impl Worker<'_> {
    /// Has the guest do `work`, a word that its first process knows, and waits until it is done.
    pub(super) fn order(&mut self, work: &str) -> Result<()> {
        self.done += 1;
        println!("  {work}");
        let mut order = [0; ORDER_BYTES];
        let text = format!("{} {work}", self.done);
        order[..text.len()].copy_from_slice(text.as_bytes());
        // In place and at once: the guest reads this file as a disk.
        let file = File::options()
            .write(true)
            .open(self.bench.scratch("orders"));
        file.and_then(|file| file.write_all_at(&order, 0))
            .context("cannot write orders")?;
        let number = self.done;
        let done = format!("bench-guest: done {number}.");
        let failed = format!("bench-guest: failed {number}.");
        let said = self.console.wait_for_either(&done, &failed, PATIENCE)?;
        ensure!(said == done, "the guest could not do {work}");
        Ok(())
    }

    /// Saves the guest, which goes on, and keeps its memory as the image `name`.
    pub(super) fn keep_memory(&mut self, name: &str) -> Result<()> {
        let files = Files::in_directory(&self.bench.scratch);
        self.machine.snapshot(&files)?;
        keep(self.bench, &files, name)
    }

    /// Saves the guest, which goes on, to `files`.
    pub(super) fn snapshot(&mut self, files: &Files) -> Result<()> {
        self.machine.snapshot(files)?;
        Ok(())
    }

    /// Saves the guest and ends it, and puts copies of its `disk` and of its orders aside.
    pub(super) fn freeze(mut self, disk: &Path) -> Result<Frozen> {
        let bench = self.bench;
        let frozen = Frozen {
            files: Files {
                state: bench.scratch("frozen.state"),
                memory: bench.scratch("frozen.memory"),
            },
            disks: [disk.to_owned(), bench.scratch("orders")],
            done: self.done,
        };
        self.machine
            .snapshot_then(&frozen.files, AfterSnapshot::Halt)?;
        for disk in &frozen.disks {
            copy_with_time(disk, &aside(disk))?;
        }
        Ok(frozen)
    }
}

/// A guest that was saved and ended.
pub(super) struct Frozen {
    pub(super) files: Files,
    disks: [PathBuf; 2],
    /// The orders it had done.
    done: u32,
}

fn aside(disk: &Path) -> PathBuf {
    disk.with_extension("aside")
}

/// Copies a disk, and the time at which it was written to: a snapshot is restored with no other disk.
fn copy_with_time(from: &Path, to: &Path) -> Result<()> {
    let context = || format!("cannot copy {} to {}", from.display(), to.display());
    std::fs::copy(from, to).with_context(context)?;
    let written = std::fs::metadata(from)
        .and_then(|metadata| metadata.modified())
        .with_context(context)?;
    File::options()
        .write(true)
        .open(to)
        .and_then(|file| file.set_modified(written))
        .with_context(context)
}

/// Keeps the memory of a snapshot as the image `name`. The image is what comes first in the file.
pub(super) fn keep(bench: &Bench, files: &Files, name: &str) -> Result<()> {
    sparse::copy(
        &files.memory,
        MEMORY_MIB << 20,
        &bench.result(&super::memory(name)),
    )?;
    println!("{name} is kept");
    Ok(())
}

/// The test bed's archive with `init` added as `/bench-init`: the kernel unpacks one archive after the other.
fn write_initrd(init: &str, path: &Path) -> Result<()> {
    let mut archive = std::fs::read(environment::path(environment::GUEST_INITRD)?)
        .context("cannot read the guest's archive")?;
    let size = u32::try_from(init.len()).context("the script has more than 4 GiB")?;
    let entry = newc::Builder::new("bench-init")
        .mode(0o755)
        .set_mode_file_type(ModeFileType::Regular);
    let mut writer = entry.write(&mut archive, size);
    std::io::Write::write_all(&mut writer, init.as_bytes()).context("cannot archive a script")?;
    writer.finish().context("cannot archive a script")?;
    newc::trailer(&mut archive).context("cannot close an archive in memory")?;
    std::fs::write(path, archive).with_context(|| format!("cannot write {}", path.display()))
}
