//! Garbage is collected, and nothing else.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

mod support;

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dedup::backend::{Area, Backend, Lock, Memory, Publish};
use dedup::{Error, GcOptions, Store};
use support::hooked::{Call, Hooked};
use support::{create, fill_page, image, load, options, save, touch};

fn pack_bytes(backend: &Memory) -> u64 {
    backend
        .list(Area::Packs)
        .unwrap()
        .iter()
        .map(|pack| pack.size)
        .sum()
}

#[test]
fn a_removed_snapshot_gives_back_its_space() {
    let backend = Memory::new();
    let store = create(backend.clone());
    save(&store, "kept", &image(2000, 1)).unwrap();
    let before = pack_bytes(&backend);
    save(&store, "removed", &image(2000, 2)).unwrap();
    assert_eq!(store.gc(&GcOptions::default()).unwrap().bytes_freed, 0);
    store.rm("removed").unwrap();
    let collected = store.gc(&GcOptions::default()).unwrap();
    assert_eq!((collected.packs_removed, pack_bytes(&backend)), (1, before));
    assert!(load(&store, "kept").unwrap() == image(2000, 1));
    assert!(store.fsck().unwrap().problems.is_empty());
    assert_eq!(store.gc(&GcOptions::default()).unwrap().bytes_freed, 0);
}

#[test]
fn a_pack_that_is_hardly_needed_shrinks_and_keeps_its_slots() {
    let backend = Memory::new();
    let store = create(backend.clone());
    let base = image(3000, 3);
    save(&store, "base", &base).unwrap();
    let before = pack_bytes(&backend);
    // Refers to every seventh page or so of the base's pack.
    let mut child = vec![0; base.len()];
    for at in (0..3000).filter(|at| at % 7 < 2).map(|at| at * 4096) {
        child[at..at + 4096].copy_from_slice(&base[at..at + 4096]);
    }
    let stored = save(&store, "child", &child).unwrap().images[0].new_chunks;
    assert!(stored <= support::left_out(), "{stored}");
    store.rm("base").unwrap();
    let collected = store.gc(&GcOptions::default()).unwrap();
    assert_eq!((collected.packs_removed, collected.packs_shrunk), (0, 1));
    assert!(pack_bytes(&backend) < before / 2);
    assert!(load(&store, "child").unwrap() == child);
    let report = store.fsck().unwrap();
    assert!(report.problems.is_empty(), "{report:?}");
    // What went is stored again, what stayed is found.
    let again = save(&store, "again", &base).unwrap();
    let kept = child
        .chunks(4096)
        .filter(|page| page.iter().any(|byte| *byte != 0))
        .count() as u64;
    assert!(again.images[0].new_chunks > 0 && again.images[0].known_chunks >= kept);
    assert!(load(&store, "again").unwrap() == base && load(&store, "child").unwrap() == child);
}

/// What is not compressed takes as much room as it has bytes, zeros too: dead chunks go with theirs, whichever of a frame they are.
#[test]
fn a_pack_that_is_not_compressed_shrinks_as_much() {
    for position in 0..4 {
        let backend = Memory::new();
        let raw = dedup::CreateOptions {
            level: 0,
            ..support::create_options()
        };
        let store = Store::create(backend.clone(), &raw, options()).unwrap();
        let mut base = vec![0; 400 * 4096];
        let mut random = support::Random::new(1);
        for word in base.as_chunks_mut::<8>().0 {
            *word = random.next().to_le_bytes();
        }
        save(&store, "base", &base).unwrap();
        let before = pack_bytes(&backend);
        let kept: Vec<u8> = base
            .chunks(4096)
            .skip(position)
            .step_by(4)
            .flatten()
            .copied()
            .collect();
        let stored = save(&store, "kept", &kept).unwrap().images[0].new_chunks;
        assert!(stored <= support::left_out(), "{stored}");
        store.rm("base").unwrap();
        let collected = store.gc(&GcOptions::default()).unwrap();
        assert_eq!(collected.packs_shrunk, 1);
        let after = pack_bytes(&backend);
        assert!(after < before / 3, "{position}: {before} to {after}");
        let report = store.fsck().unwrap();
        assert!(report.problems.is_empty(), "{report:?}");
        let store = Store::open(backend, options()).unwrap();
        assert!(load(&store, "kept").unwrap() == kept);
    }
}

