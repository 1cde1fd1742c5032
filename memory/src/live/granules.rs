//! What is known of each granule of memory that is tracked: a handful of flags, and how they change.

use std::{
    ops::Range,
    sync::atomic::{AtomicU8, AtomicU16, AtomicUsize, Ordering},
};

use crate::PAGE_BYTES;

/// Bytes whose writes are noticed together. A write to 4 KiB costs a copy of all of it, and the memory of a machine has
/// sixteen times fewer of them than pages.
pub(crate) const GRANULE_BYTES: u64 = 64 << 10;
/// Bytes that are there or not there together, and that have one lock: a huge page.
pub(crate) const BLOCK_BYTES: u64 = 2 << 20;
const GRANULES_A_BLOCK: usize = (BLOCK_BYTES / GRANULE_BYTES) as usize;
const PAGES_A_GRANULE: u64 = GRANULE_BYTES / PAGE_BYTES;

/// What is known of a granule. Without any flag it was written to, or may have been, and nobody is told of the next
/// write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags(u8);

impl Flags {
    /// It was written to.
    pub(crate) const WRITTEN: Self = Self(0);
    /// Whoever writes to it waits until that is known.
    pub(crate) const PROTECTED: Self = Self(1 << 0);
    /// It has, or had at the cut, what it has in the base.
    pub(crate) const IN_BASE: Self = Self(1 << 1);
    /// The host has, or had at the cut, no page of its block: it is zero.
    pub(crate) const ABSENT: Self = Self(1 << 2);
    /// What it had at the cut was set aside.
    pub(crate) const ASIDE: Self = Self(1 << 3);
    /// What it had at the cut has been read, all of it.
    pub(crate) const READ: Self = Self(1 << 4);
    /// Of what it has, or had at the cut, there is a copy that was made before.
    pub(crate) const COPIED: Self = Self(1 << 5);

    pub(crate) const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    pub(crate) const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether what it has, or had at the cut, is known without reading it, for a snapshot that takes what it can from `elsewhere`.
    pub(crate) fn is_known(self, elsewhere: Elsewhere) -> bool {
        self.has(Self::ABSENT)
            || (elsewhere.base && self.has(Self::IN_BASE))
            || (elsewhere.copies && self.has(Self::COPIED))
    }

    /// Whether what it had at the cut is in no other place, and still to be read.
    pub(crate) fn is_owed(self, elsewhere: Elsewhere) -> bool {
        self.has(Self::PROTECTED) && !self.is_known(elsewhere) && !self.has(Self::READ)
    }

    /// Once somebody writes to it.
    pub(crate) fn written(self, since_cut: bool) -> Self {
        match since_cut {
            // What it was at the cut is still to be known.
            true => self.without(Self::PROTECTED),
            false => Self::WRITTEN,
        }
    }

    /// Once the snapshot of a cut is done.
    pub(crate) fn after_cut(self, outcome: Outcome) -> Self {
        if !self.has(Self::PROTECTED) {
            return Self::WRITTEN;
        }
        let of_cut = Self::ASIDE.with(Self::READ).with(Self::COPIED);
        let kept = self.without(of_cut);
        match outcome {
            Outcome::SameBase => kept,
            Outcome::NoBase => kept.without(Self::IN_BASE),
            Outcome::NewBase if kept.has(Self::ABSENT) => kept,
            Outcome::NewBase => kept.with(Self::IN_BASE),
        }
    }
}

/// What a snapshot takes from where, that then is not read from memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Elsewhere {
    /// From its base, what was not written to since that.
    pub base: bool,
    /// From copies ([`Tracker::copy`](super::Tracker::copy)), what was not written to since they were made.
    pub copies: bool,
}

/// What the next snapshot can be built on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// On this one.
    NewBase,
    /// On what this one could be built on.
    SameBase,
    /// On none.
    NoBase,
}

/// The flags of all granules of a memory.
#[derive(Debug)]
pub(crate) struct Granules {
    bytes: u64,
    flags: Box<[AtomicU8]>,
    /// For each block, how many of its granules are not protected: a machine that stands still is not to wait until all flags of a
    /// large memory are gone through.
    unprotected: Box<[AtomicUsize]>,
    /// For each granule, which of its pages have been read since the cut.
    read: Box<[AtomicU16]>,
}

