//! Which pages a machine touches first, kept beside its snapshot in a store.
//!
//! `docs/memory-format.md` specifies the bytes. They may come from anybody.

use std::collections::HashSet;

use dedup::SnapshotReader;
use memory::PAGE_BYTES;

use crate::{Error, MEMORY_IMAGE};

/// The annotation of a snapshot that is its working set.
const ANNOTATION: &str = "working-set";

const VERSION: u8 = 1;

/// Pages of a working set at most, 512 MiB: whatever they are, their coding is no longer than an annotation may be.
pub(crate) const MAX_PAGES: usize = 1 << 17;

/// Pages of a memory image, in the order in which they were first touched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// Numbers of pages of 4 KiB, from the image's beginning on.
    pages: Vec<u64>,
}

/// Why bytes are no working set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its working set is malformed: {0}")]
pub struct Malformed(&'static str);

impl WorkingSet {
    /// Of these pages, the first [`MAX_PAGES`] of them that differ.
    pub(crate) fn new(pages: impl IntoIterator<Item = u64>) -> Self {
        let mut seen = HashSet::new();
        let new = pages.into_iter().filter(|page| seen.insert(*page));
        Self {
            pages: new.take(MAX_PAGES).collect(),
        }
    }

    /// What is kept beside a snapshot; `None` when nothing is, or it is no machine's.
    ///
    /// # Errors
    ///
    /// [`Error::Store`], [`Error::WorkingSet`] when it cannot be read. The snapshot is whole nevertheless.
    pub fn of(snapshot: &SnapshotReader) -> Result<Option<Self>, Error> {
        let mut images = snapshot.facts().images.iter();
        let Some(image) = images.find(|image| image.name == MEMORY_IMAGE) else {
            return Ok(None);
        };
        let kept = snapshot
            .annotation(ANNOTATION)
            .map_err(Error::store(snapshot.name()))?;
        let Some(bytes) = kept else {
            return Ok(None);
        };
        let parsed = Self::parse(&bytes, image.size);
        parsed.map(Some).map_err(|malformed| Error::WorkingSet {
            name: snapshot.name().to_owned(),
            malformed,
        })
    }

    /// Keeps it beside a snapshot, durably, in place of what was there.
    pub(crate) fn keep(&self, snapshot: &SnapshotReader) -> Result<(), dedup::Error> {
        snapshot.annotate(ANNOTATION, &self.encode())
    }

    /// Numbers of pages of 4 KiB, in the order in which they were first touched.
    #[must_use]
    pub fn pages(&self) -> &[u64] {
        &self.pages
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        put_varint(&mut out, self.pages.len() as u64);
        let mut end = 0u64;
        for run in self.pages.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            let first = run[0];
            put_varint(&mut out, zigzag(first.wrapping_sub(end) as i64));
            put_varint(&mut out, run.len() as u64 - 1);
            end = first.wrapping_add(run.len() as u64);
        }
        out
    }

    /// What `bytes` say of an image of so many bytes.
    ///
    /// # Errors
    ///
    /// [`Malformed`] when they are not as specified. No more is allocated than [`MAX_PAGES`] take, whatever they are.
    pub fn parse(bytes: &[u8], image_bytes: u64) -> Result<Self, Malformed> {
        let mut rest = bytes;
        let version = rest.split_off_first().ok_or(Malformed("cut short"))?;
        if *version != VERSION {
            return Err(Malformed("of another version"));
        }
        let count = varint(&mut rest)?;
        if count > MAX_PAGES as u64 {
            return Err(Malformed("too many pages"));
        }
        let image_pages = image_bytes / PAGE_BYTES;
        let mut pages = Vec::new();
        let mut end = 0u64;
        while (pages.len() as u64) < count {
            let first = end.checked_add_signed(unzigzag(varint(&mut rest)?));
            let first = first.ok_or(Malformed("a page before the first"))?;
            let more = varint(&mut rest)?;
            let left = count - pages.len() as u64;
            if more >= left {
                return Err(Malformed("a run is too long"));
            }
            // `more` is small by now.
            let last = first.checked_add(more);
            if last.is_none_or(|last| last >= image_pages) {
                return Err(Malformed("a page is beyond the memory"));
            }
            end = first + more + 1;
            pages.extend(first..end);
        }
        if !rest.is_empty() {
            return Err(Malformed("bytes left over"));
        }
        Ok(Self { pages })
    }
}

/// Where its pages are in the image, in bytes.
pub(crate) fn page_offsets(set: &WorkingSet) -> impl Iterator<Item = u64> + '_ {
    set.pages.iter().map(|page| page * PAGE_BYTES)
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn varint(rest: &mut &[u8]) -> Result<u64, Malformed> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = rest.split_off_first().ok_or(Malformed("cut short"))?;
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 {
            break;
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(Malformed("a number is too long"))
}

