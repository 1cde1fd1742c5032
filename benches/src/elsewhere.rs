//! A machine that is restored where its disk is not: how long until its guest does something, and until all of the disk is there.

use std::{
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result};
use branch_disk::{Disk, Foundation, anything};
use control::{
    AfterSnapshot, Destination, DiskConfig, DiskFormat, DiskLimits, LaunchSpec, MachineConfig,
    Origin, Source, StoreLocation, UseWorkingSet,
};
use dedup::{CreateOptions, OpenOptions, Store};

use crate::{
    Bench, Console, Fermata, Figures, System,
    filler::Filler,
    native::{config, to_cpl_3},
};

/// Memory of the machine, in MiB: little, for it is not what is measured.
pub const MEM_MIB: u64 = 64;
/// Size of its disk, all of which is words none of which is like another, in bytes.
const DISK_BYTES: u64 = 2 << 30;
const CYCLES_A_TICK: u64 = 1 << 17;
const NAME: &str = "one";

/// A machine in a store whose disk is nowhere else.
pub struct MachineElsewhere {
    store: StoreLocation,
    scratch: PathBuf,
}

impl MachineElsewhere {
    /// Makes one in `scratch`.
    ///
    /// # Errors
    ///
    /// When any of it fails.
    pub fn make(fermata: &Fermata, scratch: &Path) -> Result<Self> {
        let store = StoreLocation {
            directory: scratch.join("store"),
            key_file: None,
        };
        let (create, open) = (CreateOptions::default(), OpenOptions::default());
        Store::create_dir(&store.directory, &create, open)?;
        let guest = Filler {
            memory_bytes: MEM_MIB << 20,
            pages_a_tick: 0,
            cycles_a_tick: CYCLES_A_TICK,
            user: to_cpl_3()?,
        };
        let kernel = scratch.join("kernel");
        std::fs::write(&kernel, guest.kernel()).context("cannot write the guest")?;
        let home = scratch.join("home");
        std::fs::create_dir(&home).context("cannot make a directory")?;
        let disk = DiskConfig {
            path: disk(&home)?,
            read_only: false,
            format: DiskFormat::Branch,
            serial: None,
            limits: DiskLimits::default(),
        };
        let config = MachineConfig {
            disks: vec![disk],
            ..config(MEM_MIB, &kernel)
        };
        let mut console = Console::create(scratch.join("booted.console"))?;
        let mut machine = fermata.start(Origin::Boot(config), console.path())?;
        console.wait_for_output()?;
        let to = Destination::Stored {
            store: store.clone(),
            name: NAME.to_owned(),
        };
        machine.save(to, AfterSnapshot::Halt)?;
        drop(machine);
        std::fs::remove_dir_all(home).context("cannot remove the disk")?;
        Ok(Self {
            store,
            scratch: scratch.to_owned(),
        })
    }

    /// Restores it once with all of its memory and disk first, and once with both on demand, in an order that turns from run to run.
    ///
    /// # Errors
    ///
    /// When any of it fails.
    pub fn measure(&self, fermata: &Fermata, run: u32, figures: &mut Figures) -> Result<()> {
        let mut ways = [false, true];
        ways.rotate_left(run as usize % 2);
        for on_demand in ways {
            self.restore(fermata, on_demand, figures)?;
        }
        Ok(())
    }

    fn restore(&self, fermata: &Fermata, on_demand: bool, figures: &mut Figures) -> Result<()> {
        let disks = tempfile::tempdir_in(&self.scratch).context("cannot make a directory")?;
        let mut console = Console::create(self.scratch.join("restored.console"))?;
        let source = Source::Stored {
            store: self.store.clone(),
            name: NAME.to_owned(),
        };
        let spec = LaunchSpec {
            on_demand,
            working_set: UseWorkingSet::Ignore,
            disk_directory: Some(disks.path().to_owned()),
            ..fermata.spec(Origin::Restore(source), console.path())?
        };
        let setting = match on_demand {
            true => "on demand",
            false => "all first",
        };
        let begun = Instant::now();
        let machine = fermata.launch(spec)?;
        let mut add = |bench| {
            let ms = begun.elapsed().as_micros() as f64 / 1000.0;
            figures.add(bench, System::Fermata, setting, ms);
        };
        console.wait_for_output()?;
        add(Bench::DiskFirst);
        if on_demand {
            machine.wait_for_disk()?;
            add(Bench::DiskAll);
        }
        Ok(())
    }
}

/// A disk in `directory` that branches from a raw image, whose words are those of Steele, Lea and Flood's SplitMix64.
fn disk(directory: &Path) -> Result<PathBuf> {
    let base = directory.join("base");
    let file = std::fs::File::create(&base).context("cannot make a disk")?;
    let mut file = BufWriter::new(file);
    for number in 0..DISK_BYTES / 8 {
        let mut word = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        file.write_all(&(word ^ (word >> 31)).to_le_bytes())?;
    }
    file.flush().context("cannot write a disk")?;
    let path = directory.join("disk");
    Disk::create(&path, None, &Foundation::Raw(base), &anything)?;
    Ok(path)
}
