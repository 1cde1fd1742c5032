//! A machine that is restored from a store: how long until its guest does something, and until all is there.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use control::{
    AfterSnapshot, Destination, Origin, Prepare, Shape, Source, StoreLocation, UseWorkingSet,
};
use dedup::{CreateOptions, OpenOptions, Store};

use crate::{
    Bench, Console, Fermata, Figures, System,
    fermata::LOOK_AGAIN,
    filler::{Filler, MAX_BYTES},
    native::{config, to_cpl_3},
    toucher::Toucher,
};

/// So often the guest says that it is there: some 20,000 times a second.
const CYCLES_A_TICK: u64 = 1 << 17;

const NAME: &str = "one";

/// A machine in a store.
pub struct SavedMachine {
    store: StoreLocation,
    shape: Shape,
}

/// How it is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    AllFirst,
    OnDemand,
    Prepared,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::AllFirst => "all first",
            Self::OnDemand => "on demand",
            Self::Prepared => "on demand, prepared",
        }
    }
}

impl SavedMachine {
    /// Fills a machine of `mem_mib` with words none of which is like another, as far as it has memory below 3 GiB, and saves it in
    /// a new store in `directory`.
    ///
    /// # Errors
    ///
    /// When any of it fails.
    pub fn make(fermata: &Fermata, mem_mib: u64, directory: &Path) -> Result<Self> {
        let filler = Filler {
            memory_bytes: (mem_mib << 20).min(MAX_BYTES),
            pages_a_tick: 0,
            cycles_a_tick: CYCLES_A_TICK,
            user: to_cpl_3()?,
        };
        Self::of(fermata, mem_mib, &filler.kernel(), directory)
    }

    /// As [`SavedMachine::make`], with a guest that touches so many pages all over its memory again and again.
    ///
    /// # Errors
    ///
    /// When any of it fails.
    pub fn touching(fermata: &Fermata, mem_mib: u64, pages: u64, directory: &Path) -> Result<Self> {
        let toucher = Toucher {
            memory_bytes: (mem_mib << 20).min(MAX_BYTES),
            pages,
            user: to_cpl_3()?,
        };
        Self::of(fermata, mem_mib, &toucher.kernel(), directory)
    }

    /// With the guest `kernel`, saved when it first prints something.
    fn of(fermata: &Fermata, mem_mib: u64, kernel: &[u8], directory: &Path) -> Result<Self> {
        let store = StoreLocation {
            directory: directory.join("store"),
            key_file: None,
        };
        Store::create_dir(
            &store.directory,
            &CreateOptions::default(),
            OpenOptions::default(),
        )?;
        let path = directory.join("kernel");
        std::fs::write(&path, kernel).context("cannot write the guest")?;
        let mut console = Console::create(directory.join("booted.console"))?;
        let config = config(mem_mib, &path);
        let shape = Shape {
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
        };
        let origin = Origin::Boot(config);
        let mut machine = fermata.start(origin, console.path())?;
        console.wait_for_output()?;
        let to = Destination::Stored {
            store: store.clone(),
            name: NAME.to_owned(),
        };
        machine.save(to, AfterSnapshot::Halt)?;
        Ok(Self { store, shape })
    }

    /// Has its working set recorded, in place of what is known of it.
    ///
    /// # Errors
    ///
    /// When it cannot be restored.
    pub fn record(&self, fermata: &Fermata, directory: &Path) -> Result<()> {
        let console = Console::create(directory.join("recorded.console"))?;
        let machine =
            fermata.restore_on_demand(self.source(), console.path(), UseWorkingSet::Record)?;
        let store = Store::open_dir(&self.store.directory, OpenOptions::default())?;
        let snapshot = store.snapshot(NAME)?;
        while snapshot.annotation("working-set")?.is_none() {
            std::thread::sleep(LOOK_AGAIN);
        }
        machine.wait_for_memory()
    }

    /// Restores it once without its working set, and once with it, in an order that turns from run to run, and takes the time until its
    /// guest has touched all of that.
    ///
    /// # Errors
    ///
    /// When any of it fails.
    pub fn measure_touching(
        &self,
        fermata: &Fermata,
        run: u32,
        directory: &Path,
        figures: &mut Figures,
    ) -> Result<()> {
        let mut ways = [UseWorkingSet::Ignore, UseWorkingSet::Bring];
        ways.rotate_left(run as usize % 2);
        for way in ways {
            let mut console = Console::create(directory.join("touching.console"))?;
            let begun = Instant::now();
            let machine = fermata.restore_on_demand(self.source(), console.path(), way)?;
            // The first is the end of the round in which it was saved.
            console.wait_for("..")?;
            let ms = begun.elapsed().as_micros() as f64 / 1000.0;
            let setting = match way {
                UseWorkingSet::Bring => "with its working set",
                UseWorkingSet::Ignore | UseWorkingSet::Record => "without",
            };
            figures.add(Bench::RestoreTouched, System::Fermata, setting, ms);
            drop(machine);
        }
        Ok(())
    }

    fn source(&self) -> Source {
        Source::Stored {
            store: self.store.clone(),
            name: NAME.to_owned(),
        }
    }

    /// Restores it once with all of its memory loaded first, once on demand, and once on demand in a process that was prepared, in an
    /// order that turns from run to run.
    ///
    /// # Errors
    ///
    /// When any of it fails.
    pub fn measure(
        &self,
        fermata: &Fermata,
        run: u32,
        directory: &Path,
        figures: &mut Figures,
    ) -> Result<()> {
        let mut ways = [Way::AllFirst, Way::OnDemand, Way::Prepared];
        ways.rotate_left(run as usize % 3);
        for way in ways {
            self.restore(fermata, way, directory, figures)?;
        }
        Ok(())
    }

    fn restore(
        &self,
        fermata: &Fermata,
        way: Way,
        directory: &Path,
        figures: &mut Figures,
    ) -> Result<()> {
        let mut console = Console::create(directory.join("restored.console"))?;
        let source = self.source();
        let pool = fermata.pool(1)?;
        if way == Way::Prepared {
            fermata.fill(&pool, Prepare::Shape(self.shape));
        }
        let begun = Instant::now();
        let machine = match way {
            Way::AllFirst => fermata.start(Origin::Restore(source), console.path()),
            Way::OnDemand => {
                fermata.restore_on_demand(source, console.path(), UseWorkingSet::Ignore)
            }
            Way::Prepared => fermata.restore_prepared(&pool, source, console.path()),
        }?;
        console.wait_for_output()?;
        let first = begun.elapsed();
        machine.wait_for_memory()?;
        let all = begun.elapsed();
        let mut add = |bench, time: Duration| {
            let ms = time.as_micros() as f64 / 1000.0;
            figures.add(bench, System::Fermata, way.name(), ms);
        };
        add(Bench::RestoreFirst, first);
        if way != Way::AllFirst {
            add(Bench::RestoreAll, all);
        }
        Ok(())
    }
}
