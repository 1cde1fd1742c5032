//! Many snapshots of one guest in a small file: of each, the pages that differ from the one before.
//!
//! For each snapshot: the number of changed pages and the length of what follows, two little-endian 32-bit numbers;
//! then, compressed by zstd, the changed pages' numbers, 32 bits each, and the pages. Before the first, all is zero.

use std::{
    fs::File,
    io::{BufReader, BufWriter, ErrorKind, Read, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use super::MEMORY_MIB;

const PAGE: usize = 4096;
const BYTES: usize = (MEMORY_MIB << 20) as usize;

/// A course that is being written.
#[derive(Debug)]
pub struct CourseWriter {
    path: PathBuf,
    file: BufWriter<File>,
    last: Vec<u8>,
    now: Vec<u8>,
}

impl CourseWriter {
    /// Begins a file at `path`.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn create(path: &Path) -> Result<Self> {
        let file =
            File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            file: BufWriter::new(file),
            last: vec![0; BYTES],
            now: vec![0; BYTES],
        })
    }

    /// Adds the memory that the file `memory` begins with.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or what changed cannot be written.
    pub fn add(&mut self, memory: &Path) -> Result<()> {
        File::open(memory)
            .and_then(|mut file| file.read_exact(&mut self.now))
            .with_context(|| format!("cannot read {}", memory.display()))?;
        let pages = || self.now.chunks(PAGE).zip(self.last.chunks(PAGE));
        let changed = || pages().enumerate().filter(|(_, (now, last))| now != last);
        let mut plain: Vec<u8> = changed()
            .flat_map(|(number, _)| (number as u32).to_le_bytes())
            .collect();
        let count = plain.len() / 4;
        for (_, (now, _)) in changed() {
            plain.extend_from_slice(now);
        }
        let stored = zstd::bulk::compress(&plain, 1).context("cannot compress pages")?;
        let context = || format!("cannot write {}", self.path.display());
        for number in [count, stored.len()] {
            let number = u32::try_from(number).with_context(context)?;
            self.file
                .write_all(&number.to_le_bytes())
                .with_context(context)?;
        }
        self.file.write_all(&stored).with_context(context)?;
        std::mem::swap(&mut self.last, &mut self.now);
        Ok(())
    }

    /// Completes the file and copies it to `to`, where it appears whole.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn finish(self, to: &Path) -> Result<()> {
        let context = || format!("cannot write {}", to.display());
        let mut file = self.file;
        file.flush().with_context(context)?;
        let partial = to.with_extension("partial");
        std::fs::copy(&self.path, &partial).with_context(context)?;
        std::fs::rename(&partial, to).with_context(context)
    }
}

/// A course that is read, one snapshot after the other.
#[derive(Debug)]
pub struct Course {
    path: PathBuf,
    file: BufReader<File>,
    memory: Vec<u8>,
}

impl Course {
    /// Opens the file at `path`.
    ///
    /// # Errors
    ///
    /// When it is not there.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            file: BufReader::new(file),
            memory: vec![0; BYTES],
        })
    }

    /// The memory of the next snapshot; `None` after the last.
    ///
    /// # Errors
    ///
    /// When the file is damaged.
    pub fn next_memory(&mut self) -> Result<Option<&[u8]>> {
        let context = || format!("{} is damaged; remove it", self.path.display());
        let mut head = [0; 8];
        match self.file.read_exact(&mut head) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            other => other.with_context(context)?,
        }
        let [a, b, c, d, stored @ ..] = head;
        let count = u32::from_le_bytes([a, b, c, d]) as usize;
        ensure!(count <= BYTES / PAGE, context());
        let mut compressed = Vec::new();
        let stored = u64::from(u32::from_le_bytes(stored));
        let file = self.file.by_ref();
        file.take(stored)
            .read_to_end(&mut compressed)
            .with_context(context)?;
        let plain =
            zstd::bulk::decompress(&compressed, count * (4 + PAGE)).with_context(context)?;
        ensure!(plain.len() == count * (4 + PAGE), context());
        let (numbers, pages) = plain.split_at(count * 4);
        for (number, page) in numbers.as_chunks::<4>().0.iter().zip(pages.chunks(PAGE)) {
            let at = u32::from_le_bytes(*number) as usize * PAGE;
            let target = self.memory.get_mut(at..at + PAGE).with_context(context)?;
            target.copy_from_slice(page);
        }
        Ok(Some(&self.memory))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_come_back_in_their_order() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let mut writer = CourseWriter::create(&path("work")).unwrap();
        let mut memory = vec![0; BYTES];
        for (at, value) in [(0, 1), (BYTES - 1, 2), (0, 0)] {
            memory[at] = value;
            std::fs::write(path("memory"), &memory).unwrap();
            writer.add(&path("memory")).unwrap();
        }
        writer.finish(&path("course")).unwrap();
        let mut course = Course::open(&path("course")).unwrap();
        let mut ends = Vec::new();
        while let Some(memory) = course.next_memory().unwrap() {
            ends.push((memory[0], memory[BYTES - 1]));
        }
        assert_eq!(ends, [(1, 0), (1, 2), (0, 2)]);
    }

    #[test]
    fn a_cut_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("course");
        std::fs::write(&path, [1, 0, 0, 0, 9, 0, 0, 0, 1, 2]).unwrap();
        assert!(Course::open(&path).unwrap().next_memory().is_err());
    }
}
