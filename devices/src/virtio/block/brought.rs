//! Reads that are kept until what they want was brought.

use std::ops::Range;

use super::{
    Block,
    bringer::{Begun, Bringer},
    disk::Left,
    fetch::Missing,
};

/// A read that was kept, to be made when what it wants is in the page cache, or was asked for.
pub(super) struct Brought {
    pub(super) head: u16,
    /// What it reads.
    pub(super) bytes: u64,
    pub(super) manner: Manner,
}

/// How such a read is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    /// It waits for what is not in the page cache. For what is not on this host it is kept once more.
    Reads,
    /// It waits for that, too, since the host has no thread to fetch it.
    ReadsAll,
    /// These of [`Left::awaited`] are being fetched for it.
    Fetched(Range<usize>),
    /// They were: what is not there cannot be had.
    ReadsHere,
    /// Not all of them were tried: as if it had just been asked for.
    Anew,
}

impl Block {
    /// Begins to bring what these reads want, which are made in a later round, come what may; says whether that could be done.
    pub(super) fn begin_to_bring(&mut self, reads: &mut Vec<Brought>, wanted: Left) -> bool {
        let bringer = self.bringer.as_ref();
        let begun = bringer.map(|bringer| bringer.begin(wanted));
        let fetches = begun.is_some_and(|begun| begun.fetches);
        self.brought.extend(reads.drain(..).map(|read| Brought {
            manner: match read.manner {
                Manner::Fetched(_) if !fetches => Manner::ReadsAll,
                manner => manner,
            },
            ..read
        }));
        begun.is_some_and(Begun::is_any)
    }

    /// Nothing is being fetched any more: decides how the reads are made for which something was. Those that are asked for again come
    /// behind those that can be answered.
    pub(super) fn learn_what_was_fetched(&mut self) {
        let bringer = self.bringer.as_ref();
        let Missing { untried, failed } = bringer.map(Bringer::take_missing).unwrap_or_default();
        for read in &mut self.brought {
            let Manner::Fetched(places) = &read.manner else {
                continue;
            };
            let has_one_of = |some: &[usize]| some.iter().any(|place| places.contains(place));
            read.manner = match has_one_of(&untried) && !has_one_of(&failed) {
                true => Manner::Anew,
                false => Manner::ReadsHere,
            };
        }
        let is_asked_anew = |read: &Brought| read.manner == Manner::Anew;
        self.brought.make_contiguous().sort_by_key(is_asked_anew);
    }
}
