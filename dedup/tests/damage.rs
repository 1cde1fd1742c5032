//! Every flipped bit is found and the snapshots it hits are named; what is whole survives the repair.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

mod support;

use std::ops::Range;
use std::sync::Arc;

use dedup::backend::{Area, Backend, Files, LocalDir, Memory, Publish};
use dedup::{Error, Report, Store, repair_config};
use support::hooked::{Call, Hooked};
use support::{annotate, create, fill_page, image, load, options, save};

/// A store with every kind of file, and the images in it.
fn some_store() -> (Files, Vec<(String, Vec<u8>)>) {
    let backend = Memory::new();
    let store = create(backend.clone());
    let mut images = Vec::new();
    for (name, seed) in [("a", 1), ("b", 2)] {
        let mut image = vec![0; 5 * 4096];
        for (page, number) in image.chunks_mut(4096).zip(0u64..4) {
            // The first page is common to both.
            fill_page(
                &mut page[..300],
                if number == 0 { 77 } else { seed * 10 + number },
            );
        }
        save(&store, name, &image).unwrap();
        images.push((name.to_owned(), image));
    }
    store.tag("a", "gold").unwrap();
    annotate(&store, "a", "note", b"learned later").unwrap();
    (backend.files(), images)
}

fn open(files: Files) -> dedup::Result<Store> {
    Store::open(Memory::with_files(files), options())
}

/// Each image comes back as it was, or not at all; gives the names of those that do not.
fn unreadable(store: &Store, images: &[(String, Vec<u8>)]) -> Vec<String> {
    let lost = images
        .iter()
        .filter(|(name, image)| match load(store, name) {
            Ok(loaded) => {
                assert!(loaded == *image, "{name} has other bytes");
                false
            }
            Err(_) => true,
        });
    lost.map(|(name, _)| name.clone()).collect()
}

/// Flips a bit of a snapshot's file.
fn flip(files: &mut Files, name: &str, at: usize) {
    let file = files.get_mut(&(Area::Snapshots, name.to_owned())).unwrap();
    let mut damaged = file.to_vec();
    damaged[at] ^= 4;
    *file = Arc::new(damaged);
}

#[test]
fn a_snapshot_that_cannot_be_read_does_not_hide_the_others() {
    let (mut files, _) = some_store();
    let last = files[&(Area::Snapshots, "a".to_owned())].len() - 1;
    flip(&mut files, "a", last);
    let store = open(files).unwrap();
    let listing = store.list().unwrap();
    let [readable] = listing.snapshots.as_slice() else {
        panic!("{listing:?}")
    };
    assert_eq!(readable.name, "b");
    let [unreadable] = listing.unreadable.as_slice() else {
        panic!("{listing:?}")
    };
    assert_eq!(unreadable.name, "a");
    assert!(matches!(unreadable.error, Error::Damaged { .. }));
    assert!(store.log().is_err());
    assert_eq!(store.stat().unwrap().snapshots, 1);
}

/// What a guest has in its memory may look like a frame: it must not become one when the frame around it is damaged.
#[test]
fn a_frame_within_a_damaged_frame_is_not_taken_for_the_packs_own() {
    if support::key().is_some() {
        return; // Sealed frames are of one pack.
    }
    let backend = Memory::new();
    let create = dedup::CreateOptions {
        level: 0,
        ..support::create_options()
    };
    let store = Store::create(backend.clone(), &create, options()).unwrap();
    // Four frames of four pages. In the third is one that says that it is the first.
    let mut image = vec![0; 16 * 4096];
    for (page, seed) in image.chunks_mut(4096).zip(1..) {
        fill_page(page, seed);
    }
    let mut forged = vec![0xF5, 0, 1, 0, 0, 0, 0, 0, 0, 16, 0, 0];
    let content = [0xEE; 4096];
    let digest = xxhash_rust::xxh64::xxh64(&[forged.as_slice(), &content].concat(), 0);
    forged.extend(digest.to_le_bytes());
    forged.extend(content);
    image[10 * 4096 + 100..][..forged.len()].copy_from_slice(&forged);
    save(&store, "a", &image).unwrap();

    let mut files = backend.files();
    let pack = files.iter_mut().find(|((area, _), _)| *area == Area::Packs);
    let bytes = pack.unwrap().1;
    let mut damaged = bytes.to_vec();
    let page = &image[9 * 4096..10 * 4096];
    let at = damaged
        .windows(4096)
        .position(|bytes| bytes == page)
        .unwrap();
    damaged[at] ^= 1;
    *bytes = Arc::new(damaged);

    let store = open(files).unwrap();
    assert!(!store.repair().unwrap().repaired.is_empty());
    let reader = store.image("a", "memory").unwrap();
    let mut first = vec![0; 4 * 4096];
    reader.read_at(0, &mut first).unwrap();
    assert!(first == image[..4 * 4096]);
    assert!(load(&store, "a").is_err());
}

