//! Every backend obeys the same rules.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

mod support;

use std::io::ErrorKind;

use dedup::{
    Error, GcOptions, Store,
    backend::{Backend, Fault, Faulty, LocalDir, Memory, conformance},
};
use support::{create, load, options, save};

const NEVER: Fault = Fault {
    after_writes: u64::MAX,
    times: 0,
    kind: ErrorKind::Other,
};

#[test]
fn a_local_directory_conforms() {
    let dir = tempfile::tempdir().unwrap();
    conformance::check(&LocalDir::create(dir.path().join("store")).unwrap()).unwrap();
}

#[test]
fn memory_conforms() {
    conformance::check(&Memory::new()).unwrap();
}

#[test]
fn a_backend_whose_fault_has_not_come_conforms() {
    conformance::check(&Faulty::new(Memory::new(), NEVER)).unwrap();
}

#[test]
fn a_backend_that_fails_does_not_conform() {
    let healthy = Faulty::new(Memory::new(), NEVER);
    conformance::check(&healthy).unwrap();
    for after_writes in 0..healthy.writes() {
        let fault = Fault {
            after_writes,
            times: 1,
            kind: ErrorKind::StorageFull,
        };
        assert!(
            conformance::check(&Faulty::new(Memory::new(), fault)).is_err(),
            "write {after_writes}"
        );
    }
}

#[test]
fn what_a_dead_process_left_is_cleared() {
    let dir = tempfile::tempdir().unwrap();
    let backend = LocalDir::create(dir.path()).unwrap();
    // Not locked by anybody, as after the kernel has dropped a dead process's locks.
    std::fs::write(dir.path().join("tmp/draft"), "half").unwrap();
    std::fs::write(dir.path().join("leases/lease"), [0; 16]).unwrap();
    assert!(backend.leases().unwrap().is_empty());
    let _living = backend.lease().unwrap();
    assert_eq!(backend.clear_dead().unwrap(), 2);
    assert_eq!(backend.leases().unwrap().len(), 1);
}

/// Whoever can write to a store must not be able to hang or to kill who uses it.
#[test]
fn files_that_are_none_or_have_no_end_are_found_out() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let store = create(LocalDir::create(root).unwrap());
    save(&store, "monday", &vec![7; 3 * 4096]).unwrap();
    for place in ["tmp/x", "leases/x", "snapshots/x", "packs/x", "condemned/x"] {
        let mut mkfifo = std::process::Command::new("mkfifo");
        let made = mkfifo.arg(root.join(place)).status();
        assert!(made.unwrap().success());
    }
    std::fs::create_dir(root.join("leases/directory")).unwrap();
    let refused = store.image("x", "memory").map(drop);
    assert!(matches!(refused, Err(Error::Io { .. })), "{refused:?}");
    store.gc(&GcOptions::default()).unwrap();
    std::fs::remove_file(root.join("snapshots/x")).unwrap();

    let endless = std::fs::File::create(root.join("condemned/endless")).unwrap();
    endless.set_len(8 << 40).unwrap();
    let problems = store.fsck().unwrap().problems;
    assert!(
        problems
            .iter()
            .any(|problem| problem.file == "condemned/endless")
    );
    // Whatever it is, it may name any pack: nothing is taken from there, and all is stored again.
    let again = save(
        &Store::open(LocalDir::new(root), options()).unwrap(),
        "again",
        &vec![7; 3 * 4096],
    );
    assert_eq!(again.unwrap().images[0].new_chunks, 1);
    // Nor is it removed: not all of it could be kept.
    store.repair().unwrap();
    assert!(root.join("condemned/endless").exists());
    assert!(load(&store, "monday").unwrap() == vec![7; 3 * 4096]);
}