#[test]
fn what_is_called_like_no_pack_is_not_counted() {
    let backend = Memory::new();
    let store = create(backend.clone());
    save(&store, "a", &[7; 4096]).unwrap();
    let draft = backend.draft().unwrap();
    draft.publish(Area::Packs, "note", Publish::New).unwrap();
    assert_eq!(store.gc(&GcOptions::default()).unwrap().packs, 1);
}

/// A store of five packs of which nothing is needed and five of which hardly anything is; gives what is needed.
fn much_garbage() -> (Memory, Vec<(String, Vec<u8>)>) {
    let backend = Memory::new();
    let store = create(backend.clone());
    let mut kept = Vec::new();
    for seed in 0..5 {
        save(&store, &format!("dead{seed}"), &unique(100 + seed)).unwrap();
        let hardly = unique(200 + seed);
        save(&store, &format!("hardly{seed}"), &hardly).unwrap();
        let (name, some) = (format!("kept{seed}"), hardly[..40 * 4096].to_vec());
        save(&store, &name, &some).unwrap();
        kept.push((name, some));
        store.rm(&format!("dead{seed}")).unwrap();
        store.rm(&format!("hardly{seed}")).unwrap();
    }
    assert!(backend.list(Area::Packs).unwrap().len() >= 10);
    (backend, kept)
}

/// 200 pages that no image of another seed has.
fn unique(seed: u64) -> Vec<u8> {
    let mut image = vec![0; 200 * 4096];
    for (page, number) in image.chunks_mut(4096).zip(0..) {
        fill_page(page, seed << 32 | number);
    }
    image
}

fn check_kept(store: &Store, kept: &[(String, Vec<u8>)]) {
    for (name, image) in kept {
        assert!(load(store, name).unwrap() == *image, "{name}");
    }
}

#[test]
fn what_is_dead_goes_though_there_is_no_space_to_shrink_the_rest() {
    let (backend, kept) = much_garbage();
    let no_space = |call: &Call<'_>| match call {
        Call::Publish(Area::Packs, _) => Err(ErrorKind::StorageFull.into()),
        _ => Ok(()),
    };
    let full = Hooked::new(backend.clone(), no_space);
    let store = Store::open(full, options()).unwrap();
    let before = pack_bytes(&backend);
    let failed = store.gc(&GcOptions::default()).unwrap_err();
    let Error::CollectedInPart { bytes, source } = &failed else {
        panic!("{failed:?}");
    };
    assert!(matches!(**source, Error::NoSpace(_)), "{source:?}");
    assert_eq!(before - pack_bytes(&backend), *bytes);
    assert_eq!(backend.list(Area::Packs).unwrap().len(), 5);
    check_kept(&store, &kept);
    // The index knows nothing of what went.
    let again = save(&create_beside(&backend), "again", &unique(100)).unwrap();
    assert_eq!(again.images[0].new_chunks, 200);
    let collected = create_beside(&backend).gc(&GcOptions::default()).unwrap();
    assert_eq!(collected.packs_shrunk, 5);
    check_kept(&create_beside(&backend), &kept);
}

#[test]
fn a_damaged_frame_keeps_its_own_pack_from_being_shrunk_and_no_other() {
    let (backend, kept) = much_garbage();
    let collected = Memory::with_files(backend.files());
    create_beside(&collected).gc(&GcOptions::default()).unwrap();
    let shrunk = collected.list(Area::Packs).unwrap();
    assert_eq!(shrunk.len(), 5);
    let mut files = backend.files();
    let damaged = (Area::Packs, shrunk[0].name.clone());
    // In its first frame, which is needed.
    Arc::make_mut(files.get_mut(&damaged).unwrap())[1000] ^= 1;
    let backend = Memory::with_files(files.clone());
    let store = create_beside(&backend);
    let failed = store.gc(&GcOptions::default()).unwrap_err();
    let Error::CollectedInPart { source, .. } = &failed else {
        panic!("{failed:?}");
    };
    assert!(matches!(**source, Error::Damaged { .. }), "{source:?}");
    let left = backend.files();
    assert_eq!(left.get(&damaged), files.get(&damaged));
    for pack in &shrunk[1..] {
        let size = left[&(Area::Packs, pack.name.clone())].len() as u64;
        assert_eq!(size, pack.size);
    }
    assert_eq!(backend.list(Area::Packs).unwrap().len(), 5);
    let lost = kept.iter().filter(|(name, _)| load(&store, name).is_err());
    assert_eq!(lost.count(), 1);
}