/// A parent is to make a save faster: where its recipe cannot be read, chunks are looked for elsewhere.
#[test]
fn a_parent_with_a_damaged_recipe_is_no_reason_not_to_save() {
    let (mut files, images) = some_store();
    // The first byte of the first block, behind the header.
    flip(&mut files, "a", 16);
    let store = open(files).unwrap();
    assert!(load(&store, "a").is_err());
    let mut writer = store.writer("c", Some("a")).unwrap();
    let mut memory = writer.image("memory").unwrap();
    memory.write(&images[0].1).unwrap();
    let stats = memory.finish().unwrap();
    assert_eq!(stats.new_chunks, 0);
    writer.commit().unwrap();
    assert!(load(&store, "c").unwrap() == images[0].1);
    // What is kept unseen is only there.
    let mut writer = store.writer("d", Some("a")).unwrap();
    let mut memory = writer.image("memory").unwrap();
    let kept = memory.keep(4096).and_then(|()| memory.finish());
    assert!(matches!(kept, Err(Error::Damaged { .. })));
}

fn named(report: &Report) -> Vec<String> {
    let mut names: Vec<String> = report
        .problems
        .iter()
        .flat_map(|problem| problem.snapshots.clone())
        .collect();
    names.sort();
    names.dedup();
    names
}

/// One bit of each byte, or all with `DEDUP_EVERY_BIT`.
fn flips(len: usize) -> Vec<usize> {
    let step = if std::env::var_os("DEDUP_EVERY_BIT").is_some() {
        1
    } else {
        8
    };
    (0..len * 8)
        .step_by(step)
        .map(|bit| bit + if step == 8 { bit / 8 % 8 } else { 0 })
        .collect()
}

#[test]
fn every_flipped_bit_is_found() {
    let (files, images) = some_store();
    assert!(
        open(files.clone())
            .unwrap()
            .fsck()
            .unwrap()
            .problems
            .is_empty()
    );
    for ((area, name), content) in &files {
        for bit in flips(content.len()) {
            let mut damaged = content.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let mut files = files.clone();
            files.insert((*area, name.clone()), Arc::new(damaged));
            let what = format!("bit {bit} of {}", area.path(name));
            let Ok(store) = open(files) else {
                assert_eq!(*area, Area::Root, "{what}");
                continue;
            };
            let report = store.fsck().unwrap();
            assert!(
                report
                    .problems
                    .iter()
                    .any(|problem| problem.file == area.path(name)),
                "{what}: {report:?}"
            );
            let lost = unreadable(&store, &images);
            let named = named(&report);
            assert!(
                lost.iter().all(|name| named.contains(name)),
                "{what}: {lost:?} are lost, {named:?} are named"
            );
        }
    }
}

#[test]
fn every_cut_file_is_found() {
    let (files, images) = some_store();
    for ((area, name), content) in files.iter().filter(|((area, _), _)| *area != Area::Root) {
        for len in (0..content.len()).step_by(7) {
            let mut files = files.clone();
            files.insert((*area, name.clone()), Arc::new(content[..len].to_vec()));
            let store = open(files).unwrap();
            let report = store.fsck().unwrap();
            assert!(
                !report.problems.is_empty(),
                "{} cut to {len}",
                area.path(name)
            );
            let named = named(&report);
            assert!(
                unreadable(&store, &images)
                    .iter()
                    .all(|name| named.contains(name))
            );
        }
    }
}

