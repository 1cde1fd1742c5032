//! What this machine's primitives take for the work that a save or a load cannot do without.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::Read,
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use super::pages::{FRAME_PAGES, PAGE, files, is_zero, on_all_cpus};

const FRAME: usize = FRAME_PAGES * PAGE;

/// Times of the primitives on all CPUs, over all images, with everything in memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounds {
    /// Bytes of all images.
    pub bytes: u64,
    /// Copying the images from the page cache.
    pub read: Duration,
    /// Looking for zeros.
    pub zero_test: Duration,
    /// BLAKE3 over what is not zero, at its full width.
    pub hash: Duration,
    /// Compressing what is new, in frames of 16 KiB; nothing where a store does not compress.
    pub compress: Duration,
    /// Decoding each frame that an image needs, once for each image; nothing there too.
    pub decode: Duration,
    /// Writing what is not zero to files.
    pub write: Duration,
}

/// Frames that have been seen, as the store would have them.
#[derive(Default)]
struct Stored {
    /// The frame of each page.
    frame_of: HashMap<[u8; 32], usize>,
    frames: Vec<Vec<u8>>,
    /// The frame that is being filled.
    open: Vec<u8>,
}

impl Bounds {
    /// Measures with the files in `images`, as a store at this `level` would have them; writes to `scratch`, where
    /// nothing is left.
    ///
    /// # Errors
    ///
    /// When a file cannot be read or written.
    pub fn measure(images: &Path, scratch: &Path, level: i32) -> Result<Self> {
        let mut bounds = Self::default();
        let mut stored = Stored::default();
        let mut image = Vec::new();
        for path in files(images)? {
            bounds.read += read(&path, &mut image)?;
            bounds.bytes += image.len() as u64;
            bounds.add(&mut stored, &image, scratch, level)?;
        }
        Ok(bounds)
    }

    /// The slowest primitive of a save.
    #[must_use]
    pub fn save(&self) -> Duration {
        self.zero_test.max(self.hash).max(self.compress)
    }

    /// All primitives of a save, which share the CPUs.
    #[must_use]
    pub fn save_in_sum(&self) -> Duration {
        self.read + self.zero_test + self.hash + self.compress
    }

    /// The slowest primitive of a second save.
    #[must_use]
    pub fn save_again(&self) -> Duration {
        self.zero_test.max(self.hash)
    }

    /// All primitives of a second save.
    #[must_use]
    pub fn save_again_in_sum(&self) -> Duration {
        self.read + self.zero_test + self.hash
    }

    /// The slowest primitive of a load.
    #[must_use]
    pub fn load(&self) -> Duration {
        self.decode.max(self.write)
    }

    /// The slowest primitive of a load into memory, where no file is written; `None` where a store does not compress, for what is
    /// left is copying.
    #[must_use]
    pub fn load_memory(&self) -> Option<Duration> {
        (!self.decode.is_zero()).then_some(self.decode)
    }

    /// All primitives of a load.
    #[must_use]
    pub fn load_in_sum(&self) -> Duration {
        self.decode + self.write
    }

    fn add(&mut self, stored: &mut Stored, image: &[u8], scratch: &Path, level: i32) -> Result<()> {
        self.write += write(image, scratch)?;
        let pages: Vec<&[u8]> = image.chunks(PAGE).collect();
        let used: Vec<&[u8]> = timed(&mut self.zero_test, || {
            on_all_cpus(&pages, |pages| {
                let used = pages.iter().copied().filter(|page| !is_zero(page));
                used.collect::<Vec<_>>()
            })
        })
        .concat();

        // In one piece, since only long inputs fill BLAKE3's lanes through its public interface.
        let gathered = used.concat();
        let pieces: Vec<&[u8]> = gathered.chunks(FRAME).collect();
        timed(&mut self.hash, || {
            on_all_cpus(&pieces, |pieces| {
                for piece in pieces {
                    std::hint::black_box(blake3::hash(piece));
                }
            })
        });

        if level == 0 {
            return Ok(());
        }
        let ids = on_all_cpus(&used, |pages| {
            let ids = pages.iter().map(|page| *blake3::hash(page).as_bytes());
            ids.collect::<Vec<_>>()
        })
        .concat();
        let needed = stored.add(&ids, &used);
        let new = stored.take_full_frames();
        let compressed = timed(&mut self.compress, || {
            on_all_cpus(&new, |frames| -> std::io::Result<Vec<Vec<u8>>> {
                let mut zstd = zstd::bulk::Compressor::new(level)?;
                frames.iter().map(|frame| zstd.compress(frame)).collect()
            })
        });
        for share in compressed {
            stored.frames.extend(share.context("cannot compress")?);
        }

        let needed: Vec<&[u8]> = needed
            .iter()
            .filter_map(|frame| stored.frames.get(*frame).map(Vec::as_slice))
            .collect();
        let decoded = timed(&mut self.decode, || {
            on_all_cpus(&needed, |frames| -> std::io::Result<()> {
                let mut zstd = zstd::bulk::Decompressor::new()?;
                let mut plain = vec![0; FRAME];
                for frame in frames {
                    std::hint::black_box(zstd.decompress_to_buffer(frame, &mut plain)?);
                }
                Ok(())
            })
        });
        for share in decoded {
            share.context("cannot decompress")?;
        }
        Ok(())
    }
}

