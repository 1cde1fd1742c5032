//! A machine that is restored from a store: how long until its guest does something, and until all is there.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use control::{AfterSnapshot, Destination, Origin, Source, StoreLocation};
use dedup::{CreateOptions, OpenOptions, Store};

use crate::{
    Bench, Console, Fermata, Figures, System,
    filler::Filler,
    native::{config, to_cpl_3},
};

/// End of the memory below the hole, in bytes.
const LOW_MEMORY: u64 = 3 << 30;

/// So often the guest says that it is there: some 20,000 times a second.
const CYCLES_A_TICK: u64 = 1 << 17;

const NAME: &str = "one";

/// A machine in a store.
pub struct SavedMachine {
    store: StoreLocation,
}

impl SavedMachine {
    /// Fills a machine of `mem_mib` with words none of which is like another, as far as it has memory below 3 GiB, and saves it in
    /// a new store in `directory`.
    ///
    /// # Errors
    ///
    /// When any of it fails.
    pub fn make(fermata: &Fermata, mem_mib: u64, directory: &Path) -> Result<Self> {
        let store = StoreLocation {
            directory: directory.join("store"),
            key_file: None,
        };
        Store::create_dir(
            &store.directory,
            &CreateOptions::default(),
            OpenOptions::default(),
        )?;
        let kernel = directory.join("kernel");
        let filler = Filler {
            memory_bytes: (mem_mib << 20).min(LOW_MEMORY),
            pages_a_tick: 0,
            cycles_a_tick: CYCLES_A_TICK,
            user: to_cpl_3()?,
        };
        std::fs::write(&kernel, filler.kernel()).context("cannot write the guest")?;
        let mut console = Console::create(directory.join("booted.console"))?;
        let origin = Origin::Boot(config(mem_mib, &kernel));
        let mut machine = fermata.start(origin, console.path())?;
        console.wait_for_output()?;
        let to = Destination::Stored {
            store: store.clone(),
            name: NAME.to_owned(),
        };
        machine.save(to, AfterSnapshot::Halt)?;
        Ok(Self { store })
    }

    /// Restores it once with all of its memory loaded first, and once on demand, in an order that turns round from run to run.
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
        let mut ways = [true, false];
        if run % 2 == 1 {
            ways.reverse();
        }
        for on_demand in ways {
            self.restore(fermata, on_demand, directory, figures)?;
        }
        Ok(())
    }

    fn restore(
        &self,
        fermata: &Fermata,
        on_demand: bool,
        directory: &Path,
        figures: &mut Figures,
    ) -> Result<()> {
        let mut console = Console::create(directory.join("restored.console"))?;
        let source = Source::Stored {
            store: self.store.clone(),
            name: NAME.to_owned(),
        };
        let begun = Instant::now();
        let (machine, setting) = if on_demand {
            let machine = fermata.restore_on_demand(source, console.path())?;
            (machine, "on demand")
        } else {
            let machine = fermata.start(Origin::Restore(source), console.path())?;
            (machine, "all first")
        };
        console.wait_for_output()?;
        let first = begun.elapsed();
        machine.wait_for_memory()?;
        let all = begun.elapsed();
        let mut add = |bench, time: Duration| {
            let ms = time.as_micros() as f64 / 1000.0;
            figures.add(bench, System::Fermata, setting, ms);
        };
        add(Bench::RestoreFirst, first);
        if on_demand {
            add(Bench::RestoreAll, all);
        }
        Ok(())
    }
}