#[test]
fn a_missing_pack_is_found() {
    let (files, images) = some_store();
    for (key, _) in files.iter().filter(|((area, _), _)| *area == Area::Packs) {
        let mut files = files.clone();
        files.remove(key);
        let store = open(files).unwrap();
        let report = store.fsck().unwrap();
        assert_eq!(report.problems.len(), 1);
        assert!(report.problems[0].what.contains("missing"));
        assert_eq!(named(&report), unreadable(&store, &images));
    }
}

#[test]
fn what_is_whole_survives_the_repair() {
    let (files, images) = some_store();
    for ((area, name), content) in files.iter().filter(|((area, _), _)| *area != Area::Root) {
        for bit in flips(content.len()).into_iter().step_by(11) {
            let mut damaged = content.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let mut files = files.clone();
            files.insert((*area, name.clone()), Arc::new(damaged));
            let what = format!("bit {bit} of {}", area.path(name));
            let backend = Memory::with_files(files);
            let store = Store::open(backend.clone(), options()).unwrap();
            let before = unreadable(&store, &images);
            let report = store.repair().unwrap();
            assert!(!report.repaired.is_empty());
            let after = unreadable(&store, &images);
            assert!(
                after.iter().all(|name| before.contains(name)),
                "{what}: lost by repair"
            );
            // What is still wrong is what cannot be brought back.
            let remaining = store.fsck().unwrap();
            for problem in &remaining.problems {
                assert!(!problem.snapshots.is_empty(), "{what}: {problem:?}");
            }
            // Nothing refers to what is lost any more: saving it again brings it back.
            for (name, image) in &images {
                save(&store, &format!("{name}-again"), image).unwrap();
                assert!(
                    load(&store, &format!("{name}-again")).unwrap() == *image,
                    "{what}"
                );
            }
            if *area != Area::Index {
                assert!(
                    !backend.list(Area::Damaged).unwrap().is_empty(),
                    "{what}: no copy was kept"
                );
            }
        }
    }
}

#[test]
fn a_damaged_chunk_is_healed_from_another_pack() {
    let backend = Memory::new();
    let store = create(backend.clone());
    let image = image(100, 3);
    // Two writers at once store the same twice.
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
    let mut files = backend.files();
    let (_, pack) = files
        .iter_mut()
        .find(|((area, _), _)| *area == Area::Packs)
        .unwrap();
    Arc::make_mut(pack)[5000] ^= 1;
    let store = open(files).unwrap();
    assert_eq!(store.fsck().unwrap().problems.len(), 1);
    store.repair().unwrap();
    assert!(store.fsck().unwrap().problems.is_empty());
    assert!(load(&store, "a").unwrap() == image && load(&store, "b").unwrap() == image);
}

/// Two snapshots of writers at work at the same time: `all` has four pages, which are a frame, and `one` the last of them in
/// a pack of its own. The pack with all of them is damaged.
fn one_of_a_frame_is_elsewhere() -> (Files, Vec<u8>) {
    let backend = Memory::new();
    let store = create(backend.clone());
    let mut pages = vec![0; 4 * 4096];
    for (page, seed) in pages.chunks_mut(4096).zip(50..) {
        fill_page(page, seed);
    }
    let mut all = store.writer("all", None).unwrap();
    let mut one = store.writer("one", None).unwrap();
    for (writer, bytes) in [(&mut all, &pages[..]), (&mut one, &pages[3 * 4096..])] {
        let mut memory = writer.image("memory").unwrap();
        memory.write(bytes).unwrap();
        memory.finish().unwrap();
    }
    all.commit().unwrap();
    let (_, pack) = (backend.files().into_iter())
        .find(|((area, _), _)| *area == Area::Packs)
        .unwrap();
    one.commit().unwrap();
    let mut files = backend.files();
    let mut damaged = pack.to_vec();
    damaged[1000] ^= 1;
    let whole = files.values_mut().find(|file| **file == pack);
    *whole.unwrap() = Arc::new(damaged);
    (files, pages)
}

