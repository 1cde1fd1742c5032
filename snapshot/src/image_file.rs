//! A memory image that is written into a file, granule by granule: what is zero is a hole, and what was written before may be
//! written over.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{
        Mutex,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
};

use memory::PAGE_BYTES;
use rustix::{fs::FallocateFlags, io::Errno};

use crate::{
    Piece, Saving,
    granules::{Granules, bytes_of},
    table::{GRANULE_BYTES, HOLE, Table, digest, is_zero},
};

/// How much of guest memory was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes of guest memory, which is how long the image is.
    pub memory_bytes: u64,
    /// Bytes that were not zero and so were written.
    pub data_bytes: u64,
}

/// The front of a file.
#[derive(Debug)]
pub(crate) struct ImageFile {
    file: File,
    memory_bytes: u64,
    granules: Box<[Granule]>,
    /// A file takes one writer at a time. Those who wait in the kernel spin there for the inode's lock,
    /// which on few CPUs keeps them from copying and digesting: they wait here, and write a batch.
    turn: Mutex<()>,
}

/// What is in the file of a granule.
#[derive(Debug, Default)]
struct Granule {
    /// As in the table: without one, the file has a hole there, or zeros.
    digest: AtomicU64,
    /// How many of its pages are not zero.
    pages: AtomicU8,
}

impl ImageFile {
    /// Of an image of so many bytes, which are zeros in `file` so far.
    pub(crate) fn new(file: File, memory_bytes: u64) -> Self {
        Self {
            file,
            memory_bytes,
            granules: (0..memory_bytes.div_ceil(GRANULE_BYTES))
                .map(|_| Granule::default())
                .collect(),
            turn: Mutex::new(()),
        }
    }

    fn put_one(&self, granule: usize, digest: u64, content: &[u8]) -> io::Result<()> {
        let start = granule as u64 * GRANULE_BYTES;
        let known = &self.granules[granule];
        let was = known.digest.swap(digest, Ordering::Relaxed);
        let pages = match (was, digest) {
            (HOLE, HOLE) => 0,
            (HOLE, _) => write_pages(&self.file, content, start)? / PAGE_BYTES,
            (_, HOLE) => self.punch(granule).map(|()| 0)?,
            (_, _) => {
                self.file.write_all_at(content, start)?;
                let pages = content.chunks(PAGE_BYTES as usize);
                pages.filter(|page| !is_zero(page)).count() as u64
            }
        };
        known.pages.store(pages as u8, Ordering::Relaxed);
        Ok(())
    }

    fn punch(&self, granule: usize) -> io::Result<()> {
        let start = granule as u64 * GRANULE_BYTES;
        let bytes = bytes_of(granule, self.memory_bytes);
        let hole = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
        match rustix::fs::fallocate(&self.file, hole, start, bytes as u64) {
            // Zeros are as good, if not as small.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.file.write_all_at(&vec![0; bytes], start),
            punched => Ok(punched?),
        }
    }

    /// Fills `buffer` with what the file has at `offset` of the image.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    /// What of it is not zeros, by granules.
    pub(crate) fn pieces(&self) -> Vec<Piece> {
        let granules = self.granules.iter().enumerate();
        let piece = |(granule, known): (usize, &Granule)| {
            let bytes = bytes_of(granule, self.memory_bytes) as u64;
            match known.digest.load(Ordering::Relaxed) {
                HOLE => Piece::Zeros(bytes),
                _ => Piece::Copied(bytes),
            }
        };
        granules.map(piece).collect()
    }

    /// What is in the file.
    pub(crate) fn finish(self) -> (Table, Written) {
        let pages = self.granules.iter().map(|known| {
            let pages = known.pages.load(Ordering::Relaxed);
            u64::from(pages) * PAGE_BYTES
        });
        let written = Written {
            memory_bytes: self.memory_bytes,
            data_bytes: pages.sum(),
        };
        let digests = self.granules.into_iter();
        let digests = digests.map(|known| known.digest.into_inner()).collect();
        (Table { digests }, written)
    }
}

impl Granules for ImageFile {
    fn bytes(&self) -> u64 {
        self.memory_bytes
    }

    fn put(&self, batch: &[(usize, &[u8])], _: &Saving) -> io::Result<()> {
        let digests: Vec<u64> = batch.iter().map(|(_, content)| digest(content)).collect();
        let _writing = self.turn.lock();
        for ((granule, content), digest) in batch.iter().zip(digests) {
            self.put_one(*granule, digest, content)?;
        }
        Ok(())
    }

    fn erase(&self, granule: usize, _: &Saving) -> io::Result<()> {
        let known = &self.granules[granule];
        if known.digest.swap(HOLE, Ordering::Relaxed) != HOLE {
            self.punch(granule)?;
        }
        known.pages.store(0, Ordering::Relaxed);
        Ok(())
    }
}