/// A file that was moved elsewhere and linked to is not read while nobody counts what it needs.
#[test]
fn a_link_is_an_error_to_who_reads_and_to_who_lists() {
    let dir = tempfile::tempdir().unwrap();
    let (root, linked) = (dir.path().join("store"), dir.path().join("linked"));
    std::os::unix::fs::symlink(&root, &linked).unwrap();
    save(
        &create(LocalDir::create(&root).unwrap()),
        "monday",
        &[7; 4096],
    )
    .unwrap();
    let store = Store::open(LocalDir::new(&linked), options()).unwrap();
    store.tag("monday", "gold").unwrap();
    let pack = std::fs::read_dir(root.join("packs")).unwrap().next();
    let pack = pack.unwrap().unwrap().file_name().into_string().unwrap();
    let says_what_to_do = |outcome: dedup::Result<()>| {
        let error = outcome.unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("put the file that it leads to"), "{cause}");
    };
    for file in [
        "snapshots/monday".to_owned(),
        "tags/gold".to_owned(),
        format!("packs/{pack}"),
    ] {
        // Through a link to the whole of it, the store is one.
        let store = Store::open(LocalDir::new(&linked), options()).unwrap();
        assert!(load(&store, "gold").unwrap() == [7; 4096]);
        let (there, elsewhere) = (root.join(&file), dir.path().join("elsewhere"));
        std::fs::rename(&there, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &there).unwrap();
        let store = Store::open(LocalDir::new(&root), options()).unwrap();
        says_what_to_do(load(&store, "gold").map(drop));
        if file.starts_with("tags") {
            assert!(store.fsck().is_err());
        } else {
            says_what_to_do(store.gc(&GcOptions::default()).map(drop));
        }
        std::fs::remove_file(&there).unwrap();
        std::fs::rename(&elsewhere, &there).unwrap();
    }
    // Where it takes none, nobody knows what a link is either.
    for file in ["leases/link", "tmp/link"] {
        std::os::unix::fs::symlink(&root, root.join(file)).unwrap();
        let store = Store::open(LocalDir::new(&root), options()).unwrap();
        says_what_to_do(store.gc(&GcOptions::default()).map(drop));
        std::fs::remove_file(root.join(file)).unwrap();
    }
    // So may its areas be elsewhere.
    std::fs::rename(root.join("packs"), dir.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), root.join("packs")).unwrap();
    let store = Store::open(LocalDir::new(&root), options()).unwrap();
    store.gc(&GcOptions::default()).unwrap();
    assert!(load(&store, "monday").unwrap() == [7; 4096]);
}

/// Removes the directories of a store that are empty, as whoever copies it may.
fn without_empty_directories(store: &std::path::Path) -> usize {
    let mut removed = 0;
    for entry in std::fs::read_dir(store).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            // It fails where there is anything.
            removed += usize::from(std::fs::remove_dir(path).is_ok());
        }
    }
    removed
}

#[test]
fn a_store_that_has_lost_its_empty_directories_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    drop(create(LocalDir::create(root).unwrap()));
    assert!(without_empty_directories(root) >= 8);
    let open = || Store::open(LocalDir::new(root), options()).unwrap();
    assert!(open().list().unwrap().snapshots.is_empty());
    assert!(open().fsck().unwrap().problems.is_empty());
    open().gc(&GcOptions::default()).unwrap();

    let image = vec![7; 3 * 4096];
    without_empty_directories(root);
    save(&open(), "monday", &image).unwrap();
    for _ in 0..2 {
        assert!(without_empty_directories(root) > 0);
        let store = open();
        assert!(load(&store, "monday").unwrap() == image);
        store.tag("monday", "gold").unwrap();
        store.gc(&GcOptions::default()).unwrap();
        assert!(store.fsck().unwrap().problems.is_empty());
    }
}

#[test]
fn packs_whose_snapshots_are_all_gone_are_not_collected() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    save(
        &create(LocalDir::create(root).unwrap()),
        "monday",
        &vec![7; 4096],
    )
    .unwrap();
    std::fs::rename(root.join("snapshots"), root.join("elsewhere")).unwrap();
    let store = Store::open(LocalDir::new(root), options()).unwrap();
    // Nor is another snapshot saved, which would then be the only one.
    assert!(save(&store, "tuesday", &[8; 4096]).is_err());
    assert!(!root.join("snapshots").exists());
    let refused = store.gc(&GcOptions::default()).unwrap_err();
    let words = format!("{refused}: {:?}", std::error::Error::source(&refused));
    assert!(words.contains("no directory `snapshots`"), "{words}");
    assert_eq!(std::fs::read_dir(root.join("packs")).unwrap().count(), 1);
    std::fs::rename(root.join("elsewhere"), root.join("snapshots")).unwrap();
    assert!(load(&store, "monday").unwrap() == vec![7; 4096]);
    // The other way round, and where only a tag is left.
    std::fs::rename(root.join("packs"), root.join("elsewhere")).unwrap();
    assert!(store.fsck().is_err());
    assert!(save(&store, "wednesday", &[9; 4096]).is_err());
    assert!(!root.join("packs").exists());
    store.tag("monday", "gold").unwrap();
    std::fs::rename(root.join("snapshots"), root.join("also")).unwrap();
    assert!(store.gc(&GcOptions::default()).is_err());
}