/// Maps small negative and positive numbers to small ones.
fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const IMAGE_PAGES: u64 = 1 << 28;

    fn parse(bytes: &[u8]) -> Result<WorkingSet, Malformed> {
        WorkingSet::parse(bytes, IMAGE_PAGES * PAGE_BYTES)
    }

    /// Pages here and there, of which some follow each other.
    fn any_pages() -> impl Strategy<Value = Vec<u64>> {
        let run = (0..IMAGE_PAGES - 50, 1..50u64).prop_map(|(first, count)| first..first + count);
        proptest::collection::vec(run, 0..40).prop_map(|runs| runs.into_iter().flatten().collect())
    }

    proptest! {
        #[test]
        fn what_was_kept_comes_back(pages in any_pages()) {
            let set = WorkingSet::new(pages);
            prop_assert_eq!(parse(&set.encode()), Ok(set));
        }

        #[test]
        fn each_page_counts_once_where_it_was_first(pages in proptest::collection::vec(0..9u64, 0..30)) {
            let set = WorkingSet::new(pages.clone());
            let mut expected = Vec::new();
            for page in pages {
                if !expected.contains(&page) {
                    expected.push(page);
                }
            }
            prop_assert_eq!(set.pages(), expected);
        }

        #[test]
        fn what_is_damaged_is_refused_or_within_bounds(
            pages in any_pages(),
            at: prop::sample::Index,
            byte: u8,
            cut: prop::sample::Index,
        ) {
            let whole = WorkingSet::new(pages).encode();
            prop_assert!(parse(&whole[..cut.index(whole.len())]).is_err());
            prop_assert!(parse(&[whole.as_slice(), &[0]].concat()).is_err());
            let mut damaged = whole;
            let at = at.index(damaged.len());
            damaged[at] = byte;
            if let Ok(set) = parse(&damaged) {
                prop_assert!(set.pages().len() <= MAX_PAGES);
                prop_assert!(set.pages().iter().all(|page| *page < IMAGE_PAGES));
            }
        }

        #[test]
        fn arbitrary_bytes_are_within_bounds(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            if let Ok(set) = parse(&[&[VERSION], bytes.as_slice()].concat()) {
                prop_assert!(set.pages().len() <= MAX_PAGES);
                prop_assert!(set.pages().iter().all(|page| *page < IMAGE_PAGES));
            }
        }
    }

    #[test]
    fn the_bytes_are_as_specified() {
        let set = WorkingSet::new([7, 8, 9, 3, 300]);
        // +7 for 3 pages, 7 back for one, +296 for one.
        let bytes = [1, 5, 14, 2, 13, 0, 0xd0, 0x04, 0];
        assert_eq!(set.encode(), bytes);
        assert_eq!(parse(&bytes), Ok(set));
    }

    #[test]
    fn a_run_is_no_longer_than_what_is_left() {
        assert_eq!(parse(&[1, 2, 0, 1]), Ok(WorkingSet::new([0, 1])));
        assert_eq!(parse(&[1, 1, 0, 1]), Err(Malformed("a run is too long")));
    }

    #[test]
    fn the_last_page_of_an_image_is_the_last() {
        let bytes = WorkingSet::new([3]).encode();
        assert!(WorkingSet::parse(&bytes, 4 * PAGE_BYTES).is_ok());
        let beyond = WorkingSet::parse(&bytes, 4 * PAGE_BYTES - 1);
        assert_eq!(beyond, Err(Malformed("a page is beyond the memory")));
    }

    #[test]
    fn no_more_pages_are_kept_than_an_annotation_has_room_for() {
        // As far apart as they can be, so that each is a run and each number a long one.
        let far = |n: u64| {
            if n.is_multiple_of(2) {
                n
            } else {
                (1 << 40) - n
            }
        };
        let set = WorkingSet::new((0..2 * MAX_PAGES as u64).map(far));
        assert_eq!(set.pages().len(), MAX_PAGES);
        let bytes = set.encode();
        assert!(
            bytes.len() <= dedup::MAX_ANNOTATION_BYTES,
            "{}",
            bytes.len()
        );
        assert_eq!(WorkingSet::parse(&bytes, u64::MAX), Ok(set));
        let mut many = vec![VERSION];
        put_varint(&mut many, MAX_PAGES as u64 + 1);
        many.extend([0, 0]);
        assert_eq!(parse(&many), Err(Malformed("too many pages")));
    }
}