/// Writes the pages of `content` that are not zero at their place behind `start`; returns the bytes
/// written.
pub(crate) fn write_pages(file: &File, content: &[u8], start: u64) -> io::Result<u64> {
    let mut written = 0;
    let mut run: Option<usize> = None;
    let page = PAGE_BYTES as usize;
    for at in (0..=content.len()).step_by(page) {
        let zero = at == content.len() || is_zero(&content[at..at + page]);
        match (zero, run) {
            (false, None) => run = Some(at),
            (true, Some(first)) => {
                file.write_all_at(&content[first..at], start + first as u64)?;
                written += (at - first) as u64;
                run = None;
            }
            _ => {}
        }
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Content, granules};

    const PAGE: usize = PAGE_BYTES as usize;
    /// The last granule is short.
    const BYTES: u64 = 5 * GRANULE_BYTES + 3 * PAGE_BYTES;
    const GRANULES: usize = 6;

    /// What a granule can have: each of its pages begins with one of these.
    type Pages = [u8; 16];

    fn content(granule: usize, pages: &Pages) -> Vec<u8> {
        let bytes = (BYTES - granule as u64 * GRANULE_BYTES).min(GRANULE_BYTES) as usize;
        let mut content = vec![0; bytes];
        for (page, value) in content.chunks_mut(PAGE).zip(pages) {
            page[0] = *value;
        }
        content
    }

    /// At the cut, each granule is what it was copied as last, or has to be read, or is zeros.
    #[derive(Clone, Copy, Debug)]
    enum AtCut {
        Copied,
        Read(Pages),
        Zeros,
    }

    struct Memory([AtCut; GRANULES]);

    impl Content for Memory {
        fn pieces(&self, _: Option<u64>, _: u64) -> io::Result<Vec<Piece>> {
            let piece = |(granule, at_cut): (usize, &AtCut)| {
                let bytes = content(granule, &[0; 16]).len() as u64;
                match at_cut {
                    AtCut::Copied => Piece::Copied(bytes),
                    AtCut::Read(_) => Piece::Data(bytes),
                    AtCut::Zeros => Piece::Zeros(bytes),
                }
            };
            Ok(self.0.iter().enumerate().map(piece).collect())
        }

        fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            let granule = (offset / GRANULE_BYTES) as usize;
            let AtCut::Read(pages) = &self.0[granule] else {
                return Err(io::Error::other("it was not to be read"));
            };
            buffer.copy_from_slice(&content(granule, pages));
            Ok(())
        }
    }

    fn any_pages() -> impl Strategy<Value = Pages> {
        prop_oneof![
            Just([0; 16]),
            any::<[bool; 16]>().prop_map(|bits| bits.map(u8::from)),
            any::<Pages>(),
        ]
    }

    fn any_at_cut() -> impl Strategy<Value = AtCut> {
        prop_oneof![
            Just(AtCut::Copied),
            any_pages().prop_map(AtCut::Read),
            Just(AtCut::Zeros),
        ]
    }

    proptest! {
        #[test]
        fn what_was_written_over_leaves_no_trace(
            copies in proptest::collection::vec((0..GRANULES, any_pages(), any::<bool>()), 0..20),
            at_cut in proptest::array::uniform6(any_at_cut()),
        ) {
            let file = tempfile::tempfile().unwrap();
            file.set_len(BYTES).unwrap();
            let image = ImageFile::new(file.try_clone().unwrap(), BYTES);
            let saving = Saving::default();
            let mut model = [[0; 16]; GRANULES];
            for (granule, pages, is_there) in copies {
                let read = |at, buffer: &mut [u8]| {
                    assert_eq!(at, granule as u64 * GRANULE_BYTES);
                    buffer.copy_from_slice(&content(granule, &pages));
                    Ok(is_there)
                };
                let written = granules::write(&image, &[granule], read, &saving).unwrap();
                prop_assert_eq!(written, u64::from(is_there));
                if is_there {
                    model[granule] = pages;
                }
            }
            granules::save(&image, &Memory(at_cut), &saving).unwrap();
            for (pages, at_cut) in model.iter_mut().zip(at_cut) {
                match at_cut {
                    AtCut::Copied => {}
                    AtCut::Read(read) => *pages = read,
                    AtCut::Zeros => *pages = [0; 16],
                }
            }
            let (table, written) = image.finish();
            let mut data_bytes = 0;
            for (granule, pages) in model.iter().enumerate() {
                let expected = content(granule, pages);
                let mut found = vec![0; expected.len()];
                file.read_exact_at(&mut found, granule as u64 * GRANULE_BYTES).unwrap();
                prop_assert!(found == expected, "granule {}", granule);
                prop_assert_eq!(table.digests[granule], digest(&expected));
                let pages = expected.chunks(PAGE).filter(|page| page[0] != 0);
                data_bytes += pages.count() as u64 * PAGE_BYTES;
            }
            prop_assert_eq!(written, Written { memory_bytes: BYTES, data_bytes });
        }
    }
}
