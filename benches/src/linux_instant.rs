//! Linux guests that are saved while they run, and that run before their memory is loaded, on fermata and on QEMU.

use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use control::{MemoryCopy, Origin, Source, UseWorkingSet};
use dedup::{OpenOptions, Store};

use crate::{
    Bench, Console, Fermata, Figures, Files, LinuxGuest, Monitor, System,
    cycle::{HALF_A_NAP, SETTLED},
    fermata::{at, in_store},
    instant::new_store,
    qemu::{Live, Qemu},
};

/// The machine's memory, in MiB.
pub const MEM_MIB: u64 = 1024;
/// What of it the guest fills with what is not like anything else, in MiB.
const FILLED_MIB: u64 = 768;

const NAME: &str = "one";
/// After so long at the latest a restored machine has its working set recorded, also on a slow host.
const RECORDED: Duration = Duration::from_secs(10);
const SETTING: &str = "Linux";
/// The image of a snapshot in a store that is its memory.
const MEMORY_IMAGE: &str = "memory";
/// How long a guest works before it is saved again.
const WORKED: Duration = Duration::from_secs(2);

/// What is measured, and where.
pub struct Bed<'a> {
    fermata: &'a Fermata,
    qemu: &'a Qemu,
    guest: LinuxGuest,
    directory: &'a Path,
}

/// A guest that each of both has saved.
pub struct Saved<'a> {
    bed: &'a Bed<'a>,
    store: PathBuf,
    files: Files,
}

/// How a guest goes on.
#[derive(Clone, Copy)]
enum Way {
    AllFirst,
    OnDemand,
    WithWorkingSet,
    Qemu,
}

impl<'a> Bed<'a> {
    /// With everything in `directory`, which is empty.
    pub fn new(
        fermata: &'a Fermata,
        qemu: &'a Qemu,
        guest: &LinuxGuest,
        directory: &'a Path,
    ) -> Self {
        let guest = LinuxGuest {
            mem_mib: MEM_MIB,
            ..guest.clone()
        };
        Self {
            fermata,
            qemu,
            guest,
            directory,
        }
    }

    /// A guest that is told more on its command line.
    fn guest(&self, word: &str) -> LinuxGuest {
        LinuxGuest {
            cmdline: format!("{} {word}", self.guest.cmdline),
            ..self.guest.clone()
        }
    }

    /// One that has filled its memory.
    fn full(&self) -> LinuxGuest {
        self.guest(&format!("fermata.fill={FILLED_MIB}"))
    }