impl Granules {
    /// Of so many bytes of memory, all of which was written to.
    pub(crate) fn new(bytes: u64) -> Self {
        let count = bytes.div_ceil(GRANULE_BYTES);
        let in_block = |block: u64| (count - block).min(GRANULES_A_BLOCK as u64) as usize;
        let blocks = (0..count).step_by(GRANULES_A_BLOCK);
        Self {
            bytes,
            unprotected: blocks
                .map(|first| AtomicUsize::new(in_block(first)))
                .collect(),
            flags: (0..count).map(|_| AtomicU8::new(0)).collect(),
            read: (0..count).map(|_| AtomicU16::new(0)).collect(),
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.flags.len()
    }

    pub(crate) fn blocks(&self) -> usize {
        self.unprotected.len()
    }

    /// The granules of a block.
    pub(crate) fn of_block(&self, block: usize) -> Range<usize> {
        let first = block * GRANULES_A_BLOCK;
        first..(first + GRANULES_A_BLOCK).min(self.count())
    }

    /// The granules that a range of the image touches, as far as there are any.
    pub(crate) fn touched(&self, image: &Range<u64>) -> Range<usize> {
        let end = image.end.min(self.bytes).div_ceil(GRANULE_BYTES) as usize;
        let start = (image.start / GRANULE_BYTES) as usize;
        start.min(end)..end
    }

    /// Where granules are in the image.
    pub(crate) fn image(&self, granules: &Range<usize>) -> Range<u64> {
        let start = granules.start as u64 * GRANULE_BYTES;
        start..(granules.end as u64 * GRANULE_BYTES).min(self.bytes)
    }

    /// What is known of a granule. Of one that is not there: that it was written to.
    pub(crate) fn flags(&self, granule: usize) -> Flags {
        let flags = self.flags.get(granule);
        Flags(flags.map_or(0, |flags| flags.load(Ordering::Relaxed)))
    }

    /// Who calls this has the lock of the granule's block, or knows that nobody else looks.
    pub(crate) fn set(&self, granule: usize, flags: Flags) {
        let block = self.unprotected.get(granule / GRANULES_A_BLOCK);
        let (Some(known), Some(unprotected)) = (self.flags.get(granule), block) else {
            return;
        };
        let was = Flags(known.swap(flags.0, Ordering::Relaxed));
        match (was.has(Flags::PROTECTED), flags.has(Flags::PROTECTED)) {
            (true, false) => drop(unprotected.fetch_add(1, Ordering::Relaxed)),
            (false, true) => drop(unprotected.fetch_sub(1, Ordering::Relaxed)),
            _ => {}
        }
    }

    /// How many granules of a block are not protected.
    pub(crate) fn unprotected(&self, block: usize) -> usize {
        let unprotected = self.unprotected.get(block);
        unprotected.map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// Whether all of these granules have all of these flags, or, with [`Flags::WRITTEN`], none.
    pub(crate) fn all(&self, granules: Range<usize>, flags: Flags) -> bool {
        let mut granules = granules.map(|granule| self.flags(granule));
        match flags {
            Flags::WRITTEN => granules.all(|known| known == Flags::WRITTEN),
            _ => granules.all(|known| known.has(flags)),
        }
    }

    /// How many granules are not protected.
    pub(crate) fn written(&self) -> usize {
        (0..self.blocks())
            .map(|block| self.unprotected(block))
            .sum()
    }

    /// Notes that `image`, which lies in `granule`, has been read. Whether all of the granule has been, then.
    pub(crate) fn note_read(&self, granule: usize, image: &Range<u64>) -> bool {
        let own = self.image(&(granule..granule + 1));
        let Some(read) = self.read.get(granule) else {
            return false;
        };
        // Pages that were read only in part are still to be read.
        let first = (image.start - own.start).div_ceil(PAGE_BYTES);
        let end = (image.end - own.start) / PAGE_BYTES;
        let pages = |range: Range<u64>| range.fold(0u16, |bits, page| bits | 1 << page);
        let new = pages(first..end.min(PAGES_A_GRANULE));
        let all = pages(0..(own.end - own.start) / PAGE_BYTES);
        let known = read.fetch_or(new, Ordering::Relaxed) | new;
        known == all
    }

    /// What is known once the snapshot of a cut is done, of a granule.
    pub(crate) fn finish(&self, granule: usize, outcome: Outcome) {
        self.set(granule, self.flags(granule).after_cut(outcome));
        if let Some(read) = self.read.get(granule) {
            read.store(0, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_granule_has_been_read_once_each_of_its_pages_was() {
        let granules = Granules::new(3 * GRANULE_BYTES + 2 * PAGE_BYTES);
        let at = GRANULE_BYTES;
        assert!(!granules.note_read(1, &(at..at + GRANULE_BYTES - 1)));
        assert!(!granules.note_read(1, &(at + GRANULE_BYTES - 1..at + GRANULE_BYTES)));
        assert!(granules.note_read(1, &(at + GRANULE_BYTES - PAGE_BYTES..at + GRANULE_BYTES)));
        assert!(!granules.note_read(0, &(0..PAGE_BYTES)));
        // The last is short.
        let last = 3 * GRANULE_BYTES;
        assert_eq!(granules.count(), 4);
        assert_eq!(granules.image(&(3..4)), last..last + 2 * PAGE_BYTES);
        assert!(!granules.note_read(3, &(last + PAGE_BYTES..last + 2 * PAGE_BYTES)));
        assert!(granules.note_read(3, &(last..last + PAGE_BYTES)));
        granules.finish(1, Outcome::NoBase);
        assert!(!granules.note_read(1, &(at..at + PAGE_BYTES)));
    }

    #[test]
    fn ranges_beyond_the_memory_touch_nothing() {
        let granules = Granules::new(GRANULE_BYTES + PAGE_BYTES);
        assert_eq!(granules.touched(&(0..1)), 0..1);
        assert_eq!(granules.touched(&(GRANULE_BYTES - 1..u64::MAX)), 0..2);
        assert!(granules.touched(&(5 * GRANULE_BYTES..u64::MAX)).is_empty());
        assert_eq!(granules.blocks(), 1);
        assert_eq!(granules.of_block(0), 0..2);
        assert_eq!(granules.flags(2), Flags::WRITTEN);
    }

    #[test]
    fn what_is_not_protected_is_counted() {
        let granules = Granules::new(BLOCK_BYTES + 2 * GRANULE_BYTES + PAGE_BYTES);
        let counts = || [granules.unprotected(0), granules.unprotected(1)];
        assert_eq!((counts(), granules.written()), ([32, 3], 35));
        for (granule, flags) in [(0, Flags::PROTECTED), (34, Flags::PROTECTED)] {
            granules.set(granule, flags);
            granules.set(granule, flags.with(Flags::COPIED));
        }
        assert_eq!((counts(), granules.written()), ([31, 2], 33));
        // One that is not there is not counted either.
        granules.set(35, Flags::PROTECTED);
        granules.set(34, granules.flags(34).written(true));
        granules.finish(0, Outcome::NewBase);
        assert_eq!((counts(), granules.unprotected(2)), ([31, 3], 0));
    }

    #[test]
    fn only_what_is_nowhere_else_is_owed() {
        let protected = Flags::PROTECTED;
        let in_base = protected.with(Flags::IN_BASE);
        let copied = protected.with(Flags::COPIED);
        let [nowhere, base, copies] = [(false, false), (true, false), (false, true)]
            .map(|(base, copies)| Elsewhere { base, copies });
        assert!([nowhere, base, copies].map(|from| protected.is_owed(from)) == [true; 3]);
        assert!([nowhere, base, copies].map(|from| in_base.is_owed(from)) == [true, false, true]);
        assert!([nowhere, base, copies].map(|from| copied.is_owed(from)) == [true, true, false]);
        for elsewhere in [Flags::ABSENT, Flags::READ] {
            assert!(!protected.with(elsewhere).is_owed(nowhere));
        }
        // What is in memory is of after the cut.
        assert!(!protected.written(true).is_owed(nowhere));
        assert!(!Flags::WRITTEN.is_owed(nowhere));
    }

    #[test]
    fn what_was_not_written_to_since_the_cut_is_in_the_new_base() {
        let saved = Flags::PROTECTED.with(Flags::READ);
        let in_base = Flags::PROTECTED.with(Flags::IN_BASE);
        assert_eq!(saved.after_cut(Outcome::NewBase), in_base);
        assert_eq!(saved.after_cut(Outcome::SameBase), Flags::PROTECTED);
        assert_eq!(in_base.after_cut(Outcome::SameBase), in_base);
        assert_eq!(in_base.after_cut(Outcome::NoBase), Flags::PROTECTED);
        let absent = Flags::PROTECTED.with(Flags::ABSENT);
        assert_eq!(absent.after_cut(Outcome::NewBase), absent);
        let copied = Flags::PROTECTED.with(Flags::COPIED);
        assert_eq!(copied.after_cut(Outcome::NewBase), in_base);
        assert_eq!(copied.after_cut(Outcome::NoBase), Flags::PROTECTED);
        let aside = Flags::PROTECTED.with(Flags::ASIDE);
        for flags in [saved, in_base, absent, copied, aside] {
            let written = flags.written(true);
            assert_eq!(written.after_cut(Outcome::NewBase), Flags::WRITTEN);
            assert_eq!(flags.written(false), Flags::WRITTEN);
        }
    }
}
