//! `cargo xtask bench store`: fermata's store beside restic, borg, casync and rustic, by turns.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use benches::{
    Bench, Row, System, images, report,
    store::{
        self, Borg, Bounds, Casync, ChunkSize, Fermata, InMemory, MemoryRates, Race, Restic,
        Rustic, SETTINGS, SMALLEST, Subject, Task,
    },
};
use clap::{Parser, Subcommand};
use dedup::CreateOptions;

/// Memory that behaves like a file system: no disk is measured.
const SCRATCH: &str = "/dev/shm";

/// All sizes of chunks that the store has, in bytes.
const CHUNK_BYTES: [u32; 12] = [
    512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131_072, 262_144, 524_288, 1_048_576,
];

/// Those that a course is saved with: there the steps between tell nothing more.
const COURSE_CHUNK_BYTES: [u32; 7] = [512, 1024, 4096, 16384, 65536, 262_144, 1_048_576];

/// A level at which a few snapshots of a small guest still take little, in less time.
const QUICK: (i32, &str) = (-1, "zstd -1, 4 KiB");

#[derive(Parser)]
#[command(about = "Saves and loads images of guests, with fermata's store and with others")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure
    Run(Run),
    /// Do one step with fermata's store
    Task {
        #[command(subcommand)]
        task: Task,
    },
}

#[derive(clap::Args)]
struct Run {
    /// File for the rows
    #[arg(long)]
    json: PathBuf,
    /// Directory with the images that store-images makes
    #[arg(long)]
    images: PathBuf,
    /// rustic's program; without it, rustic is left out
    #[arg(long)]
    rustic: Option<PathBuf>,
    /// Directory for drawings; without it, only the default size of chunks is measured
    #[arg(long)]
    figures: Option<PathBuf>,
    /// How often each is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only these programs: for a look, not for the record
    #[arg(long, value_delimiter = ',', value_enum)]
    only: Vec<System>,
    /// Where images, stores and what is loaded are kept
    #[arg(long, default_value = SCRATCH)]
    scratch: PathBuf,
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Run(run) => run.measure(),
        Command::Task { task } => task.run(),
    }
}

impl Run {
    fn measure(&self) -> Result<()> {
        let scratch =
            tempfile::tempdir_in(&self.scratch).context("cannot make a scratch directory")?;
        let images = images::measured(&self.images);
        let mut race = Race::new(self.subjects()?, &images, &scratch.path().join("race"))?;
        let kinds = [SETTINGS[0], QUICK];
        let mut bounds = SETTINGS.map(|_| Vec::new());
        let mut in_memory = SETTINGS.map(|_| Vec::new());
        let (mut four, mut course) = (Vec::new(), Vec::new());
        for round in 0..self.rounds {
            println!("\nround {} of {}", round + 1, self.rounds);
            race.run(round)?;
            for ((level, setting), of_level) in SETTINGS.into_iter().zip(&mut bounds) {
                of_level.push(bound(&race, scratch.path(), level, setting)?);
            }
            let images = InMemory::read(race.images())?;
            for ((level, setting), of_level) in SETTINGS.into_iter().zip(&mut in_memory) {
                let rates = images.measure(scratch.path(), level)?;
                println!("{setting}, in memory: {rates:.0?}");
                of_level.push(rates);
            }
            drop(images);
            four.push(self.four(scratch.path(), &kinds.map(|(level, _)| at_level(level)))?);
            course.extend(self.course(scratch.path(), &[CreateOptions::default()])?);
        }
        let (level, setting) = SMALLEST;
        let smallest = [bound(&race, scratch.path(), level, setting)?];
        let (mut rows, others) = race.rows();
        drop(race);
        for ((_, setting), of_level) in SETTINGS.into_iter().zip(&bounds) {
            rows.extend(bound_rows(of_level, setting));
        }
        for ((_, setting), of_level) in SETTINGS.into_iter().zip(&in_memory) {
            rows.extend(memory_rows(of_level, setting));
        }
        rows.extend(bound_rows(&smallest, setting));
        for (number, (_, setting)) in kinds.iter().enumerate() {
            let of_kind: Vec<_> = four.iter().map(|run| run[number]).collect();
            let of_kind = chunk_rows(Bench::FourSize, Bench::FourSave, &of_kind);
            rows.extend(of_kind.into_iter().map(|row| row.at(setting)));
        }
        rows.extend(chunk_rows(Bench::CourseSize, Bench::CourseSave, &course));
        report::write_json(&rows, &self.json)?;
        println!("\n{}", report::store_table(&rows));
        println!(
            "Settings that were not the best:\n{}",
            report::list(&others)
        );
        println!("fermata alone:\n{}", report::list(&alone(&rows)));
        rows.extend(others);
        println!("Beside the bounds:\n{}", report::bound_table(&rows));
        if let Some(directory) = &self.figures {
            let four = self.four(scratch.path(), &CHUNK_BYTES.map(of_size))?;
            let course = self.course(scratch.path(), &COURSE_CHUNK_BYTES.map(of_size))?;
            store::draw(&four, &course, directory)?;
            println!("{}", report::chunk_table(&four));
            println!("{}", report::chunk_table(&course));
        }
        Ok(())
    }