    /// Boots one guest and then the other, and saves each so many times while it runs, by each way that both have. The first time, when none of
    /// its memory is known to be anywhere, is in no figure.
    ///
    /// # Errors
    ///
    /// When any of it fails.
    pub fn save(&'a self, runs: u32, figures: &mut Figures) -> Result<Saved<'a>> {
        Ok(Saved {
            store: self.save_here(runs, figures)?,
            files: self.save_there(runs, figures)?,
            bed: self,
        })
    }

    fn save_here(&self, runs: u32, figures: &mut Figures) -> Result<PathBuf> {
        let store = new_store(self.directory)?;
        let console = self.console("here")?;
        let mut machine = self.fermata.boot(&self.full(), console.path())?;
        settle(console)?;
        machine.store(&store, NAME)?;
        for run in 0..runs {
            for (bench, copy) in [
                (Bench::CowStop, MemoryCopy::CopyOnWrite),
                (Bench::PrecopyStop, MemoryCopy::PreCopy),
            ] {
                let to = in_store(&store, &format!("{bench}-{run}"));
                let report = machine.live(to, Some(copy))?;
                ensure!(report.copy == copy, "the guest was saved by another way");
                let ms = report.downtime_us as f64 / 1000.0;
                figures.add(bench, System::Fermata, SETTING, ms);
            }
        }
        Ok(store)
    }

    /// Boots ours so that it sorts and packs text, and saves it so many times while it runs: what each snapshot takes, beside what has changed since the one
    /// before.
    ///
    /// # Errors
    ///
    /// When any of it fails.
    pub fn save_at_work(&self, runs: u32, figures: &mut Figures) -> Result<()> {
        let directory = self.directory.join("at-work");
        std::fs::create_dir(&directory).context("cannot make a directory for a store")?;
        let path = new_store(&directory)?;
        let guest = self.guest("fermata.role=work");
        let console = self.console("at-work")?;
        let mut machine = self.fermata.boot(&guest, console.path())?;
        settle(console)?;
        let mut before = "first".to_owned();
        machine.store(&path, &before)?;
        for run in 0..runs {
            thread::sleep(WORKED);
            let name = format!("snapshot-{run}");
            let report = machine.store(&path, &name)?;
            let new = report.stored.context("it is in no store")?.new_bytes;
            let store = Store::open_dir(&path, OpenOptions::default())?;
            let images = store.diff(&before, &name)?;
            let memory = images.iter().find(|image| image.name == MEMORY_IMAGE);
            let changed = memory.context("it has no memory")?.changed_bytes();
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            for (bench, figure) in [
                (Bench::CowSaved, mib(new)),
                (Bench::CowChanged, mib(changed)),
                (Bench::CowSavedShare, 100.0 * new as f64 / changed as f64),
            ] {
                figures.add(bench, System::Fermata, "Linux, at work", figure);
            }
            before = name;
        }
        Ok(())
    }

    fn save_there(&self, runs: u32, figures: &mut Figures) -> Result<Files> {
        let files = Files::in_directory(self.directory);
        let console = self.console("there")?;
        let mut machine = self.qemu.boot(&self.full(), console.path())?;
        settle(console)?;
        // Over and over into one file: there is no room for two.
        machine.live(&files, Live::PreCopy)?;
        for _ in 0..runs {
            for (bench, live) in [
                (Bench::CowStop, Live::Background),
                (Bench::PrecopyStop, Live::PreCopy),
            ] {
                let saved = machine.live(&files, live)?;
                let ms = saved.downtime.as_secs_f64() * 1000.0;
                figures.add(bench, System::Qemu, SETTING, ms);
            }
        }
        Ok(files)
    }

    fn console(&self, name: &str) -> Result<Console> {
        Console::create(self.directory.join(format!("{name}.console")))
    }
}

/// Waits until the guest does what it does, and is in the middle of a nap: what is left of that is part of the time to its first output after
/// a restore.
fn settle(mut console: Console) -> Result<()> {
    console.wait_for(SETTLED)?;
    thread::sleep(HALF_A_NAP);
    Ok(())
}

impl Saved<'_> {
    /// Restores each once for nothing: afterwards programs and snapshots are in the page cache, and what our guest touches first is recorded.
    ///
    /// # Errors
    ///
    /// When any of it fails.
    pub fn warm(&self) -> Result<()> {
        self.restore(0, &mut Figures::default())?;
        let mut console = self.bed.console("recorded")?;
        let machine = self.bed.fermata.restore_on_demand(
            self.source(),
            console.path(),
            UseWorkingSet::Record,
        )?;
        console.wait_for_output()?;
        thread::sleep(RECORDED);
        drop(machine);
        Ok(())
    }

    fn source(&self) -> Source {
        Source::Stored {
            store: at(&self.store),
            name: NAME.to_owned(),
        }
    }

    /// Has the guests go on: ours with all of its memory loaded first, with none, and with what it touched first the last time on its way;
    /// QEMU's with all. The order turns from run to run.
    ///
    /// # Errors
    ///
    /// When any of it fails.
    pub fn restore(&self, run: u32, figures: &mut Figures) -> Result<()> {
        let mut ways = [Way::AllFirst, Way::OnDemand, Way::WithWorkingSet, Way::Qemu];
        ways.rotate_left(run as usize % 4);
        for way in ways {
            let ms = self.restore_by(way)?;
            let (system, setting) = match way {
                Way::AllFirst => (System::Fermata, "Linux, all first"),
                Way::OnDemand => (System::Fermata, "Linux, on demand"),
                Way::WithWorkingSet => (System::Fermata, "Linux, on demand, working set"),
                Way::Qemu => (System::Qemu, SETTING),
            };
            figures.add(Bench::RestoreFirst, system, setting, ms);
        }
        Ok(())
    }

    /// Milliseconds until the guest says something.
    fn restore_by(&self, way: Way) -> Result<f64> {
        let bed = self.bed;
        let console = bed.console("restored")?;
        let source = self.source();
        let begun = Instant::now();
        let first = |mut console: Console| -> Result<f64> {
            console.wait_for_output()?;
            Ok(begun.elapsed().as_secs_f64() * 1000.0)
        };
        match way {
            Way::AllFirst => {
                let _machine = bed.fermata.start(Origin::Restore(source), console.path())?;
                first(console)
            }
            Way::OnDemand | Way::WithWorkingSet => {
                let working_set = match way {
                    Way::WithWorkingSet => UseWorkingSet::Bring,
                    _ => UseWorkingSet::Ignore,
                };
                let path = console.path();
                let restored = bed.fermata.restore_on_demand(source, path, working_set);
                let _machine = restored?;
                first(console)
            }
            Way::Qemu => {
                let _machine = bed.qemu.restore(&bed.full(), &self.files, console.path())?;
                first(console)
            }
        }
    }
}