#[test]
fn what_a_repair_could_not_heal_is_not_there_and_not_zeros() {
    let (files, pages) = one_of_a_frame_is_elsewhere();
    let store = open(files).unwrap();
    store.repair().unwrap();
    assert_eq!(named(&store.fsck().unwrap()).len(), 1);
    let not_there = |outcome: dedup::Result<()>| {
        let error = outcome.unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
    };
    not_there(load(&store, "all").map(drop));
    let image = store.image("all", "memory").unwrap();
    let directory = tempfile::tempdir().unwrap();
    not_there(image.load_file(&directory.path().join("file")));
    let mut parts = image.part_reader().unwrap();
    let put = |_, _: &[u8]| Ok::<_, Error>(());
    not_there(parts.read(0, |_| true, put));
    for (page, number) in pages.chunks(4096).zip(0u64..) {
        let offset = number * 4096;
        let mut read = vec![7; 4096];
        let outcome = image.read_at(offset, &mut read);
        if number < 3 {
            not_there(outcome);
        } else {
            outcome.unwrap();
            assert!(read == page);
        }
        // All of the frame is around it.
        not_there(image.around(offset).map(drop));
        let piece = image.pieces(&[offset]).unwrap().remove(0);
        not_there(parts.read_piece(&piece).map(drop));
    }
    assert!(load(&store, "one").unwrap() == pages[3 * 4096..]);
}

#[test]
fn a_lost_index_does_not_keep_a_repair_from_healing() {
    let (mut files, pages) = one_of_a_frame_is_elsewhere();
    files.retain(|(area, _), _| *area != Area::Index);
    let store = open(files).unwrap();
    store.repair().unwrap();
    let image = store.image("all", "memory").unwrap();
    let mut read = vec![0; 4096];
    image.read_at(3 * 4096, &mut read).unwrap();
    assert!(read == pages[3 * 4096..]);
}

/// Chunks are found by their identities, in frames that a save does not read.
#[test]
fn a_save_that_has_found_chunks_in_what_is_repaired_meanwhile_does_not_succeed_without_them() {
    let (files, pages) = one_of_a_frame_is_elsewhere();
    let backend = Memory::with_files(files);
    let store = Store::open(backend.clone(), options()).unwrap();
    let begin = |name| {
        let mut writer = store.writer(name, None).unwrap();
        let mut memory = writer.image("memory").unwrap();
        memory.write(&pages).unwrap();
        assert!(memory.finish().unwrap().known_chunks > 0);
        writer
    };
    let writer = begin("new");
    Store::open(backend, options()).unwrap().repair().unwrap();
    let saved = writer.commit();
    assert!(matches!(saved, Err(Error::Repaired)), "{saved:?}");
    begin("new").commit().unwrap();
    assert!(load(&store, "new").unwrap() == pages);
}

#[test]
fn each_repair_keeps_a_copy_of_what_it_found() {
    let (files, _) = some_store();
    let backend = Memory::with_files(files);
    let store = Store::open(backend.clone(), options()).unwrap();
    for round in 1..=3 {
        let mut draft = backend.draft().unwrap();
        draft.append(b"no snapshot").unwrap();
        draft.publish(Area::Snapshots, "x", Publish::New).unwrap();
        store.repair().unwrap();
        assert_eq!(backend.list(Area::Damaged).unwrap().len(), round);
        assert!(store.fsck().unwrap().problems.is_empty());
    }
}

/// What a newer release has written is whole as far as this one knows, and so are its tags.
#[test]
fn the_tags_of_a_newer_snapshot_stay() {
    let (mut files, _) = some_store();
    let file = files.get_mut(&(Area::Snapshots, "a".to_owned())).unwrap();
    let mut newer = file.to_vec();
    let trailer = newer.len() - 48;
    for at in [8, trailer + 12] {
        newer[at..at + 4].copy_from_slice(&99_u32.to_le_bytes());
    }
    *file = Arc::new(newer);
    let backend = Memory::with_files(files);
    let store = Store::open(backend.clone(), options()).unwrap();
    let refused = store.image("a", "memory").map(drop).unwrap_err();
    assert!(matches!(refused, Error::NewerFile { found: 99, .. }));
    // It is not the store that is newer.
    let said = refused.to_string();
    assert!(said.starts_with("snapshots/a has format"), "{said}");
    let report = store.repair().unwrap();
    let what = &report.problems[0].what;
    assert!(what.starts_with("it has format version 99"), "{what}");
    let names = |area| backend.list(area).unwrap().len();
    assert_eq!((names(Area::Snapshots), names(Area::Tags)), (2, 1));
}

