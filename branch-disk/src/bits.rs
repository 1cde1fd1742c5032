//! Which sectors a layer owns, as its bitmap on the disk says.
//!
//! Bits are only ever set, and only once their sectors are durable. So whichever of the newest a crash leaves is right,
//! and all that a page needs is a twin to fall back on if it is torn.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::FileExt,
};

use crate::{
    error::Error,
    header::{Header, LayerId},
    layout::{Geometry, PAGE_BYTES, PAIR_SECTORS},
    media::Media,
    page::{self, CONTENT_BYTES, Found, Label, PageKind},
};

const WORDS: usize = CONTENT_BYTES / 8;

type Words = Box<[u64; WORDS]>;

/// A pair of pages.
#[derive(Debug, Default)]
struct Pair {
    /// `None` when all are set.
    words: Option<Words>,
    /// Which of the two pages holds.
    slot: u64,
    /// 0 when neither was written.
    generation: u64,
}

/// The bitmap of a layer.
#[derive(Debug)]
pub(crate) struct Bits {
    geometry: Geometry,
    /// Those with any bit set.
    pairs: BTreeMap<u32, Pair>,
    /// Those that the disk does not have as they are.
    dirty: BTreeSet<u32>,
    /// Those of which a page is torn.
    torn: BTreeSet<u32>,
}

impl Bits {
    pub(crate) fn none(geometry: Geometry) -> Self {
        Self {
            geometry,
            pairs: BTreeMap::new(),
            dirty: BTreeSet::new(),
            torn: BTreeSet::new(),
        }
    }

    /// Reads the bitmap of a layer, and of it only what was ever written. A page of one that is `sealed` was durable and whole before its
    /// seal was written: if it is torn now, what it said is lost.
    pub(crate) fn load(media: &Media, header: &Header, sealed: bool) -> Result<Self, Error> {
        let geometry = header.geometry;
        let mut bits = Self::none(geometry);
        let end = geometry.pair_at(geometry.pairs());
        let mut at = geometry.pair_at(0);
        while let Some(data) = media.next_data(at, end)? {
            let number = ((data - geometry.pair_at(0)) / (2 * PAGE_BYTES as u64)) as u32;
            let (pair, torn) = load_pair(media, header, number)?;
            if torn && sealed {
                let what = "a page of its bitmap is broken";
                return Err(Error::damaged(media.path(), what));
            }
            if torn {
                bits.torn.insert(number);
            }
            if let Some(pair) = pair {
                bits.pairs.insert(number, pair);
            }
            at = geometry.pair_at(number + 1);
        }
        Ok(bits)
    }

