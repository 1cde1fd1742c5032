//! Whoever can write to the store, and compute its digests, but has no key.

use std::sync::Arc;

use dedup::backend::{Area, Files, Memory};
use dedup::{Error, GcOptions, Store};

use super::support::{Random, fill_page, image, load, save};
use super::{create, options, reopen};

fn digest(parts: &[&[u8]]) -> [u8; 32] {
    blake3::hash(&parts.concat()).into()
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn u64_at(bytes: &[u8], at: usize) -> usize {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

/// Of a pack: where each frame is, from its table.
fn frames(pack: &[u8]) -> Vec<std::ops::Range<usize>> {
    let trailer = pack.len() - 56;
    let (table, frames) = (u64_at(pack, trailer + 8), u32_at(pack, trailer + 16));
    (0..frames)
        .map(|frame| {
            let at = u32_at(pack, table + frame * 4);
            at..at + u32_at(pack, table + (frames + frame) * 4)
        })
        .collect()
}

/// Gives a frame another number, with a digest that is right.
fn renumber(frame: &mut [u8], number: u32) {
    frame[4..8].copy_from_slice(&number.to_le_bytes());
    let digest = xxhash_rust::xxh64::xxh64(&[&frame[..12], &frame[20..]].concat(), 0);
    frame[12..20].copy_from_slice(&digest.to_le_bytes());
}

/// Two packs whose frames all have the same size, and the images in them.
fn two_packs() -> (Files, [Vec<u8>; 2]) {
    let backend = Memory::new();
    let store = create(backend.clone());
    let images = [10, 20].map(|seed| {
        let mut image = vec![0; 64 * 4096];
        let mut random = Random::new(seed);
        image
            .chunks_mut(8)
            .for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()));
        image
    });
    save(&store, "a", &images[0]).unwrap();
    save(&store, "b", &images[1]).unwrap();
    (backend.files(), images)
}

