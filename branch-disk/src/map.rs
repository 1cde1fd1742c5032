//! Which file of a chain owns which sector: one map, asked once, whatever the depth.
//!
//! Sectors are gathered into blocks of 4 KiB and blocks into regions of 256 KiB. Neighbouring regions of one owner are
//! one span; a region with several has an owner for each block, and only a block with several one for each sector.

use std::collections::BTreeMap;

/// 0: what is below all layers. *n*: the layer of depth *n*.
pub(crate) type Owner = u16;

pub(crate) const BOTTOM: Owner = 0;
/// In a block whose sectors have several owners. No chain is so long.
const MIXED: Owner = Owner::MAX;

const BLOCK_SECTORS: u64 = 8;
const REGION_BLOCKS: u64 = 64;
const REGION_SECTORS: u64 = BLOCK_SECTORS * REGION_BLOCKS;

/// Sectors from `start` to before `end` that have one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) owner: Owner,
}

#[derive(Debug)]
struct Blocks {
    owners: [Owner; REGION_BLOCKS as usize],
    mixed: BTreeMap<u8, [Owner; BLOCK_SECTORS as usize]>,
}

#[derive(Debug)]
enum Content {
    Uniform(Owner),
    /// Always of one region.
    Blocks(Box<Blocks>),
}

/// Regions up to before `end`.
#[derive(Debug)]
struct Span {
    end: u32,
    content: Content,
}

/// The owners of all sectors of a disk.
#[derive(Debug, Default)]
pub(crate) struct Map {
    /// By their first regions. What is in no span is [`BOTTOM`]'s.
    spans: BTreeMap<u32, Span>,
}

impl Map {
    /// The run that `sector` is in, as far as `end`.
    pub(crate) fn run_at(&self, sector: u64, end: u64) -> Run {
        let (owner, mut to) = self.piece_at(sector);
        while to < end {
            let (next, next_to) = self.piece_at(to);
            if next != owner {
                break;
            }
            to = next_to;
        }
        Run {
            start: sector,
            end: to.min(end),
            owner,
        }
    }

    /// All runs from `start` to before `end`, in order.
    pub(crate) fn runs(&self, start: u64, end: u64) -> impl Iterator<Item = Run> {
        let mut at = start;
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let run = self.run_at(at, end);
                at = run.end;
                run
            })
        })
    }

    /// The owner of `sector`, and up to where that is told in one place.
    fn piece_at(&self, sector: u64) -> (Owner, u64) {
        let region = region_of(sector);
        let Some((first, span)) = self.spans.range(..=region).next_back() else {
            return (BOTTOM, self.next_span(region));
        };
        if span.end <= region {
            return (BOTTOM, self.next_span(region));
        }
        match &span.content {
            Content::Uniform(owner) => (*owner, u64::from(span.end) * REGION_SECTORS),
            Content::Blocks(blocks) => {
                let first = u64::from(*first) * REGION_SECTORS;
                let block = (sector - first) / BLOCK_SECTORS;
                let owner = blocks.owners[block as usize];
                let block_at = first + block * BLOCK_SECTORS;
                match blocks.mixed.get(&(block as u8)) {
                    Some(sectors) if owner == MIXED => {
                        (sectors[(sector - block_at) as usize], sector + 1)
                    }
                    _ => (owner, block_at + BLOCK_SECTORS),
                }
            }
        }
    }

    /// The first sector of the span after `region`, or the end of all sectors.
    fn next_span(&self, region: u32) -> u64 {
        let next = self.spans.range(region..).next();
        next.map_or(u64::MAX, |(first, _)| u64::from(*first) * REGION_SECTORS)
    }

    /// Makes `owner`, which is not [`BOTTOM`], the owner of the sectors from `start` to before `end`.
    pub(crate) fn set(&mut self, start: u64, end: u64, owner: Owner) {
        if start >= end {
            return;
        }
        let whole_from = start.div_ceil(REGION_SECTORS);
        let whole_to = end / REGION_SECTORS;
        if whole_from > whole_to {
            // Within one region.
            return self.set_within(region_of(start), start, end, owner);
        }
        let (from, to) = (whole_from * REGION_SECTORS, whole_to * REGION_SECTORS);
        if start < from {
            self.set_within(region_of(start), start, from, owner);
        }
        if to < end {
            self.set_within(region_of(to), to, end, owner);
        }
        if from < to {
            self.set_uniform(whole_from as u32, whole_to as u32, owner);
        }
    }

    /// As [`Map::set`], for sectors of one region, not all of them.
    fn set_within(&mut self, region: u32, start: u64, end: u64, owner: Owner) {
        let first = u64::from(region) * REGION_SECTORS;
        let (start, end) = (start - first, end - first);
        let blocks = self.blocks(region);
        let mut at = start;
        while at < end {
            let block = at / BLOCK_SECTORS;
            let block_at = block * BLOCK_SECTORS;
            let to = end.min(block_at + BLOCK_SECTORS);
            blocks.set(block as u8, at - block_at, to - block_at, owner);
            at = to;
        }
        if blocks.uniform() == Some(owner) {
            self.set_uniform(region, region + 1, owner);
        }
    }

    /// The blocks of `region`, which becomes a span of its own.
    fn blocks(&mut self, region: u32) -> &mut Blocks {
        self.split(region);
        self.split(region + 1);
        let span = self.spans.entry(region).or_insert(Span {
            end: region + 1,
            content: Content::Uniform(BOTTOM),
        });
        if let Content::Uniform(owner) = span.content {
            span.content = Content::Blocks(Box::new(Blocks {
                owners: [owner; REGION_BLOCKS as usize],
                mixed: BTreeMap::new(),
            }));
        }
        match &mut span.content {
            Content::Blocks(blocks) => blocks,
            Content::Uniform(_) => unreachable!("it was made of blocks above"),
        }
    }

    fn set_uniform(&mut self, mut from: u32, mut to: u32, owner: Owner) {
        self.split(from);
        self.split(to);
        while let Some((&first, _)) = self.spans.range(from..to).next() {
            self.spans.remove(&first);
        }
        let alike = |span: &Span| matches!(span.content, Content::Uniform(other) if other == owner);
        if let Some((&first, span)) = self.spans.range(..from).next_back()
            && span.end == from
            && alike(span)
        {
            from = first;
        }
        if let Some(span) = self.spans.get(&to)
            && alike(span)
        {
            let end = span.end;
            self.spans.remove(&to);
            to = end;
        }
        let content = Content::Uniform(owner);
        self.spans.insert(from, Span { end: to, content });
    }

    /// Makes a span begin at `region`, if one goes across.
    fn split(&mut self, region: u32) {
        if let Some((&first, span)) = self.spans.range_mut(..region).next_back()
            && span.end > region
            && let Content::Uniform(owner) = span.content
        {
            let end = std::mem::replace(&mut span.end, region);
            debug_assert!(first < region);
            let content = Content::Uniform(owner);
            self.spans.insert(region, Span { end, content });
        }
    }

    /// Spans, blocks in them, and blocks with several owners: what the map's memory is made of.
    #[cfg(test)]
    pub(crate) fn weight(&self) -> (usize, usize, usize) {
        let blocks = self.spans.values().filter_map(|span| match &span.content {
            Content::Blocks(blocks) => Some(blocks.mixed.len()),
            Content::Uniform(_) => None,
        });
        let mixed: Vec<usize> = blocks.collect();
        (self.spans.len(), mixed.len(), mixed.iter().sum())
    }
}

