//! Images that lie in memory, saved and loaded by the library: a guest's memory does, and no file is read or written but the store's.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use dedup::{CreateOptions, OpenOptions, Store, Zeros};

/// Images, by name.
pub struct InMemory(Vec<(String, Vec<u8>)>);

/// Rates in MB/s, of bytes of the images, zeros included.
#[derive(Clone, Copy, Debug)]
pub struct MemoryRates {
    /// Of the first save, into an empty store.
    pub save: f64,
    /// Of a second one, with nothing changed.
    pub save_again: f64,
    /// Of a load, checked as every load is.
    pub load: f64,
}

impl InMemory {
    /// Reads all files in `images`.
    ///
    /// # Errors
    ///
    /// When one cannot be read.
    pub fn read(images: &Path) -> Result<Self> {
        let read = |path: std::path::PathBuf| {
            let image =
                std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            Ok((name.into_owned(), image))
        };
        super::pages::files(images)?
            .into_iter()
            .map(read)
            .collect::<Result<_>>()
            .map(Self)
    }

    /// Measures with a store of this `level` in `scratch`, where nothing is left. It is saved once before that counts, as everybody
    /// who is measured more than once does.
    ///
    /// # Errors
    ///
    /// When the store says no, or does not give back what it was given.
    pub fn measure(&self, scratch: &Path, level: i32) -> Result<MemoryRates> {
        let create = CreateOptions {
            level,
            ..CreateOptions::default()
        };
        let new_store = || -> Result<(tempfile::TempDir, Store)> {
            let directory =
                tempfile::tempdir_in(scratch).context("cannot make a store's directory")?;
            let path = directory.path().join("store");
            let store = Store::create_dir(&path, &create, OpenOptions::default())?;
            Ok((directory, store))
        };
        let (directory, store) = new_store()?;
        self.save(&store, "rehearsed")?;
        drop((store, directory));

        let (_directory, store) = new_store()?;
        Ok(MemoryRates {
            save: self.rate(self.save(&store, "first")?),
            save_again: self.rate(self.save(&store, "again")?),
            load: self.rate(self.load(&store, "first")?),
        })
    }

    /// Saves all as images of one snapshot. Each thread copies what it is about to hash, as a snapshot of a guest has it.
    fn save(&self, store: &Store, name: &str) -> Result<Duration> {
        let begun = Instant::now();
        let mut writer = store.writer(name, None)?;
        for (name, bytes) in &self.0 {
            let mut image = writer.image(name)?;
            image.write_with(bytes.len() as u64, |offset, buffer| {
                let rest = usize::try_from(offset).ok().and_then(|at| bytes.get(at..));
                let piece = rest.and_then(|rest| rest.get(..buffer.len()));
                buffer.copy_from_slice(piece.ok_or(std::io::ErrorKind::UnexpectedEof)?);
                Ok(())
            })?;
            image.finish()?;
        }
        writer.commit()?;
        Ok(begun.elapsed())
    }

    /// Loads all, one after the other, into memory that has been touched and is zero.
    fn load(&self, store: &Store, name: &str) -> Result<Duration> {
        let longest = self.0.iter().map(|(_, bytes)| bytes.len()).max();
        let mut memory = vec![0; longest.unwrap_or_default()];
        let snapshot = store.snapshot(name)?;
        let mut took = Duration::ZERO;
        for (name, bytes) in &self.0 {
            memory.fill(0);
            let loaded = &mut memory[..bytes.len()];
            let begun = Instant::now();
            snapshot
                .image(name)?
                .load_into(loaded, Zeros::AlreadyThere)?;
            took += begun.elapsed();
            ensure!(loaded == bytes, "{name} was not loaded as it was saved");
        }
        Ok(took)
    }

    fn rate(&self, took: Duration) -> f64 {
        let bytes: usize = self.0.iter().map(|(_, bytes)| bytes.len()).sum();
        bytes as f64 / 1e6 / took.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_memory_is_saved_and_comes_back() {
        let directory = tempfile::tempdir().unwrap();
        let images = directory.path().join("images");
        std::fs::create_dir(&images).unwrap();
        for (name, bytes) in [("one", 3 << 20), ("other", (1 << 20) + 5)] {
            let content: Vec<u8> = (0..bytes).map(|at: usize| (at >> 9) as u8).collect();
            std::fs::write(images.join(name), content).unwrap();
        }
        let scratch = directory.path().join("scratch");
        std::fs::create_dir(&scratch).unwrap();
        let images = InMemory::read(&images).unwrap();
        for level in [0, 1] {
            let rates = images.measure(&scratch, level).unwrap();
            for rate in [rates.save, rates.save_again, rates.load] {
                assert!(rate.is_finite() && rate > 0.0, "{rates:?}");
            }
        }
        assert_eq!(super::super::pages::bytes_under(&scratch).unwrap(), 0);
    }
}
