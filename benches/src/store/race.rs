//! All subjects, by turns.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};

use super::{Place, Subject, pages, reads, subject};
use crate::{Bench, Row, System, images};

const MB: f64 = 1e6;
const MIB: f64 = (1 << 20) as f64;

/// Subjects, and what they took so far.
pub struct Race {
    subjects: Vec<Box<dyn Subject>>,
    place: Place,
    names: Vec<String>,
    bytes: u64,
    /// By subject, in the order in which they were given.
    figures: BTreeMap<(Bench, usize), Vec<f64>>,
}

impl Race {
    /// Copies the files `images` into memory, with no holes: that is how a guest's memory comes to be saved.
    /// Each round loads another of them alone, from the first on. Everything else is written to `scratch` too.
    ///
    /// # Errors
    ///
    /// When there is no room.
    pub fn new(
        subjects: Vec<Box<dyn Subject>>,
        images: &[PathBuf],
        scratch: &Path,
    ) -> Result<Self> {
        let place = Place::in_directory(scratch)?;
        let mut names = Vec::new();
        let mut bytes = 0;
        for image in images {
            let name = image.file_name().unwrap_or_default().to_string_lossy();
            bytes += copy_densely(image, &place.images.join(&*name))?;
            names.push(name.into_owned());
        }
        Ok(Self {
            subjects,
            place,
            names,
            bytes,
            figures: BTreeMap::new(),
        })
    }

    /// The directory with the images and nothing else.
    pub fn images(&self) -> &Path {
        &self.place.images
    }

    /// Takes all subjects through all steps once, those for which once is enough in the first round only. Who is first changes from round to round. In the first, what was
    /// loaded is compared with what was saved.
    ///
    /// # Errors
    ///
    /// When a subject fails.
    pub fn run(&mut self, round: usize) -> Result<()> {
        for turn in 0..self.subjects.len() {
            let number = (turn + round) % self.subjects.len();
            if round > 0 && self.subjects[number].once() {
                continue;
            }
            self.measure(number, round).with_context(|| {
                let subject = &self.subjects[number];
                format!("{} ({})", subject.system(), subject.setting())
            })?;
        }
        Ok(())
    }

    fn measure(&mut self, number: usize, round: usize) -> Result<()> {
        let (place, subject) = (&self.place, &self.subjects[number]);
        let all = self.bytes as f64 / MB;
        let one = &self.names[round % self.names.len()];

        self.warm(number)?;
        subject::run(subject.create(place))?;
        let save = timed(|| subject::run(subject.save(place, "first")))?;
        let size = pages::bytes_under(&place.store)? as f64 / MIB;
        let again = timed(|| subject::run(subject.save(place, "again")))?;
        if subject.once() {
            pages::warm(&place.loaded, self.bytes)?;
        } else {
            subject::run(subject.load(place, "first"))?;
            place.clear_loaded()?;
        }
        let load = timed(|| subject::run(subject.load(place, "first")))?;
        if round == 0 {
            self.compare()?;
        }
        place.clear_loaded()?;
        let load_one = timed(|| subject::run(subject.load_one(place, "first", one)))?;
        let mut figures = vec![
            (Bench::Size, size),
            (Bench::Save, all / save),
            (Bench::SaveAgain, all / again),
            (Bench::Load, all / load),
            (Bench::LoadOne, load_one),
        ];
        if subject.system() == System::Fermata {
            let (median, late) = reads::measure(&place.store, "first", one)?;
            figures.extend([(Bench::ReadAt, median), (Bench::ReadAtP99, late)]);
        }
        print!("{} ({}):", subject.system(), subject.setting());
        for (bench, figure) in figures {
            print!(" {bench} {figure:.2} {}", bench.unit());
            self.figures
                .entry((bench, number))
                .or_default()
                .push(figure);
        }
        println!();
        place.clear()
    }

    /// Saves without looking at the time; where once is enough, as much memory as the images have is touched instead. A virtual machine's
    /// host takes memory back that lies idle, and a page that it has to find anew costs several times what it does else: who comes first
    /// would pay for all. What was given back a moment ago is given out again.
    fn warm(&self, number: usize) -> Result<()> {
        let (place, subject) = (&self.place, &self.subjects[number]);
        place.clear()?;
        if subject.once() {
            return pages::warm(&place.loaded, self.bytes);
        }
        subject::run(subject.create(place))?;
        subject::run(subject.save(place, "rehearsed"))?;
        place.clear()
    }

    /// Fails unless all that was loaded is as it was.
    fn compare(&self) -> Result<()> {
        for name in &self.names {
            let saved = self.place.images.join(name);
            let loaded = self.place.loaded.join(name);
            ensure!(
                same(&saved, &loaded)?,
                "{name} was not loaded as it was saved"
            );
        }
        Ok(())
    }