    /// Whether the layer owns nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.pairs.values().all(Pair::is_empty)
    }

    /// Whether the disk lacks any of it.
    pub(crate) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Has torn pages be written anew, too: under a seal there is none.
    pub(crate) fn mend(&mut self) {
        for number in std::mem::take(&mut self.torn) {
            self.pairs.entry(number).or_insert_with(Pair::empty);
            self.dirty.insert(number);
        }
    }

    /// The layer owns the sectors from `start` to before `end`.
    pub(crate) fn set(&mut self, start: u64, end: u64) {
        let mut at = start;
        while at < end {
            let number = (at / PAIR_SECTORS) as u32;
            let first = u64::from(number) * PAIR_SECTORS;
            let to = end.min(first + PAIR_SECTORS);
            let size = PAIR_SECTORS.min(self.geometry.sectors() - first);
            let pair = self.pairs.entry(number).or_insert_with(Pair::empty);
            if pair.set(at - first, to - first, size) {
                self.dirty.insert(number);
            }
            at = to;
        }
    }

    /// Calls `found` with each run of sectors that the layer owns, in order.
    pub(crate) fn each_run(&self, mut found: impl FnMut(u64, u64)) {
        let mut open: Option<(u64, u64)> = None;
        let mut add = |start: u64, end: u64| match &mut open {
            Some(run) if run.1 == start => run.1 = end,
            _ => {
                if let Some((start, end)) = open.replace((start, end)) {
                    found(start, end);
                }
            }
        };
        for (number, pair) in &self.pairs {
            let first = u64::from(*number) * PAIR_SECTORS;
            let size = PAIR_SECTORS.min(self.geometry.sectors() - first);
            let Some(words) = &pair.words else {
                add(first, first + size);
                continue;
            };
            for (word, at) in words.iter().zip((first..).step_by(64)) {
                let mut rest = *word;
                let mut bit = 0;
                while rest != 0 {
                    bit += u64::from(rest.trailing_zeros());
                    let after = word >> bit;
                    let ones = u64::from(after.trailing_ones());
                    add(at + bit, at + bit + ones);
                    bit += ones;
                    rest = if bit < 64 { word >> bit } else { 0 };
                }
            }
        }
        if let Some((start, end)) = open {
            found(start, end);
        }
    }

    /// Whether another layer of the same size owns the same.
    pub(crate) fn are_those_of(&self, other: &Self) -> bool {
        let [ours, theirs] = [self, other].map(|bits| {
            let pairs = bits.pairs.iter().filter(|(_, pair)| !pair.is_empty());
            pairs.map(|(number, pair)| (number, &pair.words))
        });
        ours.eq(theirs)
    }

    /// Sectors that the layer owns.
    pub(crate) fn count(&self) -> u64 {
        let mut count = 0;
        self.each_run(|start, end| count += end - start);
        count
    }

    /// Writes what the disk lacks, each pair to the page that does not hold. Nothing of it may be taken for durable
    /// before a sync that succeeds; if that fails, this bitmap is of no more use. If a page cannot be written, this can
    /// be tried again, but only after such a sync, too: those before it hold now, and their twins are all that is durable.
    pub(crate) fn write(&mut self, media: &Media, id: LayerId) -> Result<(), Error> {
        while let Some(number) = self.dirty.first().copied() {
            let Some(pair) = self.pairs.get_mut(&number) else {
                self.dirty.remove(&number);
                continue;
            };
            let first = u64::from(number) * PAIR_SECTORS;
            let size = PAIR_SECTORS.min(self.geometry.sectors() - first);
            let label = label(id, number);
            let (slot, generation) = match pair.generation {
                0 => (0, 1),
                last => (1 - pair.slot, last + 1),
            };
            let page = page::encode(label, generation, &pair.content(size));
            let at = self.geometry.pair_at(number) + slot * PAGE_BYTES as u64;
            media.write(&page[..], at)?;
            // Not before: a page that is half written must not hold, or the next would go over its twin.
            (pair.slot, pair.generation) = (slot, generation);
            self.dirty.remove(&number);
            // It was the page that did not hold.
            self.torn.remove(&number);
        }
        Ok(())
    }
}

fn label(id: LayerId, number: u32) -> Label {
    Label {
        id,
        kind: PageKind::Bits,
        number: number.into(),
    }
}

fn load_pair(media: &Media, header: &Header, number: u32) -> Result<Loaded, Error> {
    let geometry = header.geometry;
    let mut pages = [[0; PAGE_BYTES]; 2];
    for (page, at) in pages
        .iter_mut()
        .zip((geometry.pair_at(number)..).step_by(PAGE_BYTES))
    {
        media.read(page, at)?;
    }
    let first = u64::from(number) * PAIR_SECTORS;
    let size = PAIR_SECTORS.min(geometry.sectors() - first);
    decode_pair(&pages, label(header.id, number), size)
        .map_err(|what| Error::damaged(media.path(), what))
}

/// A pair, if anything of it was written to its end, and whether one of its pages is torn.
type Loaded = (Option<Pair>, bool);

/// What two pages say together, of `size` sectors.
fn decode_pair(pages: &[page::Raw; 2], label: Label, size: u64) -> Result<Loaded, &'static str> {
    let mut best: Option<(u64, u64, &[u8])> = None;
    let mut broken = 0;
    for (page, slot) in pages.iter().zip(0..) {
        match page::decode(label, page) {
            Found::Nothing => {}
            Found::Broken => broken += 1,
            Found::Whole(page) => {
                if best.is_none_or(|(_, generation, _)| page.generation > generation) {
                    best = Some((slot, page.generation, page.content));
                }
            }
        }
    }
    let Some((slot, generation, content)) = best else {
        // The first page ever, torn: nothing was owned before.
        return match (broken, page::decode(label, &pages[0])) {
            (0, _) => Ok((None, false)),
            (1, Found::Broken) => Ok((None, true)),
            _ => Err("both pages of a part of its bitmap are broken"),
        };
    };
    // More than any layer comes to; the next must be one more.
    if generation > u64::MAX / 2 || content.len() != CONTENT_BYTES {
        return Err("a page of its bitmap is impossible");
    }
    let mut words: Words = Box::new([0; WORDS]);
    for (word, bytes) in words.iter_mut().zip(content.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
    }
    let mut pair = Pair {
        words: Some(words),
        slot,
        generation,
    };
    if pair.ones() != pair.ones_before(size) {
        return Err("its bitmap has bits beyond its end");
    }
    if pair.ones() == size {
        pair.words = None;
    }
    Ok((Some(pair), broken > 0))
}