/// A report names each file once, and does not send anybody to where it comes from.
#[test]
fn a_report_does_not_advise_the_check_that_it_is_of() {
    let (mut files, _) = some_store();
    let areas = [
        Area::Packs,
        Area::Snapshots,
        Area::Tags,
        Area::Annotations,
        Area::Index,
    ];
    for ((area, _), file) in &mut files {
        if areas.contains(area) {
            let mut damaged = file.to_vec();
            damaged.truncate(file.len() - 1);
            *file = Arc::new(damaged);
        }
    }
    let condemned = (Area::Condemned, "x".to_owned());
    files.insert(condemned, Arc::new(b"no list".to_vec()));
    let report = open(files).unwrap().fsck().unwrap();
    for area in areas.iter().chain([&Area::Condemned]) {
        let in_area = |file: &str| file.starts_with(area.dir());
        assert!(report.problems.iter().any(|found| in_area(&found.file)));
    }
    for problem in &report.problems {
        let (file, what) = (&problem.file, &problem.what);
        assert!(!what.contains("fsck"), "{file}: {what}");
        assert!(!what.contains(file), "{file}: {what}");
    }
}

#[test]
fn a_lost_config_comes_back_from_a_pack() {
    let (files, images) = some_store();
    let config = (Area::Root, "config".to_owned());
    for damage in [None, Some(vec![0; 96]), Some(Vec::new())] {
        let mut files = files.clone();
        match damage {
            Some(bytes) => drop(files.insert(config.clone(), Arc::new(bytes))),
            None => drop(files.remove(&config)),
        }
        let backend = Memory::with_files(files.clone());
        assert!(matches!(
            Store::open(backend.clone(), options()),
            Err(Error::LostConfig("packs") | Error::Damaged { .. })
        ));
        // Nor is it made anew over what it has: that would be garbage then.
        let created = Store::create(backend.clone(), &support::create_options(), options());
        assert!(matches!(
            created.map(drop),
            Err(Error::LostConfig(_) | Error::StoreExists)
        ));
        let found = repair_config(&backend).unwrap();
        assert!(repair_config(&backend).unwrap().is_none());
        let store = Store::open(backend, options()).unwrap();
        assert!(unreadable(&store, &images).is_empty());
        let report = store.repair().unwrap().after_config(found);
        assert_eq!(report.problems.len(), 1);
        assert_eq!(report.problems[0].file, "config");
        assert_eq!(report.repaired[0], "restored config from a pack");
    }
    assert!(matches!(repair_config(&Memory::new()), Err(Error::NoStore)));
    let backend = Memory::with_files(files);
    let created = Store::create(backend.clone(), &support::create_options(), options());
    assert!(matches!(created.map(drop), Err(Error::StoreExists)));
    // A store of which nothing but snapshots is left.
    backend.remove(Area::Root, "config").unwrap();
    for pack in backend.list(Area::Packs).unwrap() {
        backend.remove(Area::Packs, &pack.name).unwrap();
    }
    let created = Store::create(backend.clone(), &support::create_options(), options());
    assert!(matches!(
        created.map(drop),
        Err(Error::LostConfig("snapshots"))
    ));
    assert!(matches!(
        repair_config(&backend),
        Err(Error::NoCopyOfConfig)
    ));
}