    fn subjects(&self) -> Result<Vec<Box<dyn Subject>>> {
        let mut subjects: Vec<Box<dyn Subject>> = Vec::new();
        for fermata in Fermata::all()? {
            subjects.push(Box::new(fermata));
        }
        for restic in Restic::ALL {
            subjects.push(Box::new(restic));
        }
        for borg in Borg::ALL {
            subjects.push(Box::new(borg));
        }
        for casync in Casync::ALL {
            subjects.push(Box::new(casync));
        }
        let rustics = self.rustic.iter().flat_map(|program| Rustic::all(program));
        subjects.extend(rustics.map(|rustic| Box::new(rustic) as Box<dyn Subject>));
        if !self.only.is_empty() {
            subjects.retain(|subject| self.only.contains(&subject.system()));
        }
        Ok(subjects)
    }

    /// What four snapshots of a small guest take.
    fn four(&self, scratch: &Path, kinds: &[CreateOptions]) -> Result<Vec<ChunkSize>> {
        let directory = scratch.join("four");
        std::fs::create_dir_all(&directory).context("cannot make a directory")?;
        for file in images::Set::Small.files() {
            std::fs::copy(self.images.join(&file), directory.join(&file))
                .with_context(|| format!("cannot copy {file}"))?;
        }
        store::sweep(&directory, scratch, kinds)
    }

    /// What 150 snapshots of a course take.
    fn course(&self, scratch: &Path, kinds: &[CreateOptions]) -> Result<Vec<ChunkSize>> {
        store::sweep(&self.images.join(images::COURSE), scratch, kinds)
    }
}

fn at_level(level: i32) -> CreateOptions {
    CreateOptions {
        level,
        ..CreateOptions::default()
    }
}

fn of_size(chunk_size: u32) -> CreateOptions {
    CreateOptions {
        chunk_size,
        ..CreateOptions::default()
    }
}

/// What this machine's primitives take at a level, right behind what was measured at it.
fn bound(race: &Race, scratch: &Path, level: i32, setting: &str) -> Result<Bounds> {
    let bound = Bounds::measure(race.images(), scratch, level)?;
    println!("{setting}: {bound:.2?}");
    Ok(bound)
}

/// What the slowest primitive allows, under the setting's name, and what all in sum do.
fn bound_rows(bounds: &[Bounds], setting: &str) -> Vec<Row> {
    let rate = |bound: &Bounds, time: Duration| bound.bytes as f64 / 1e6 / time.as_secs_f64();
    let row = |bench, time: fn(&Bounds) -> Option<Duration>, setting: &str| {
        let rates = bounds
            .iter()
            .filter_map(|bound| Some(rate(bound, time(bound)?)));
        let rates: Vec<_> = rates.collect();
        Row::of(bench, System::Fermata, images::MEMORY_MIB, &rates).map(|row| row.at(setting))
    };
    let sum = format!("{setting}, all in sum");
    [
        row(Bench::SaveBound, |bounds| Some(bounds.save()), setting),
        row(Bench::SaveBound, |bounds| Some(bounds.save_in_sum()), &sum),
        row(
            Bench::SaveAgainBound,
            |bounds| Some(bounds.save_again()),
            setting,
        ),
        row(
            Bench::SaveAgainBound,
            |bounds| Some(bounds.save_again_in_sum()),
            &sum,
        ),
        row(Bench::LoadBound, |bounds| Some(bounds.load()), setting),
        row(Bench::LoadBound, |bounds| Some(bounds.load_in_sum()), &sum),
        row(Bench::LoadMemoryBound, Bounds::load_memory, setting),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// What was saved from memory and loaded to it.
fn memory_rows(rates: &[MemoryRates], setting: &str) -> Vec<Row> {
    let row = |bench, of: fn(&MemoryRates) -> f64| {
        let rates: Vec<_> = rates.iter().map(of).collect();
        Row::of(bench, System::Fermata, images::MEMORY_MIB, &rates).map(|row| row.at(setting))
    };
    [
        row(Bench::SaveMemory, |rates| rates.save),
        row(Bench::SaveMemoryAgain, |rates| rates.save_again),
        row(Bench::LoadMemory, |rates| rates.load),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn chunk_rows(size: Bench, save: Bench, runs: &[ChunkSize]) -> Vec<Row> {
    let row = |bench, of: fn(&ChunkSize) -> f64| {
        let figures: Vec<_> = runs.iter().map(of).collect();
        Row::of(bench, System::Fermata, images::MEMORY_MIB, &figures)
    };
    let stored = |run: &ChunkSize| run.stored as f64 / f64::from(1 << 20);
    [row(size, stored), row(save, |run| run.save)]
        .into_iter()
        .flatten()
        .collect()
}

/// The rows that only fermata has.
fn alone(rows: &[Row]) -> Vec<Row> {
    let rows = rows.iter();
    rows.filter(|row| !report::COMPARED.contains(&row.bench))
        .cloned()
        .collect()
}