#[test]
fn a_condemned_list_that_stays_keeps_nothing_else() {
    let (backend, kept) = much_garbage();
    let it_stays = |call: &Call<'_>| match call {
        Call::Remove(Area::Condemned, _) => Err(ErrorKind::Interrupted.into()),
        _ => Ok(()),
    };
    let store = Store::open(Hooked::new(backend.clone(), it_stays), options()).unwrap();
    let before = backend.list(Area::Index).unwrap();
    let failed = store.gc(&GcOptions::default());
    assert!(
        matches!(failed, Err(Error::CollectedInPart { .. })),
        "{failed:?}"
    );
    assert_eq!(backend.list(Area::Packs).unwrap().len(), 5);
    assert_ne!(backend.list(Area::Index).unwrap(), before, "not merged");
    create_beside(&backend).gc(&GcOptions::default()).unwrap();
    assert!(backend.list(Area::Condemned).unwrap().is_empty());
    check_kept(&create_beside(&backend), &kept);
}

fn create_beside(backend: &Memory) -> Store {
    Store::open(backend.clone(), options()).unwrap()
}

#[test]
fn what_a_running_save_refers_to_stays() {
    let backend = Memory::new();
    let store = create(backend.clone());
    let image = image(2000, 4);
    save(&store, "first", &image).unwrap();
    let mut writer = store.writer("second", None).unwrap();
    let mut memory = writer.image("memory").unwrap();
    memory.write(&image).unwrap();
    memory.finish().unwrap();
    store.rm("first").unwrap();
    assert_eq!(store.gc(&GcOptions::default()).unwrap().packs_removed, 0);
    writer.commit().unwrap();
    assert_eq!(store.gc(&GcOptions::default()).unwrap().packs_removed, 0);
    assert!(load(&store, "second").unwrap() == image);
}

#[test]
fn what_a_save_is_built_on_stays_when_it_is_removed() {
    let store = create(Memory::new());
    let image = image(2000, 4);
    save(&store, "first", &image).unwrap();
    let mut writer = store.writer("second", Some("first")).unwrap();
    store.rm("first").unwrap();
    save(&store, "first", &[1; 4096]).unwrap();
    assert_eq!(store.gc(&GcOptions::default()).unwrap().packs_removed, 0);
    assert_eq!(writer.parent_size("memory"), Some(image.len() as u64));
    let mut memory = writer.image("memory").unwrap();
    memory.keep(image.len() as u64).unwrap();
    memory.finish().unwrap();
    writer.commit().unwrap();
    store.gc(&GcOptions::default()).unwrap();
    assert!(load(&store, "second").unwrap() == image);
}

#[test]
fn a_snapshot_of_the_same_name_is_not_the_one_that_was_looked_up() {
    let store = create(Memory::new());
    save(&store, "nightly", &image(100, 4)).unwrap();
    let looked_up = store.snapshot("nightly").unwrap();
    store.rm("nightly").unwrap();
    save(&store, "nightly", &image(100, 5)).unwrap();
    let opened = looked_up.image("memory").map(drop);
    assert!(matches!(opened, Err(Error::NoSnapshot(_))), "{opened:?}");
}

#[test]
fn what_is_saved_under_the_name_of_one_that_is_being_removed_stays() {
    let backend = Memory::new();
    let store = create(backend.clone());
    save(&store, "nightly", &image(100, 4)).unwrap();
    let once = AtomicBool::new(true);
    // Who removes a snapshot has looked it up, and looks for its tags now.
    let another_is_faster = move |call: &Call<'_>| {
        if matches!(call, Call::List(Area::Tags)) && once.swap(false, Ordering::Relaxed) {
            store.rm("nightly").unwrap();
            save(&store, "nightly", &image(100, 5)).unwrap();
        }
        Ok(())
    };
    let hooked = Hooked::new(backend.clone(), another_is_faster);
    let removed = Store::open(hooked, options()).unwrap().rm("nightly");
    assert!(matches!(removed, Err(Error::NoSnapshot(_))), "{removed:?}");
    assert!(load(&create_beside(&backend), "nightly").unwrap() == image(100, 5));
}

#[test]
fn what_an_open_reader_needs_stays() {
    let store = create(Memory::new());
    let image = image(1000, 5);
    save(&store, "a", &image).unwrap();
    let reader = store.image("a", "memory").unwrap();
    store.rm("a").unwrap();
    assert_eq!(store.gc(&GcOptions::default()).unwrap().packs_removed, 0);
    let mut loaded = vec![0; image.len()];
    reader
        .load_into(&mut loaded, dedup::Zeros::AlreadyThere)
        .unwrap();
    assert!(loaded == image);
    drop(reader);
    assert_eq!(store.gc(&GcOptions::default()).unwrap().packs_removed, 1);
}