/// No image has other bytes than were saved, and something is found to be wrong.
fn check(files: Files, images: &[Vec<u8>; 2]) {
    let digests = Store::open_without_key(Memory::with_files(files.clone()), options(None));
    let digests = digests.unwrap().fsck().unwrap();
    assert!(
        digests.problems.is_empty(),
        "the forgery is to be good: {digests:?}"
    );
    let store = reopen(files);
    let mut refused = 0;
    for (name, image) in ["a", "b"].iter().zip(images) {
        match load(&store, name) {
            Ok(loaded) => assert!(loaded == *image),
            Err(Error::Damaged { .. }) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(refused > 0);
    assert!(!store.fsck().unwrap().problems.is_empty());
}

#[test]
fn swapped_frames_of_a_pack_are_found() {
    let (mut files, images) = two_packs();
    let pack = files.iter_mut().find(|((area, _), _)| *area == Area::Packs);
    let pack = Arc::make_mut(pack.unwrap().1);
    let frames = frames(pack);
    let (first, second) = (frames[0].clone(), frames[1].clone());
    assert_eq!(first.len(), second.len());
    let (mut a, mut b) = (pack[first.clone()].to_vec(), pack[second.clone()].to_vec());
    renumber(&mut a, 1);
    renumber(&mut b, 0);
    pack[first].copy_from_slice(&b);
    pack[second].copy_from_slice(&a);
    check(files, &images);
}

#[test]
fn frames_of_another_pack_are_found() {
    let (mut files, images) = two_packs();
    let mut packs: Vec<_> = files
        .iter_mut()
        .filter(|((area, _), _)| *area == Area::Packs)
        .map(|(_, file)| Arc::make_mut(file))
        .collect();
    let at = frames(packs[0])[0].clone();
    assert_eq!(at, frames(packs[1])[0]);
    let moved = packs[0][at.clone()].to_vec();
    packs[1][at].copy_from_slice(&moved);
    check(files, &images);
}

/// Changes the facts of the snapshot `a`, and everything that depends on them.
fn with_facts(files: &mut Files, change: impl Fn(String) -> String) {
    let file = &mut files.get_mut(&(Area::Snapshots, "a".into())).unwrap();
    let trailer_at = file.len() - 48;
    let mut trailer = file[trailer_at..].to_vec();
    let facts_at = u64_at(&trailer, 0);
    let (facts, authenticator) = file[facts_at..trailer_at].split_at(u32_at(&trailer, 8));
    let facts = change(String::from_utf8(facts.to_vec()).unwrap());
    trailer[8..12].copy_from_slice(&(facts.len() as u32).to_le_bytes());
    let id = digest(&[&file[..16], facts.as_bytes(), &trailer[..16]]);
    trailer[16..32].copy_from_slice(&id[..16]);
    let forged = [&file[..facts_at], facts.as_bytes(), authenticator, &trailer].concat();
    **file = Arc::new(forged);
}

#[test]
fn changed_facts_are_found() {
    let (files, images) = two_packs();
    for (old, new) in [
        ("\"host\":\"", "\"host\":\"not-"),
        ("\"size\":262144", "\"size\":262143"),
    ] {
        let mut files = files.clone();
        with_facts(&mut files, |facts| {
            assert!(facts.contains(old));
            facts.replace(old, new)
        });
        check(files, &images);
    }
}

/// Recipes hold locations: to exchange the packs in a directory would be to exchange content.
#[test]
fn an_exchanged_directory_is_found() {
    let (mut files, images) = two_packs();
    let pack_ids: Vec<Vec<u8>> = files
        .keys()
        .filter(|(area, _)| *area == Area::Packs)
        .map(|(_, name)| {
            let digits = (0..16).map(|at| &name[at * 2..at * 2 + 2]);
            digits.map(|d| u8::from_str_radix(d, 16).unwrap()).collect()
        })
        .collect();
    let key = (Area::Snapshots, "a".to_owned());
    let mut file = files[&key].to_vec();
    let (mine, other) = if file.windows(16).any(|run| run == pack_ids[0]) {
        (&pack_ids[0], &pack_ids[1])
    } else {
        (&pack_ids[1], &pack_ids[0])
    };
    let at = file.windows(16).position(|run| run == mine).unwrap();
    file[at..at + 16].copy_from_slice(other);
    // The directory begins with two numbers, has one pack and one block, and ends after 8 + 16 + 12 bytes.
    let new = digest(&[&file[at - 8..at + 28]]);
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
    let old = hex(&digest(&[&files[&key][at - 8..at + 28]])[..16]);
    files.insert(key, Arc::new(file));
    with_facts(&mut files, |facts| {
        assert!(facts.contains(&old));
        facts.replace(&old, &hex(&new[..16]))
    });
    check(files, &images);
}

#[test]
fn exchanged_snapshots_are_found() {
    let (mut files, images) = two_packs();
    let key = |name: &str| (Area::Snapshots, name.to_owned());
    let (a, b) = (files[&key("a")].clone(), files[&key("b")].clone());
    files.insert(key("a"), b);
    files.insert(key("b"), a);
    check(files, &images);
}

#[test]
fn identities_that_were_given_to_other_slots_are_not_believed() {
    let backend = Memory::new();
    let store = create(backend.clone());
    let image = image(40, 30);
    save(&store, "a", &image).unwrap();
    let mut files = backend.files();
    let pack = files.iter_mut().find(|((area, _), _)| *area == Area::Packs);
    let pack = Arc::make_mut(pack.unwrap().1);
    // One live slot less in the last frame, one live slot more nowhere: move the last bit that is set.
    let trailer = pack.len() - 56;
    let (table, frames) = (u64_at(pack, trailer + 8), u32_at(pack, trailer + 16));
    let bitmaps = table + frames * 10;
    let last = bitmaps + frames - 1;
    let slots_at = table + frames * 8 + (frames - 1) * 2;
    let slots = u16::from_le_bytes([pack[slots_at], pack[slots_at + 1]]);
    assert!(slots < 4 && slots > 0);
    pack[slots_at] += 1;
    pack[last] <<= 1;
    let end = table + frames * 11;
    let new = digest(&[
        &pack[..120],
        &pack[table..end],
        &pack[trailer..trailer + 40],
    ]);
    pack[trailer + 40..].copy_from_slice(&new[..16]);
    // And the index, which nobody vouches for, is made to fit.
    let first = (frames as u64 - 1) * 4;
    let index = files.iter_mut().find(|((area, _), _)| *area == Area::Index);
    let index = Arc::make_mut(index.unwrap().1);
    let buckets = index.len() / 4096;
    let mut moved = 0;
    for bucket in index.chunks_exact_mut(4096).take(buckets) {
        for entry in 0..u16::from_le_bytes([bucket[8], bucket[9]]) as usize {
            let value = &mut bucket[16 + 370 * 6 + entry * 5..][..5];
            if u64::from(value[0]) | u64::from(value[1]) << 8 >= first {
                value[0] += 1;
                moved += 1;
            }
        }
    }
    assert_eq!(moved, slots);
    let store = reopen(files);
    let again = save(&store, "again", &image).unwrap();
    assert!(again.images[0].new_chunks > 0, "a forged hit was believed");
    assert!(load(&store, "again").unwrap() == image);
}

/// Slots that have died are zeros in a frame that is sealed as ever: whoever says that they live again, and puts back a snapshot that
/// refers to them, has no zeros read for what was there.
#[test]
fn dead_slots_that_are_said_to_live_are_not_there_and_not_zeros() {
    let backend = Memory::new();
    let store = create(backend.clone());
    let mut base = vec![0; 8 * 4096];
    for (page, seed) in base.chunks_mut(4096).zip(70..) {
        fill_page(page, seed);
    }
    save(&store, "base", &base).unwrap();
    let mut child = vec![0; base.len()];
    for page in [0, 4] {
        let at = page * 4096..(page + 1) * 4096;
        child[at.clone()].copy_from_slice(&base[at]);
    }
    save(&store, "child", &child).unwrap();
    let key = (Area::Snapshots, "base".to_owned());
    let old = backend.files()[&key].clone();
    store.rm("base").unwrap();
    let collected = store.gc(&GcOptions::default()).unwrap();
    assert_eq!(collected.packs_shrunk, 1);

    let mut files = backend.files();
    files.insert(key, old);
    let pack = files.iter_mut().find(|((area, _), _)| *area == Area::Packs);
    let pack = pack.unwrap().1;
    let trailer_at = pack.len() - 56;
    let (table, frames) = (u64_at(pack, trailer_at + 8), u32_at(pack, trailer_at + 16));
    let (bitmaps, ids) = (table + frames * 10, table + frames * 11);
    assert_eq!((frames, &pack[bitmaps..ids]), (2, &[1, 1][..]));
    let mut forged = pack[..ids].to_vec();
    forged[bitmaps..].fill(0b1111);
    let mut trailer = pack[trailer_at..].to_vec();
    trailer[20..24].copy_from_slice(&8u32.to_le_bytes());
    let column = vec![7; 8 * 24 + 28];
    trailer[24..40].copy_from_slice(&digest(&[&column])[..16]);
    let of_all = digest(&[&forged[..120], &forged[table..], &trailer[..40]]);
    trailer[40..].copy_from_slice(&of_all[..16]);
    *pack = Arc::new([forged, column, trailer].concat());

    let digests = Store::open_without_key(Memory::with_files(files.clone()), options(None));
    let digests = digests.unwrap().fsck().unwrap();
    assert!(digests.problems.is_empty(), "{digests:?}");
    let store = reopen(files);
    let not_there = |outcome: dedup::Result<()>| {
        assert!(matches!(outcome, Err(Error::Damaged { .. })), "{outcome:?}");
    };
    not_there(load(&store, "base").map(drop));
    let image = store.image("base", "memory").unwrap();
    let mut parts = image.part_reader().unwrap();
    not_there(parts.read(0, |_| true, |_, _| Ok(())));
    for (page, number) in base.chunks(4096).zip(0u64..) {
        let mut read = vec![7; 100];
        let outcome = image.read_at(number * 4096 + 500, &mut read);
        if number % 4 == 0 {
            outcome.unwrap();
            assert!(read == page[500..600]);
        } else {
            not_there(outcome);
        }
    }
    assert!(load(&store, "child").unwrap() == child);
    let problems = store.fsck().unwrap().problems;
    let named: Vec<_> = problems.iter().flat_map(|found| &found.snapshots).collect();
    assert_eq!(named, ["base"], "{problems:?}");
}
