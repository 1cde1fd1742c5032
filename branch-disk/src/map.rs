//! Which file of a chain owns which sector: one map, asked once, whatever the depth.
//!
//! A tree in which each node has 64 parts, from blocks of 4 KiB up to all of the largest disk. A part with one owner is told
//! in two bytes; only one with several has a node of its own, or a block an owner for each sector.

/// 0: what is below all layers. *n*: the *n*th layer of the chain, the lowest of which is the first.
pub(crate) type Owner = u16;

pub(crate) const BOTTOM: Owner = 0;
/// Of a part that has several owners. No chain is so long.
const MIXED: Owner = Owner::MAX;

const BLOCK_SECTORS: u64 = 8;
const PARTS: u64 = 64;

/// Sectors from `start` to before `end` that have one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) owner: Owner,
}

/// The owners of all sectors of a disk.
#[derive(Debug)]
pub(crate) struct Map {
    root: Root,
}

/// The owners of 4 KiB.
type Block = [Owner; BLOCK_SECTORS as usize];
/// Of 1 GiB. Between are 256 KiB and 16 MiB.
type Gibibyte = Node<Node<Node<Block>>>;
/// Of 256 TiB, which is more than a disk has: between are 64 GiB and 4 TiB.
type Root = Node<Node<Node<Gibibyte>>>;

/// Sectors that lie one behind the other, as many in every one of a kind. They are counted from its first.
trait Part {
    const SECTORS: u64;

    /// All of one owner.
    fn of(owner: Owner) -> Self;

    /// The owner of `at`, and the first sector behind it of another, or `end`.
    fn run(&self, at: u64, end: u64) -> (Owner, u64);

    /// Makes `owner` the owner of the sectors from `start` to before `end`.
    fn set(&mut self, start: u64, end: u64, owner: Owner);

    /// Has each owner be another.
    fn renumber(&mut self, to: &impl Fn(Owner) -> Owner);

    /// The owner of all, if it is one.
    fn uniform(&self) -> Option<Owner>;
}

/// Parts of one kind.
#[derive(Debug)]
struct Node<P> {
    /// Of each part.
    owners: [Owner; PARTS as usize],
    /// A bit for each part whose owner is [`MIXED`].
    mixed: u64,
    /// Those parts, in order.
    parts: Vec<P>,
}

impl Default for Map {
    fn default() -> Self {
        Self {
            root: Root::of(BOTTOM),
        }
    }
}

