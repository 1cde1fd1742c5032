//! The report's own tables: what several snapshots of a guest take, at every size of chunks.

use std::{path::Path, time::Instant};

use anyhow::{Context, Result};
use dedup::{CreateOptions, FILE_IMAGE, OpenOptions, Store, Zeros};

use super::pages::bytes_under;
use crate::images::Course;

/// What snapshots took at one size of chunks.
#[derive(Clone, Copy, Debug)]
pub struct ChunkSize {
    /// Bytes in a chunk.
    pub chunk_bytes: u32,
    /// Snapshots.
    pub snapshots: usize,
    /// Bytes of the store.
    pub stored: u64,
    /// Seconds for saving all of them.
    pub save: f64,
    /// Seconds for loading all of them.
    pub load: f64,
}

/// Saves the files in the directory `source`, or all of a course, into a store of each kind.
///
/// # Errors
///
/// When the store or a file says no.
pub fn sweep(source: &Path, scratch: &Path, kinds: &[CreateOptions]) -> Result<Vec<ChunkSize>> {
    kinds
        .iter()
        .map(|kind| measure(source, scratch, kind))
        .collect()
}

/// More memory than a store here takes.
const WARM_BYTES: u64 = 2 << 30;

/// Saves memories, one after the other, and loads them, into memory both. `source` is a course, or a directory with
/// a file for each.
fn measure(source: &Path, scratch: &Path, kind: &CreateOptions) -> Result<ChunkSize> {
    let directory = tempfile::tempdir_in(scratch).context("cannot make a store's directory")?;
    super::pages::warm(directory.path(), WARM_BYTES)?;
    let path = directory.path().join("store");
    let store = Store::create_dir(&path, kind, OpenOptions::default())?;
    let (mut save, mut snapshots) = (0.0, 0);
    let mut bytes = 0;
    for_each(source, |memory| {
        let begun = Instant::now();
        let mut writer = store.writer(&snapshots.to_string(), None)?;
        let mut image = writer.image(FILE_IMAGE)?;
        image.write(memory)?;
        image.finish()?;
        writer.commit()?;
        save += begun.elapsed().as_secs_f64();
        snapshots += 1;
        bytes = memory.len();
        Ok(())
    })?;
    drop(store);
    let stored = bytes_under(&path)?;

    let store = Store::open_dir(&path, OpenOptions::default())?;
    let mut memory = vec![0; bytes];
    let begun = Instant::now();
    for snapshot in 0..snapshots {
        let image = store.image(&snapshot.to_string(), FILE_IMAGE)?;
        image.load_into(&mut memory, Zeros::Write)?;
    }
    Ok(ChunkSize {
        chunk_bytes: kind.chunk_size,
        snapshots,
        stored,
        save,
        load: begun.elapsed().as_secs_f64(),
    })
}

/// Shows `work` one memory after the other.
fn for_each(source: &Path, mut work: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    if source.is_dir() {
        for file in super::pages::files(source)? {
            let memory =
                std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
            work(&memory)?;
        }
        return Ok(());
    }
    let mut course = Course::open(source)?;
    while let Some(memory) = course.next_memory()? {
        work(memory)?;
    }
    Ok(())
}