impl Blocks {
    /// Sets sectors `from` to before `to` of one block.
    fn set(&mut self, block: u8, from: u64, to: u64, owner: Owner) {
        let whole = &mut self.owners[usize::from(block)];
        if from == 0 && to == BLOCK_SECTORS {
            if *whole == MIXED {
                self.mixed.remove(&block);
            }
            *whole = owner;
        } else if *whole != owner {
            let before = [*whole; BLOCK_SECTORS as usize];
            let sectors = self.mixed.entry(block).or_insert(before);
            sectors[from as usize..to as usize].fill(owner);
            *whole = MIXED;
            if sectors.iter().all(|sector| *sector == owner) {
                self.mixed.remove(&block);
                *whole = owner;
            }
        }
    }

    /// The owner of all, if it is one.
    fn uniform(&self) -> Option<Owner> {
        let first = self.owners[0];
        let all = first != MIXED && self.owners.iter().all(|owner| *owner == first);
        all.then_some(first)
    }
}

/// The largest disk has 2^25 regions.
fn region_of(sector: u64) -> u32 {
    (sector / REGION_SECTORS) as u32
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const SECTORS: u64 = 6 * REGION_SECTORS + 100;

    fn range() -> impl Strategy<Value = (u64, u64)> {
        let small = (0..SECTORS, 1..20u64);
        let large = (0..SECTORS, 1..SECTORS);
        let aligned = (0..SECTORS / 8, 1..300u64).prop_map(|(at, len)| (at * 8, len * 8));
        prop_oneof![small, large, aligned].prop_map(|(at, len)| (at, (at + len).min(SECTORS)))
    }

    proptest! {
        #[test]
        fn a_map_is_what_an_array_is(changes in vec((range(), 1..5u16), 0..60)) {
            let mut map = Map::default();
            let mut array = vec![BOTTOM; SECTORS as usize];
            for ((start, end), owner) in changes {
                map.set(start, end, owner);
                array[start as usize..end as usize].fill(owner);
                let mut at = 0;
                let mut last = None;
                for run in map.runs(0, SECTORS) {
                    prop_assert_eq!(run.start, at);
                    prop_assert_ne!(Some(run.owner), last);
                    prop_assert!(array[at as usize..run.end as usize].iter().all(|o| *o == run.owner));
                    last = Some(run.owner);
                    at = run.end;
                }
                prop_assert_eq!(at, SECTORS);
            }
            let some = map.run_at(SECTORS / 2, SECTORS / 2 + 9);
            prop_assert!(some.end <= SECTORS / 2 + 9 && some.start < some.end);
        }
    }

    #[test]
    fn what_is_alike_costs_nothing() {
        let mut map = Map::default();
        // A terabyte, a block at a time at its end, and a sector at a time once.
        map.set(0, 2 << 30, 1);
        assert_eq!(map.weight(), (1, 0, 0));
        for block in 0..1000 {
            let at = (2u64 << 30) + block * 8;
            map.set(at, at + 8, 1);
        }
        assert_eq!(map.weight(), (2, 1, 0));
        map.set(100, 101, 2);
        assert_eq!(map.weight(), (3, 2, 1));
        for sector in 96..104 {
            map.set(sector, sector + 1, 1);
        }
        assert_eq!(map.weight(), (2, 1, 0));
    }
}