#[test]
fn an_abandoned_save_is_garbage() {
    let backend = Memory::new();
    let store = create(backend.clone());
    let mut writer = store.writer("a", None).unwrap();
    let mut memory = writer.image("memory").unwrap();
    // More than a pack, so that one is published.
    memory.write(&image(40_000, 6)).unwrap();
    memory.finish().unwrap();
    drop(writer);
    assert!(!backend.list(Area::Packs).unwrap().is_empty());
    store.gc(&GcOptions::default()).unwrap();
    assert!(backend.list(Area::Packs).unwrap().is_empty());
    assert!(matches!(
        store.image("a", "memory"),
        Err(Error::NoSnapshot(_))
    ));
}

/// A hit in a condemned pack is a miss: the protocol's other half.
#[test]
fn nobody_refers_to_what_is_condemned() {
    let backend = Memory::new();
    let store = create(backend.clone());
    let image = image(500, 7);
    save(&store, "a", &image).unwrap();
    let packs = backend.list(Area::Packs).unwrap();
    let id: Vec<u8> = (0..16)
        .map(|byte| u8::from_str_radix(&packs[0].name[byte * 2..byte * 2 + 2], 16).unwrap())
        .collect();
    let mut list = b"DEDUPCON".to_vec();
    list.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
    list.extend_from_slice(&id);
    let digest = blake3::hash(&list);
    list.extend_from_slice(&digest.as_bytes()[..16]);
    let mut draft = backend.draft().unwrap();
    draft.append(&list).unwrap();
    draft
        .publish(Area::Condemned, "list", Publish::New)
        .unwrap();

    let unknown = save(&store, "b", &image).unwrap();
    assert_eq!(
        unknown.images[0].known_chunks,
        save(&create(Memory::new()), "b", &image).unwrap().images[0].known_chunks
    );
    // Also what is kept unseen from a parent is stored again.
    let mut writer = store.writer("c", Some("a")).unwrap();
    let mut memory = writer.image("memory").unwrap();
    memory.keep(image.len() as u64).unwrap();
    memory.finish().unwrap();
    writer.commit().unwrap();
    // The next collection knows that the list is a dead one's.
    store.rm("a").unwrap();
    assert_eq!(store.gc(&GcOptions::default()).unwrap().packs_removed, 1);
    assert!(backend.list(Area::Condemned).unwrap().is_empty());
    assert!(load(&store, "b").unwrap() == image && load(&store, "c").unwrap() == image);
}

#[test]
fn an_unreadable_snapshot_stops_the_collection() {
    let backend = Memory::new();
    let store = create(backend.clone());
    save(&store, "a", &image(300, 8)).unwrap();
    save(&store, "b", &image(300, 9)).unwrap();
    store.rm("b").unwrap();
    let intact = backend.files()[&(Area::Snapshots, "a".to_owned())].to_vec();
    let before = backend.list(Area::Packs).unwrap();
    for at in 0..intact.len() {
        let mut damaged = intact.clone();
        damaged[at] ^= 0x10;
        let mut draft = backend.draft().unwrap();
        draft.append(&damaged).unwrap();
        draft
            .publish(Area::Snapshots, "a", Publish::Replace)
            .unwrap();
        assert!(store.gc(&GcOptions::default()).is_err(), "byte {at}");
        assert_eq!(backend.list(Area::Packs).unwrap(), before);
    }
}

#[test]
fn one_collection_at_a_time() {
    let backend = Memory::new();
    let store = create(backend.clone());
    let lock = backend.try_lock(Lock::Gc).unwrap();
    assert!(matches!(
        store.gc(&GcOptions::default()),
        Err(Error::Busy(_))
    ));
    assert!(matches!(store.fsck(), Err(Error::Busy(_))));
    drop(lock);
    store.gc(&GcOptions::default()).unwrap();
}