impl Map {
    /// The run that `sector` is in, as far as `end`, which is behind it.
    pub(crate) fn run_at(&self, sector: u64, end: u64) -> Run {
        debug_assert!(sector < end);
        let (owner, end) = self.root.run(sector, end);
        Run {
            start: sector,
            end,
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

    /// Has each owner be what `to` gives for it, which goes through all of the map.
    pub(crate) fn renumber(&mut self, to: impl Fn(Owner) -> Owner) {
        self.root.renumber(&to);
    }

    /// Makes `owner`, which is not [`BOTTOM`], the owner of the sectors from `start` to before `end`.
    pub(crate) fn set(&mut self, start: u64, end: u64, owner: Owner) {
        if start < end {
            self.root.set(start, end, owner);
        }
    }
}

impl Part for Block {
    const SECTORS: u64 = BLOCK_SECTORS;

    fn of(owner: Owner) -> Self {
        [owner; BLOCK_SECTORS as usize]
    }

    fn run(&self, at: u64, end: u64) -> (Owner, u64) {
        let owner = self[at as usize];
        let others = &self[at as usize..end as usize];
        let alike = others.iter().take_while(|other| **other == owner).count();
        (owner, at + alike as u64)
    }

    fn set(&mut self, start: u64, end: u64, owner: Owner) {
        self[start as usize..end as usize].fill(owner);
    }

    fn renumber(&mut self, to: &impl Fn(Owner) -> Owner) {
        *self = self.map(to);
    }

    fn uniform(&self) -> Option<Owner> {
        let first = self[0];
        self.iter().all(|owner| *owner == first).then_some(first)
    }
}

impl<P: Part> Node<P> {
    /// Where in `parts` the mixed part `number` is, or would be.
    fn place(&self, number: u64) -> usize {
        (self.mixed & ((1 << number) - 1)).count_ones() as usize
    }

    /// As [`Part::run`], of the part `number`.
    fn run_in(&self, number: u64, at: u64, end: u64) -> (Owner, u64) {
        match self.owners[number as usize] {
            MIXED => self.parts[self.place(number)].run(at, end),
            owner => (owner, end),
        }
    }

    /// As [`Part::set`], of some of the part `number`.
    fn set_in(&mut self, number: u64, start: u64, end: u64, owner: Owner) {
        let before = self.owners[number as usize];
        if before == owner {
            return;
        }
        let place = self.place(number);
        if before != MIXED {
            self.parts.insert(place, P::of(before));
            self.mixed |= 1 << number;
            self.owners[number as usize] = MIXED;
        }
        let part = &mut self.parts[place];
        part.set(start, end, owner);
        if part.uniform() == Some(owner) {
            self.set_whole(number, owner);
        }
    }

    fn set_whole(&mut self, number: u64, owner: Owner) {
        if self.owners[number as usize] == MIXED {
            self.parts.remove(self.place(number));
            self.mixed &= !(1 << number);
        }
        self.owners[number as usize] = owner;
    }
}

impl<P: Part> Part for Node<P> {
    const SECTORS: u64 = PARTS * P::SECTORS;

    fn of(owner: Owner) -> Self {
        Self {
            owners: [owner; PARTS as usize],
            mixed: 0,
            parts: Vec::new(),
        }
    }

    fn run(&self, at: u64, end: u64) -> (Owner, u64) {
        let mut number = at / P::SECTORS;
        let mut first = number * P::SECTORS;
        let (owner, mut to) = self.run_in(number, at - first, P::SECTORS.min(end - first));
        while first + to < end && to == P::SECTORS {
            (number, first) = (number + 1, first + P::SECTORS);
            match self.run_in(number, 0, P::SECTORS.min(end - first)) {
                (next, next_to) if next == owner => to = next_to,
                _ => return (owner, first),
            }
        }
        (owner, first + to)
    }

    fn set(&mut self, start: u64, end: u64, owner: Owner) {
        let mut at = start;
        while at < end {
            let number = at / P::SECTORS;
            let first = number * P::SECTORS;
            let to = end.min(first + P::SECTORS);
            if to - at == P::SECTORS {
                self.set_whole(number, owner);
            } else {
                self.set_in(number, at - first, to - first, owner);
            }
            at = to;
        }
    }

    fn renumber(&mut self, to: &impl Fn(Owner) -> Owner) {
        for number in 0..PARTS {
            let before = self.owners[number as usize];
            if before != MIXED {
                self.owners[number as usize] = to(before);
                continue;
            }
            let place = self.place(number);
            let part = &mut self.parts[place];
            part.renumber(to);
            if let Some(owner) = part.uniform() {
                self.set_whole(number, owner);
            }
        }
    }

    fn uniform(&self) -> Option<Owner> {
        let first = self.owners[0];
        let all = first != MIXED && self.owners.iter().all(|owner| *owner == first);
        all.then_some(first)
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::layout::{MAX_BYTES, SECTOR_BYTES};

    const SECTORS: u64 = 6 * PARTS * BLOCK_SECTORS + 100;
    const GIB: u64 = 2 << 20;

    fn range() -> impl Strategy<Value = (u64, u64)> {
        let small = (0..SECTORS, 1..20u64);
        let large = (0..SECTORS, 1..SECTORS);
        let aligned = (0..SECTORS / 8, 1..300u64).prop_map(|(at, len)| (at * 8, len * 8));
        prop_oneof![small, large, aligned].prop_map(|(at, len)| (at, (at + len).min(SECTORS)))
    }

    proptest! {
        #[test]
        fn a_map_is_what_an_array_is(
            // Where parts of each kind meet, too.
            base in prop_oneof![Just(0), Just(GIB - SECTORS / 2), Just(64 * GIB - SECTORS / 2)],
            changes in vec((range(), 1..5u16), 0..60),
        ) {
            let mut map = Map::default();
            let mut array = vec![BOTTOM; SECTORS as usize];
            for ((start, end), owner) in changes {
                map.set(base + start, base + end, owner);
                array[start as usize..end as usize].fill(owner);
                let mut at = 0;
                let mut last = None;
                for run in map.runs(base, base + SECTORS) {
                    let (start, end) = (run.start - base, run.end - base);
                    prop_assert_eq!(start, at);
                    prop_assert_ne!(Some(run.owner), last);
                    prop_assert!(array[at as usize..end as usize].iter().all(|o| *o == run.owner));
                    last = Some(run.owner);
                    at = end;
                }
                prop_assert_eq!(at, SECTORS);
                prop_assert_eq!(map.run_at(base + SECTORS, base + SECTORS + 1).owner, BOTTOM);
            }
            let some = map.run_at(base + SECTORS / 2, base + SECTORS / 2 + 9);
            prop_assert!(some.end <= base + SECTORS / 2 + 9 && some.start < some.end);
        }
    }

    proptest! {
        #[test]
        fn owners_that_become_one_are_as_if_they_had_been(
            changes in vec((range(), 1..5u16), 0..60),
            to in vec(1..5u16, 4),
        ) {
            let renumbered = |owner: Owner| match owner {
                BOTTOM => BOTTOM,
                owner => to[usize::from(owner) - 1],
            };
            let (mut map, mut expected) = (Map::default(), Map::default());
            for ((start, end), owner) in changes {
                map.set(start, end, owner);
                expected.set(start, end, renumbered(owner));
            }
            map.renumber(renumbered);
            prop_assert!(map.runs(0, SECTORS).eq(expected.runs(0, SECTORS)));
            prop_assert!(map.root.weight() <= expected.root.weight());
        }
    }

    /// How many parts have a node or a block of their own: what the map's memory is made of.
    trait Weight {
        fn weight(&self) -> usize;
    }

    impl Weight for Block {
        fn weight(&self) -> usize {
            1
        }
    }

    impl<P: Weight> Weight for Node<P> {
        fn weight(&self) -> usize {
            1 + self.parts.iter().map(Weight::weight).sum::<usize>()
        }
    }

    #[test]
    fn what_is_alike_costs_nothing() {
        let mut map = Map::default();
        let mut weight = |start, end, owner| {
            map.set(start, end, owner);
            map.root.weight()
        };
        // 64 GiB and a block, which lies in a part of each kind.
        assert_eq!(weight(0, 64 * GIB, 1), 2);
        assert_eq!(weight(64 * GIB, 64 * GIB + 8, 1), 6);
        for block in 1..1000 {
            assert!(weight(64 * GIB + block * 8, 64 * GIB + block * 8 + 8, 1) <= 6);
        }
        // A sector of another owner, which then has its whole block, and again has nothing.
        assert_eq!(weight(100, 101, 2), 11);
        assert_eq!(weight(96, 104, 2), 10);
        assert_eq!(weight(96, 104, 1), 6);
    }

    #[test]
    fn the_largest_disk_has_room() {
        let sectors = MAX_BYTES / SECTOR_BYTES;
        let mut map = Map::default();
        map.set(sectors - 1, sectors, 1);
        let run = |start, end, owner| Run { start, end, owner };
        let runs: Vec<Run> = map.runs(0, sectors).collect();
        assert_eq!(
            runs,
            [run(0, sectors - 1, BOTTOM), run(sectors - 1, sectors, 1)]
        );
    }
}
