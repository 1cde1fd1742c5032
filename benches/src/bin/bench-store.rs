//! `cargo xtask bench store`: fermata's store beside restic, borg, casync and rustic, by turns.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use benches::{
    Bench, Row, System, images, report,
    store::{self, Borg, Bounds, Casync, ChunkSize, Fermata, Race, Restic, Rustic, Subject, Task},
};
use clap::{Parser, Subcommand};

/// Memory that behaves like a file system: no disk is measured.
const SCRATCH: &str = "/dev/shm";

/// All sizes of chunks that the store has, in bytes.
const CHUNK_BYTES: [u32; 12] = [
    512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131_072, 262_144, 524_288, 1_048_576,
];

/// Those that a course is saved with: there the steps between tell nothing more.
const COURSE_CHUNK_BYTES: [u32; 7] = [512, 1024, 4096, 16384, 65536, 262_144, 1_048_576];

/// The size that the store has by itself.
const DEFAULT: &[u32] = &[4096];

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
    /// fermata alone
    #[arg(long)]
    alone: bool,
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
        let mut bounds = Vec::new();
        let (mut four, mut course) = (Vec::new(), Vec::new());
        for round in 0..self.rounds {
            println!("\nround {} of {}", round + 1, self.rounds);
            race.run(round)?;
            let bound = Bounds::measure(race.images(), scratch.path())?;
            println!("{bound:.2?}");
            bounds.push(bound);
            four.extend(self.four(scratch.path(), DEFAULT)?);
            course.extend(self.course(scratch.path(), DEFAULT)?);
        }
        let (mut rows, others) = race.rows();
        drop(race);
        rows.extend(bound_rows(&bounds));
        rows.extend(chunk_rows(Bench::FourSize, Bench::FourSave, &four));
        rows.extend(chunk_rows(Bench::CourseSize, Bench::CourseSave, &course));
        report::write_json(&rows, &self.json)?;
        println!("\n{}", report::store_table(&rows));
        println!(
            "Settings that were not the best:\n{}",
            report::list(&others)
        );
        println!("fermata alone:\n{}", report::list(&alone(&rows)));
        if let Some(directory) = &self.figures {
            let four = self.four(scratch.path(), &CHUNK_BYTES)?;
            let course = self.course(scratch.path(), &COURSE_CHUNK_BYTES)?;
            store::draw(&four, &course, directory)?;
            println!("{}", report::chunk_table(&four));
            println!("{}", report::chunk_table(&course));
        }
        Ok(())
    }

    fn subjects(&self) -> Result<Vec<Box<dyn Subject>>> {
        let mut subjects: Vec<Box<dyn Subject>> = vec![Box::new(Fermata::new()?)];
        if self.alone {
            return Ok(subjects);
        }
        subjects.push(Box::new(Restic));
        for borg in Borg::ALL {
            subjects.push(Box::new(borg));
        }
        for casync in Casync::ALL {
            subjects.push(Box::new(casync));
        }
        let rustics = self.rustic.iter().flat_map(|program| Rustic::all(program));
        subjects.extend(rustics.map(|rustic| Box::new(rustic) as Box<dyn Subject>));
        Ok(subjects)
    }

    /// What four snapshots of a small guest take.
    fn four(&self, scratch: &Path, sizes: &[u32]) -> Result<Vec<ChunkSize>> {
        let directory = scratch.join("four");
        std::fs::create_dir_all(&directory).context("cannot make a directory")?;
        for file in images::Set::Small.files() {
            std::fs::copy(self.images.join(&file), directory.join(&file))
                .with_context(|| format!("cannot copy {file}"))?;
        }
        store::sweep(&directory, scratch, sizes)
    }

    /// What 150 snapshots of a course take.
    fn course(&self, scratch: &Path, sizes: &[u32]) -> Result<Vec<ChunkSize>> {
        store::sweep(&self.images.join(images::COURSE), scratch, sizes)
    }
}

fn bound_rows(bounds: &[Bounds]) -> Vec<Row> {
    let rates = |time: fn(&Bounds) -> Duration| -> Vec<f64> {
        let bounds = bounds.iter();
        bounds
            .map(|bound| bound.bytes as f64 / 1e6 / time(bound).as_secs_f64())
            .collect()
    };
    let row = |bench, time: fn(&Bounds) -> Duration, setting| {
        Row::of(bench, System::Fermata, images::MEMORY_MIB, &rates(time)).map(|row| row.at(setting))
    };
    let slowest = "slowest primitive";
    let sum = "primitives in sum";
    [
        row(Bench::SaveBound, Bounds::save, slowest),
        row(Bench::SaveBound, Bounds::save_in_sum, sum),
        row(Bench::SaveAgainBound, Bounds::save_again, slowest),
        row(Bench::SaveAgainBound, Bounds::save_again_in_sum, sum),
        row(Bench::LoadBound, Bounds::load, slowest),
        row(Bench::LoadBound, Bounds::load_in_sum, sum),
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