#[test]
fn a_rebuilt_index_finds_everything() {
    let backend = Memory::new();
    let image = image(2000, 4);
    save(&create(backend.clone()), "a", &image).unwrap();
    let mut files = backend.files();
    files.retain(|(area, _), _| *area != Area::Index);
    let store = open(files).unwrap();
    store.repair().unwrap();
    let stored = save(&store, "b", &image).unwrap().images[0].new_chunks;
    assert!(stored <= support::left_out(), "{stored}");
}

/// A store with one pack, a part of which the disk has lost, whatever it is asked for of it, for as long as it is that file.
fn on_a_failing_disk(lost: Range<u64>) -> (Memory, String, Store, Vec<u8>) {
    let backend = Memory::new();
    let mut pages = vec![0; 64 * 4096];
    for (page, seed) in pages.chunks_mut(4096).zip(900..) {
        fill_page(page, seed);
    }
    save(&create(backend.clone()), "a", &pages).unwrap();
    let pack = backend.list(Area::Packs).unwrap().remove(0);
    let (memory, name) = (backend.clone(), pack.name.clone());
    let failing = Hooked::new(backend.clone(), move |call| match call {
        Call::Read(Area::Packs, name, range)
            if range.start < lost.end
                && lost.start < range.end
                && memory.open(Area::Packs, name)?.size() == pack.size =>
        {
            Err(std::io::Error::from_raw_os_error(5)) // EIO
        }
        _ => Ok(()),
    });
    let store = Store::open(failing, options()).unwrap();
    (backend, name, store, pages)
}

#[test]
fn a_sector_that_cannot_be_read_costs_its_frames_and_no_others() {
    let (backend, pack, store, pages) = on_a_failing_disk(4096..8192);
    let mut file = backend.files()[&(Area::Packs, pack.clone())].to_vec();
    assert!(load(&store, "a").is_err());
    store.repair().unwrap();
    file[4096..8192].fill(0);
    let kept = &backend.files()[&(Area::Damaged, format!("packs-{pack}"))];
    assert!(**kept == file);
    let image = store.image("a", "memory").unwrap();
    let mut read = vec![0; 4096];
    let lost = pages.chunks(4096).zip(0..).filter(|(page, number)| {
        let found = image.read_at(number * 4096, &mut read);
        assert!(found.is_err() || read == *page);
        found.is_err()
    });
    assert!((1..=16).contains(&lost.count()));
    assert_eq!(named(&store.fsck().unwrap()), ["a"]);
}

#[test]
fn a_pack_of_which_nothing_can_be_read_is_left_and_the_rest_repaired() {
    let (backend, pack, store, _) = on_a_failing_disk(0..u64::MAX);
    let before = backend.files();
    let mut draft = backend.draft().unwrap();
    draft.append(b"no snapshot").unwrap();
    draft.publish(Area::Snapshots, "x", Publish::New).unwrap();
    let repaired = store.repair().unwrap().repaired;
    let left = format!("left packs/{pack} as it is: nothing of packs-{pack} can be read");
    assert!(
        repaired.iter().any(|line| line.starts_with(&left)),
        "{repaired:?}"
    );
    assert!(
        repaired.contains(&"moved snapshots/x into damaged/".to_owned()),
        "{repaired:?}"
    );
    let key = (Area::Packs, pack);
    assert!(backend.files()[&key] == before[&key]);
}

#[test]
fn a_file_whose_name_is_too_long_to_be_moved_is_left_and_the_rest_repaired() {
    let directory = tempfile::tempdir().unwrap();
    let store = create(LocalDir::create(directory.path()).unwrap());
    save(&store, "a", &image(20, 5)).unwrap();
    let long = format!("packs/{}", "x".repeat(255));
    for stray in [long.as_str(), "packs/y", "snapshots/z"] {
        std::fs::write(directory.path().join(stray), "stray").unwrap();
    }
    let repaired = store.repair().unwrap().repaired;
    let left = format!("left {long} as it is: ");
    assert!(
        repaired.iter().any(|line| line.starts_with(&left)),
        "{repaired:?}"
    );
    let problems = store.fsck().unwrap().problems;
    assert!(
        matches!(problems.as_slice(), [problem] if problem.file == long),
        "{problems:?}"
    );
    assert!(load(&store, "a").unwrap() == image(20, 5));
}