    /// A row for each benchmark and system, of the setting at which the system does best, and behind it those of
    /// its other settings.
    #[must_use]
    pub fn rows(&self) -> (Vec<Row>, Vec<Row>) {
        let mut best: Vec<Row> = Vec::new();
        let mut others = Vec::new();
        for (&(bench, number), figures) in &self.figures {
            let subject = &self.subjects[number];
            let Some(row) = Row::of(bench, subject.system(), images::MEMORY_MIB, figures) else {
                continue;
            };
            let row = row.at(subject.setting());
            let rival = best
                .iter_mut()
                .find(|rival| (rival.bench, rival.system) == (bench, row.system));
            match rival {
                None => best.push(row),
                Some(rival) if row.is_better_than(rival) => {
                    others.push(std::mem::replace(rival, row));
                }
                Some(_) => others.push(row),
            }
        }
        (best, others)
    }
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begun = Instant::now();
    work()?;
    Ok(begun.elapsed().as_secs_f64())
}

fn copy_densely(from: &Path, to: &Path) -> Result<u64> {
    let context = || format!("cannot copy {} to {}", from.display(), to.display());
    let mut source = File::open(from).with_context(context)?;
    let mut target = File::create(to).with_context(context)?;
    let mut piece = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let now = source.read(&mut piece).with_context(context)?;
        if now == 0 {
            return Ok(bytes);
        }
        target.write_all(&piece[..now]).with_context(context)?;
        bytes += now as u64;
    }
}

fn same(one: &Path, other: &Path) -> Result<bool> {
    let open =
        |path: &Path| File::open(path).with_context(|| format!("cannot read {}", path.display()));
    let (mut one, mut other) = (open(one)?, open(other)?);
    let (mut mine, mut theirs) = (Vec::new(), Vec::new());
    loop {
        for (file, piece) in &mut [(&mut one, &mut mine), (&mut other, &mut theirs)] {
            piece.clear();
            Read::by_ref(*file).take(16 << 20).read_to_end(piece)?;
        }
        if mine != theirs {
            return Ok(false);
        }
        if mine.is_empty() {
            return Ok(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Copies files, and damages them if it is told to.
    struct Copier {
        damages: bool,
    }

    impl Copier {
        fn copy(from: &Path, to: &Path) -> Vec<Command> {
            let mut copy = Command::new("cp");
            copy.arg("-r").arg(from.join(".")).arg(to);
            vec![copy]
        }
    }

    impl Subject for Copier {
        fn system(&self) -> System {
            System::Restic
        }

        fn setting(&self) -> &'static str {
            "cp"
        }

        fn create(&self, _: &Place) -> Vec<Command> {
            Vec::new()
        }

        fn save(&self, place: &Place, name: &str) -> Vec<Command> {
            Self::copy(&place.images, &place.store.join(name))
        }

        fn load(&self, place: &Place, name: &str) -> Vec<Command> {
            let mut commands = Self::copy(&place.store.join(name), &place.loaded);
            if self.damages {
                let mut damage = Command::new("truncate");
                damage.arg("--size=5").arg(place.loaded.join("image"));
                commands.push(damage);
            }
            commands
        }

        fn load_one(&self, place: &Place, name: &str, image: &str) -> Vec<Command> {
            let mut copy = Command::new("cp");
            copy.arg(place.store.join(name).join(image))
                .arg(&place.loaded);
            vec![copy]
        }
    }

    fn race(damages: bool) -> (tempfile::TempDir, Result<Vec<Row>>) {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        std::fs::write(&image, vec![3; 3 << 20]).unwrap();
        let subjects: Vec<Box<dyn Subject>> = vec![Box::new(Copier { damages })];
        let scratch = directory.path().join("scratch");
        let mut race = Race::new(subjects, &[image], &scratch).unwrap();
        let rows = race.run(0).map(|()| race.rows().0);
        (directory, rows)
    }

    #[test]
    fn every_step_is_measured() {
        let (_directory, rows) = race(false);
        let rows = rows.unwrap();
        let size = rows.iter().find(|row| row.bench == Bench::Size).unwrap();
        assert!((size.median - 3.0).abs() < 0.1, "{size:?}");
        assert_eq!(rows.len(), 5);
    }

    #[test]
    fn what_does_not_come_back_is_an_error() {
        let (_directory, rows) = race(true);
        let error = format!("{:#}", rows.unwrap_err());
        assert!(error.contains("was not loaded as it was saved"), "{error}");
    }
}
