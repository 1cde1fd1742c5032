//! Any order of operations against an array of bytes.

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::{LayerRef, Space};

/// More than two regions of the map.
const SECTORS: u64 = 1200;
const BASE_SECTORS: usize = 700;

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64, u8),
    Zero(u64, u64, Space),
    Flush,
    Reopen,
    Cut,
    /// Has the next head be larger by so many sectors.
    Grow(u64),
    /// Goes on with a branch of one of the layers so far.
    Branch(prop::sample::Index),
    /// Merges the layers of the chain from one to another, if those are two.
    Merge(prop::sample::Index, prop::sample::Index),
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    let len = prop_oneof![4 => 1..20u64, 1 => 1..SECTORS];
    (0..SECTORS, len).prop_map(|(at, len)| (at, len.min(SECTORS - at)))
}

fn op() -> impl Strategy<Value = Op> {
    let space = prop_oneof![Just(Space::Free), Just(Space::Keep)];
    prop_oneof![
        8 => (range(), 1..=255u8).prop_map(|((at, len), byte)| Op::Write(at, len, byte)),
        3 => (range(), space).prop_map(|((at, len), space)| Op::Zero(at, len, space)),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
        2 => Just(Op::Cut),
        1 => (0..700u64).prop_map(Op::Grow),
        1 => any::<prop::sample::Index>().prop_map(Op::Branch),
        2 => any::<(prop::sample::Index, prop::sample::Index)>()
            .prop_map(|(one, other)| Op::Merge(one, other)),
    ]
}

fn span(at: u64, len: u64) -> std::ops::Range<usize> {
    (at * 512) as usize..((at + len) * 512) as usize
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_is_what_an_array_is(ops in vec(op(), 1..40)) {
        let bench = Bench::in_memory(BASE_SECTORS);
        let mut content = bench.base.clone();
        content.resize((SECTORS * 512) as usize, 0);
        let on = Foundation::Raw(bench.path("base"));
        let mut disk = Disk::create(&bench.path("d"), Some(SECTORS * 512), &on, &anything).unwrap();
        let mut layers: Vec<(LayerRef, Vec<u8>)> = Vec::new();
        for op in ops {
            match op {
                Op::Write(at, len, byte) => {
                    content[span(at, len)].fill(byte);
                    write(&mut disk, at * 512, &content[span(at, len)]);
                }
                Op::Zero(at, len, space) => {
                    content[span(at, len)].fill(0);
                    disk.write_zeroes(at * 512, len * 512, space).unwrap();
                }
                Op::Flush => disk.flush().unwrap(),
                Op::Reopen => {
                    let path = disk.path().to_owned();
                    drop(disk);
                    disk = Disk::open(&path, Mode::Write, &anything).unwrap();
                }
                Op::Cut => layers.push((sealed(&mut disk), content.clone())),
                Op::Grow(sectors) => {
                    let bytes = disk.bytes() + sectors * 512;
                    let next = disk.plan().grown_to(bytes).unwrap().prepare().unwrap();
                    let layer = disk.cut(next).unwrap().finish().unwrap();
                    layers.push((layer, content.clone()));
                    content.resize(bytes as usize, 0);
                }
                Op::Branch(which) if !layers.is_empty() => {
                    let (layer, then) = which.get(&layers);
                    let path = bench.path(&format!("d{}", bench.names().len()));
                    let on = Foundation::Layer(layer.path.clone(), Some(layer.id));
                    disk = Disk::create(&path, None, &on, &anything).unwrap();
                    content = then.clone();
                }
                Op::Branch(_) => {}
                Op::Merge(one, other) => {
                    let ids: Vec<_> = disk.layers().iter().map(|layer| layer.header.id).collect();
                    if let Some(merge) = disk.merge(*one.get(&ids), *other.get(&ids)) {
                        let count = disk.layers().len();
                        let merged = merge.write(&|| true).unwrap();
                        prop_assert!(disk.adopt(&merged));
                        prop_assert!(disk.layers().len() < count);
                    }
                }
            }
            prop_assert!(all(&disk) == content);
        }
        let path = disk.path().to_owned();
        drop(disk);
        sound(&path);
        for (layer, content) in layers {
            let disk = Disk::open(&layer.path, Mode::Read, &anything).unwrap();
            prop_assert!(all(&disk) == content);
        }
    }
}