#[test]
fn names_tags_and_ids_find_snapshots() {
    let store = create(Memory::new());
    let a = save(&store, "a", &image(10, 10)).unwrap();
    save(&store, "b", &image(10, 11)).unwrap();
    store.tag("a", "gold").unwrap();
    for reference in ["a", "gold", &a.id.to_string(), &a.id.to_string()[..8]] {
        assert_eq!(store.show(reference).unwrap().id, a.id, "{reference}");
    }
    assert_eq!(store.show("a").unwrap().tags, ["gold"]);
    assert!(matches!(save(&store, "a", &[]), Err(Error::NameTaken(_))));
    assert!(matches!(
        save(&store, "gold", &[]),
        Err(Error::NameTaken(_))
    ));
    assert!(matches!(store.tag("a", "b"), Err(Error::NameTaken(_))));
    assert!(matches!(store.tag("a", "../b"), Err(Error::Name(_))));
    assert!(matches!(store.show("../a"), Err(Error::NoSnapshot(_))));
    store.tag("b", "gold").unwrap();
    assert_eq!(store.show("gold").unwrap().name, "b");
    store.rm("gold").unwrap();
    assert!(matches!(store.show("gold"), Err(Error::NoSnapshot(_))));
    store.tag("a", "silver").unwrap();
    store.rm("a").unwrap();
    for gone in ["a", "silver", &a.id.to_string()] {
        assert!(
            matches!(store.show(gone), Err(Error::NoSnapshot(_))),
            "{gone}"
        );
    }
    assert_eq!(store.log().unwrap().len(), 1);
}

#[test]
fn differences_are_found_without_reading_chunks() {
    let backend = Memory::new();
    let store = create(backend.clone());
    let old = image(5000, 12);
    save(&store, "old", &old).unwrap();
    let mut new = old.clone();
    touch(&mut new, 50, 13);
    new.extend_from_slice(&[1; 5000]);
    save(&store, "new", &new).unwrap();
    let mut expected = Vec::new();
    for at in (0..new.len()).step_by(4096) {
        let end = (at + 4096).min(new.len());
        if old.get(at..end) != Some(&new[at..end]) {
            match expected.last_mut() {
                Some(std::ops::Range { end: last, .. }) if *last == at as u64 => *last = end as u64,
                _ => expected.push(at as u64..end as u64),
            }
        }
    }
    let diff = store.diff("old", "new").unwrap().remove(0);
    assert_eq!(diff.changed, expected);
    assert_eq!(
        (diff.old_size, diff.new_size),
        (Some(old.len() as u64), Some(new.len() as u64))
    );
    assert!(store.diff("new", "new").unwrap()[0].changed.is_empty());
}

#[test]
fn zeros_at_the_end_are_a_difference() {
    let store = create(Memory::new());
    for (name, len) in [("short", 5000), ("long", 5100), ("filled-up", 8192)] {
        save(&store, name, &image(2, 3)[..len]).unwrap();
    }
    let mut grown = image(2, 3)[..5000].to_vec();
    grown.extend_from_slice(&[0; 100]);
    save(&store, "grown", &grown).unwrap();
    let changed = |old, new| store.diff(old, new).unwrap().remove(0).changed;
    let all_but_the_first = |end: u64| std::iter::once(4096..end);
    let grown = all_but_the_first(5100);
    assert!(changed("short", "grown").into_iter().eq(grown.clone()));
    assert!(changed("grown", "short").into_iter().eq(grown));
    let filled_up = all_but_the_first(8192);
    assert!(changed("short", "filled-up").into_iter().eq(filled_up));
    assert!(changed("short", "short").is_empty());
}

#[test]
fn what_only_one_image_has_is_a_difference_though_it_is_zeros() {
    let store = create(Memory::new());
    save(&store, "long", &[0; 4 << 20]).unwrap();
    save(&store, "short", &[0; 40 << 10]).unwrap();
    for (old, new) in [("long", "short"), ("short", "long")] {
        let changed = store.diff(old, new).unwrap().remove(0).changed;
        let rest = std::iter::once(40 << 10..4 << 20);
        assert!(changed.clone().into_iter().eq(rest), "{changed:?}");
    }
}

#[test]
fn equal_chunks_in_two_places_are_no_difference() {
    let backend = Memory::new();
    let store = create(backend.clone());
    let image = image(600, 14);
    // Two writers at once store the same chunks twice.
    let mut writers: Vec<_> = ["a", "b"]
        .map(|name| store.writer(name, None).unwrap())
        .into();
    for writer in &mut writers {
        let mut memory = writer.image("memory").unwrap();
        memory.write(&image).unwrap();
        memory.finish().unwrap();
    }
    writers
        .into_iter()
        .for_each(|writer| drop(writer.commit().unwrap()));
    assert_eq!(backend.list(Area::Packs).unwrap().len(), 2);
    assert!(store.diff("a", "b").unwrap()[0].changed.is_empty());
    store.rm("a").unwrap();
    store.gc(&GcOptions::default()).unwrap();
    assert!(load(&store, "b").unwrap() == image);
}