impl Pair {
    /// One that was never written.
    fn empty() -> Self {
        Self {
            words: Some(Box::new([0; WORDS])),
            ..Self::default()
        }
    }

    fn is_empty(&self) -> bool {
        let words = self.words.as_ref();
        words.is_some_and(|words| words.iter().all(|word| *word == 0))
    }

    /// Sets bits `from` to before `to` of the first `size`; whether any was not.
    fn set(&mut self, from: u64, to: u64, size: u64) -> bool {
        let Some(words) = &mut self.words else {
            return false;
        };
        let mut changed = false;
        let mut at = from;
        while at < to {
            let end = to.min((at / 64 + 1) * 64);
            let mask = ones(end - at) << (at % 64);
            let word = &mut words[(at / 64) as usize];
            changed |= *word & mask != mask;
            *word |= mask;
            at = end;
        }
        if changed && self.ones() == size {
            self.words = None;
        }
        changed
    }

    fn ones(&self) -> u64 {
        let words = self.words.iter().flat_map(|words| words.iter());
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    fn ones_before(&self, size: u64) -> u64 {
        let words = self.words.iter().flat_map(|words| words.iter());
        let masked = words
            .zip((0..).step_by(64))
            .map(|(word, at)| word & ones(size.saturating_sub(at).min(64)));
        masked.map(|word| u64::from(word.count_ones())).sum()
    }

    fn content(&self, size: u64) -> Vec<u8> {
        match &self.words {
            Some(words) => words.iter().flat_map(|word| word.to_le_bytes()).collect(),
            None => (0..WORDS as u64)
                .flat_map(|word| ones(size.saturating_sub(word * 64).min(64)).to_le_bytes())
                .collect(),
        }
    }
}

/// A word whose lowest `count` bits are set.
fn ones(count: u64) -> u64 {
    if count >= 64 {
        u64::MAX
    } else {
        (1 << count) - 1
    }
}

impl Media {
    fn read(&self, page: &mut page::Raw, at: u64) -> Result<(), Error> {
        let read = self.file().read_exact_at(page, at);
        read.map_err(Error::io("read", self.path()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const SECTORS: u64 = 2 * PAIR_SECTORS + 1000;

    proptest! {
        #[test]
        fn runs_are_those_of_an_array(changes in vec((0..SECTORS, 1..9000u64), 0..40)) {
            let mut bits = Bits::none(Geometry::of(SECTORS * 512).unwrap());
            let mut array = vec![false; SECTORS as usize];
            for (start, len) in changes {
                let end = (start + len).min(SECTORS);
                bits.set(start, end);
                array[start as usize..end as usize].fill(true);
            }
            let mut again = vec![false; SECTORS as usize];
            let mut last = None;
            bits.each_run(|start, end| {
                assert!(start < end && last.is_none_or(|last| last < start));
                last = Some(end);
                again[start as usize..end as usize].fill(true);
            });
            prop_assert!(array == again);
            prop_assert_eq!(bits.count(), array.iter().filter(|set| **set).count() as u64);
        }
    }

    #[test]
    fn a_torn_page_leaves_its_twin_and_two_torn_pages_are_damage() {
        let label = label(LayerId([1; 16]), 0);
        let content = |first: u8| {
            let mut content = vec![0; CONTENT_BYTES];
            content[0] = first;
            content
        };
        let [old, new] =
            [(1, 1u8), (2, 3)].map(|(n, bits)| *page::encode(label, n, &content(bits)));
        let mut torn = new;
        torn[512..].copy_from_slice(&[0; PAGE_BYTES - 512]);
        torn[100] = 9;
        let nothing = [0; PAGE_BYTES];
        let first = |pages: [page::Raw; 2]| {
            decode_pair(&pages, label, PAIR_SECTORS)
                .map(|(pair, torn)| (pair.map(|pair| pair.words.unwrap()[0]), torn))
        };
        assert_eq!(first([old, new]), Ok((Some(3), false)));
        assert_eq!(first([new, old]), Ok((Some(3), false)));
        assert_eq!(first([old, torn]), Ok((Some(1), true)));
        assert_eq!(first([torn, old]), Ok((Some(1), true)));
        assert_eq!(first([torn, nothing]), Ok((None, true)));
        assert_eq!(first([nothing, nothing]), Ok((None, false)));
        assert!(first([torn, torn]).is_err());
        // The second page is never the first to be written.
        assert!(first([nothing, torn]).is_err());
        assert!(
            decode_pair(&[old, new], label, 1).is_err(),
            "beyond the end"
        );
    }
}