impl Stored {
    /// Adds pages; gives the frames that the image needs.
    fn add(&mut self, ids: &[[u8; 32]], pages: &[&[u8]]) -> HashSet<usize> {
        let mut needed = HashSet::new();
        for (id, page) in ids.iter().zip(pages) {
            let next = self.frames.len() + self.open.len() / FRAME;
            let frame = *self.frame_of.entry(*id).or_insert_with(|| {
                self.open.extend_from_slice(page);
                // A file need not end with a whole page.
                self.open.resize(self.open.len().next_multiple_of(PAGE), 0);
                next
            });
            needed.insert(frame);
        }
        needed
    }

    /// The frames that are full and not compressed yet.
    fn take_full_frames(&mut self) -> Vec<Vec<u8>> {
        let full = self.open.len() / FRAME * FRAME;
        let rest = self.open.split_off(full);
        let full = std::mem::replace(&mut self.open, rest);
        full.chunks(FRAME).map(<[u8]>::to_vec).collect()
    }
}

fn timed<T>(total: &mut Duration, work: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let result = work();
    *total += begun.elapsed();
    result
}

fn read(path: &Path, image: &mut Vec<u8>) -> Result<Duration> {
    let context = || format!("cannot read {}", path.display());
    let mut file = File::open(path).with_context(context)?;
    let len = file.metadata().with_context(context)?.len();
    image.resize(usize::try_from(len).with_context(context)?, 0);
    // Memory that is touched for the first time is the kernel's work, not the file's.
    let begun = Instant::now();
    file.read_exact(image).with_context(context)?;
    Ok(begun.elapsed())
}

fn write(image: &[u8], scratch: &Path) -> Result<Duration> {
    let path = scratch.join("bound");
    let context = || format!("cannot write {}", path.display());
    let file = File::create(&path).with_context(context)?;
    file.set_len(image.len() as u64).with_context(context)?;
    let frames: Vec<(usize, &[u8])> = image.chunks(FRAME).enumerate().collect();
    super::pages::warm(scratch, image.len() as u64)?;
    let begun = Instant::now();
    let shares = on_all_cpus(&frames, |frames| -> std::io::Result<()> {
        for (number, frame) in frames {
            if !is_zero(frame) {
                file.write_all_at(frame, (number * FRAME) as u64)?;
            }
        }
        Ok(())
    });
    let took = begun.elapsed();
    for share in shares {
        share.with_context(context)?;
    }
    std::fs::remove_file(&path).with_context(context)?;
    Ok(took)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_pages_are_stored_once_and_needed_by_both() {
        let page = |value: u8| vec![value; PAGE];
        let mut stored = Stored::default();
        // A frame, and one page more.
        let count = FRAME_PAGES as u8 + 1;
        let first: Vec<_> = (0..count).map(page).collect();
        let pages: Vec<&[u8]> = first.iter().map(Vec::as_slice).collect();
        let ids: Vec<_> = (0..count).map(|n| [n; 32]).collect();
        assert_eq!(stored.add(&ids, &pages), HashSet::from([0, 1]));
        let full = stored.take_full_frames();
        assert_eq!(full.len(), 1);
        stored.frames.extend(full);
        let last = FRAME_PAGES..;
        let again = stored.add(&ids[last.clone()], &pages[last]);
        assert_eq!(again, HashSet::from([1]));
        assert_eq!(stored.open.len(), PAGE);
    }

    #[test]
    fn every_primitive_takes_time() {
        let directory = tempfile::tempdir().unwrap();
        let images = directory.path().join("images");
        std::fs::create_dir(&images).unwrap();
        let mut image = vec![0; 8 << 20];
        for (at, byte) in image.iter_mut().enumerate().take(6 << 20) {
            *byte = ((at * at) >> 12) as u8;
        }
        std::fs::write(images.join("one"), &image).unwrap();
        let bounds = Bounds::measure(&images, directory.path(), 1).unwrap();
        assert_eq!(bounds.bytes, 8 << 20);
        for time in [bounds.zero_test, bounds.hash, bounds.compress, bounds.write] {
            assert!(time > Duration::ZERO, "{bounds:?}");
        }
        assert!(bounds.save_in_sum() > bounds.save());
        let raw = Bounds::measure(&images, directory.path(), 0).unwrap();
        assert_eq!((raw.compress, raw.decode), Default::default());
        assert_eq!(
            (raw.load_memory(), bounds.load_memory().is_some()),
            (None, true)
        );
    }
}
