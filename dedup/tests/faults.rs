//! A full disk, a directory that cannot be written, what dead processes leave, stores of newer releases: a clear error
//! each, and nothing lost.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

mod support;

use std::io::ErrorKind;

use dedup::backend::{Area, Backend, Fault, Faulty, Memory, Publish};
use dedup::{Error, GcOptions, Store};
use support::{create, create_options, image, load, options, save, touch};

/// A store with a snapshot `a`.
fn some_store() -> (Memory, Vec<u8>) {
    let backend = Memory::new();
    let image = image(300, 1);
    save(&create(backend.clone()), "a", &image).unwrap();
    (backend, image)
}

fn failing(
    backend: &Memory,
    after_writes: u64,
    times: u64,
    kind: ErrorKind,
) -> (Faulty<Memory>, Store) {
    let faulty = Faulty::new(
        Memory::with_files(backend.files()),
        Fault {
            after_writes,
            times,
            kind,
        },
    );
    // One thread, so that every run has the same writes.
    let options = dedup::OpenOptions {
        threads: 1,
        ..options()
    };
    (faulty.clone(), Store::open(faulty, options).unwrap())
}

#[test]
fn a_disk_that_fills_up_anywhere_loses_nothing() {
    let (backend, image) = some_store();
    let mut changed = image.clone();
    touch(&mut changed, 40, 2);
    let (counter, store) = failing(&backend, u64::MAX, 0, ErrorKind::Other);
    save(&store, "b", &changed).unwrap();
    for after_writes in 0..counter.writes() {
        // Full for a while only, so that what comes after the failure shows.
        for times in [1, u64::MAX] {
            let (_, store) = failing(&backend, after_writes, times, ErrorKind::StorageFull);
            match save(&store, "b", &changed) {
                Ok(_) => assert!(load(&store, "b").unwrap() == changed),
                Err(Error::NoSpace(_)) => {}
                Err(other) => panic!("write {after_writes}: {other:?}"),
            }
            assert!(load(&store, "a").unwrap() == image, "write {after_writes}");
            if times == 1 {
                store.gc(&GcOptions::default()).unwrap();
                save(&store, "c", &changed).unwrap();
                assert!(
                    load(&store, "c").unwrap() == changed,
                    "write {after_writes}"
                );
                assert!(
                    store.fsck().unwrap().problems.is_empty(),
                    "write {after_writes}"
                );
            }
        }
    }
}

#[test]
fn a_collection_that_fails_anywhere_loses_nothing() {
    let (backend, image) = some_store();
    let store = create_beside(&backend);
    let mut child = image.clone();
    child[..200 * 4096].fill(0);
    save(&store, "child", &child).unwrap();
    save(&store, "other", &support::image(100, 3)).unwrap();
    store.rm("a").unwrap();
    store.rm("other").unwrap();
    let (counter, all_well) = failing(&backend, u64::MAX, 0, ErrorKind::Other);
    assert_eq!(all_well.gc(&GcOptions::default()).unwrap().packs_shrunk, 1);
    for after_writes in 0..counter.writes() {
        let (_, store) = failing(&backend, after_writes, 1, ErrorKind::StorageFull);
        let _ = store.gc(&GcOptions::default());
        assert!(
            load(&store, "child").unwrap() == child,
            "write {after_writes}"
        );
        store.gc(&GcOptions::default()).unwrap();
        assert!(
            load(&store, "child").unwrap() == child,
            "write {after_writes}"
        );
        assert!(
            store.fsck().unwrap().problems.is_empty(),
            "write {after_writes}"
        );
    }
}

fn create_beside(backend: &Memory) -> Store {
    Store::open(backend.clone(), options()).unwrap()
}

#[test]
fn a_store_that_cannot_be_written_can_be_read() {
    let (backend, image) = some_store();
    let (_, store) = failing(&backend, 0, u64::MAX, ErrorKind::PermissionDenied);
    assert!(load(&store, "a").unwrap() == image);
    assert!(store.fsck().unwrap().problems.is_empty());
    assert_eq!(store.stat().unwrap().snapshots, 1);
    assert!(matches!(save(&store, "b", &image), Err(Error::ReadOnly(_))));
    assert!(matches!(store.rm("a"), Err(Error::ReadOnly(_))));
    assert!(load(&store, "a").unwrap() == image);
}

#[test]
fn what_dead_processes_left_stops_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create_dir(dir.path(), &create_options(), options()).unwrap();
    save(&store, "a", &image(50, 4)).unwrap();
    // A lease on everything, locks and drafts: as files they stay, but nobody holds them.
    let packs: Vec<_> = std::fs::read_dir(dir.path().join("packs"))
        .unwrap()
        .collect();
    let name = packs[0]
        .as_ref()
        .unwrap()
        .file_name()
        .into_string()
        .unwrap();
    let id: Vec<u8> = (0..16)
        .map(|byte| u8::from_str_radix(&name[byte * 2..byte * 2 + 2], 16).unwrap())
        .collect();
    std::fs::write(dir.path().join("leases/dead"), id).unwrap();
    std::fs::write(dir.path().join("locks/gc"), "").unwrap();
    std::fs::write(dir.path().join("locks/index"), "").unwrap();
    std::fs::write(dir.path().join("tmp/half"), [0; 5000]).unwrap();
    store.rm("a").unwrap();
    let collected = store.gc(&GcOptions::default()).unwrap();
    assert_eq!((collected.leftovers, collected.packs_removed), (2, 1));
}

#[test]
fn a_newer_store_is_refused_and_left_alone() {
    let (backend, _) = some_store();
    let mut config = backend.files()[&(Area::Root, "config".to_owned())].to_vec();
    config[8] = 9;
    let mut draft = backend.draft().unwrap();
    draft.append(&config).unwrap();
    draft
        .publish(Area::Root, "config", Publish::Replace)
        .unwrap();
    let before = backend.files();
    let opened = Store::open(backend.clone(), options()).map(drop);
    assert!(
        matches!(opened, Err(Error::NewerStore { found: 9, .. })),
        "{opened:?}"
    );
    assert!(matches!(
        dedup::repair_config(&backend),
        Err(Error::NewerStore { .. })
    ));
    let created = Store::create(backend.clone(), &create_options(), options()).map(drop);
    assert!(matches!(created, Err(Error::StoreExists)));
    assert_eq!(backend.files(), before);
}
