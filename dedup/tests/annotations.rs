//! What is kept beside snapshots.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

mod support;

use std::io::ErrorKind;
use std::sync::Arc;

use dedup::backend::{Area, Backend, Fault, Faulty, Files, LocalDir, Memory};
use dedup::{Error, GcOptions, MAX_ANNOTATION_BYTES, Store};
use support::{annotate, annotation, create, image, options, save};

const NEVER: Fault = Fault {
    after_writes: u64::MAX,
    times: 0,
    kind: ErrorKind::Other,
};

/// What annotations do on any backend.
fn conform(backend: impl Backend + Clone) {
    let store = create(backend.clone());
    save(&store, "a", &image(5, 1)).unwrap();
    save(&store, "b", &image(5, 2)).unwrap();
    assert_eq!(annotation(&store, "a", "note").unwrap(), None);
    for content in [&b"first"[..], b"", &vec![7; MAX_ANNOTATION_BYTES]] {
        annotate(&store, "a", "note", content).unwrap();
        assert_eq!(annotation(&store, "a", "note").unwrap().unwrap(), content);
    }
    annotate(&store, "a", "other", b"apart").unwrap();
    annotate(&store, "b", "note", b"of b").unwrap();
    // It belongs to the snapshot, however that is called, and whoever opens the store.
    let again = Store::open(backend.clone(), options()).unwrap();
    again.tag("a", "gold").unwrap();
    let id = again.show("a").unwrap().id.to_string();
    for name in ["gold", &id] {
        assert_eq!(
            annotation(&again, name, "other").unwrap().unwrap(),
            b"apart"
        );
    }
    assert_eq!(again.stat().unwrap().annotations, 3);
    assert!(again.fsck().unwrap().problems.is_empty());
    // It goes with its snapshot, and a new one of the same name has none.
    again.rm("a").unwrap();
    save(&again, "a", &image(5, 1)).unwrap();
    assert_eq!(annotation(&again, "a", "note").unwrap(), None);
    assert_eq!(annotation(&again, "b", "note").unwrap().unwrap(), b"of b");
    assert_eq!(again.stat().unwrap().annotations, 1);
    assert_eq!(
        again.gc(&GcOptions::default()).unwrap().annotations_removed,
        0
    );
}

#[test]
fn annotations_are_kept_on_every_backend() {
    conform(Memory::new());
    conform(Arc::new(Faulty::new(Memory::new(), NEVER)));
    let dir = tempfile::tempdir().unwrap();
    conform(LocalDir::create(dir.path().join("store")).unwrap());
}

#[test]
fn what_is_no_annotation_is_refused() {
    let store = create(Memory::new());
    save(&store, "a", &image(5, 1)).unwrap();
    for name in ["", "../x", "a/b", &"n".repeat(65)] {
        assert!(matches!(
            annotate(&store, "a", name, b""),
            Err(Error::Name(_))
        ));
        assert!(matches!(annotation(&store, "a", name), Err(Error::Name(_))));
    }
    let too_much = vec![0; MAX_ANNOTATION_BYTES + 1];
    let refused = annotate(&store, "a", "note", &too_much);
    assert!(matches!(refused, Err(Error::Parameter(_))));
    assert_eq!(store.stat().unwrap().annotations, 0);
}

#[test]
fn a_snapshot_that_was_removed_gets_none() {
    let store = create(Memory::new());
    save(&store, "a", &image(5, 1)).unwrap();
    let removed = store.snapshot("a").unwrap();
    store.rm("a").unwrap();
    let refused = removed.annotate("note", b"too late");
    assert!(matches!(refused, Err(Error::NoSnapshot(_))));
    // Nor does another that has its name.
    save(&store, "a", &image(5, 2)).unwrap();
    let refused = removed.annotate("note", b"too late");
    assert!(matches!(refused, Err(Error::NoSnapshot(_))));
    assert_eq!(store.stat().unwrap().annotations, 0);
}

/// Removes a snapshot just before an annotation of it is published.
#[derive(Clone)]
struct Removing(Memory);

impl Backend for Removing {
    fn list(&self, area: Area) -> std::io::Result<Vec<dedup::backend::Entry>> {
        self.0.list(area)
    }
    fn open(&self, area: Area, name: &str) -> std::io::Result<Arc<dyn dedup::backend::ReadAt>> {
        self.0.open(area, name)
    }
    fn draft(&self) -> std::io::Result<Box<dyn dedup::backend::Draft>> {
        Store::open(self.0.clone(), options())
            .unwrap()
            .rm("a")
            .unwrap();
        self.0.draft()
    }
    fn remove(&self, area: Area, name: &str) -> std::io::Result<()> {
        self.0.remove(area, name)
    }
    fn sync(&self, area: Area) -> std::io::Result<()> {
        self.0.sync(area)
    }
    fn lease(&self) -> std::io::Result<Box<dyn dedup::backend::Lease>> {
        self.0.lease()
    }
    fn leases(&self) -> std::io::Result<Vec<Vec<u8>>> {
        self.0.leases()
    }
    fn clear_dead(&self) -> std::io::Result<u64> {
        self.0.clear_dead()
    }
    fn try_lock(&self, lock: dedup::backend::Lock) -> std::io::Result<Option<Box<dyn Send>>> {
        self.0.try_lock(lock)
    }
}

#[test]
fn none_stays_of_a_snapshot_that_is_removed_meanwhile() {
    let backend = Memory::new();
    save(&create(backend.clone()), "a", &image(5, 1)).unwrap();
    let beside = Store::open(Removing(backend.clone()), options()).unwrap();
    let refused = annotate(&beside, "a", "note", b"too late");
    assert!(matches!(refused, Err(Error::NoSnapshot(_))));
    assert!(backend.list(Area::Annotations).unwrap().is_empty());
}

#[test]
fn a_collection_removes_annotations_of_no_snapshot_and_no_others() {
    let backend = Memory::new();
    let store = create(backend.clone());
    save(&store, "a", &image(5, 1)).unwrap();
    save(&store, "b", &image(5, 1)).unwrap();
    annotate(&store, "a", "note", b"of a").unwrap();
    annotate(&store, "b", "note", b"of b").unwrap();
    // As a removal leaves it that is cut short.
    backend.remove(Area::Snapshots, "a").unwrap();
    assert!(store.fsck().unwrap().problems.is_empty());
    assert_eq!(
        store.gc(&GcOptions::default()).unwrap().annotations_removed,
        1
    );
    assert_eq!(annotation(&store, "b", "note").unwrap().unwrap(), b"of b");
    assert_eq!(backend.list(Area::Annotations).unwrap().len(), 1);
}

/// An annotated snapshot, and the file of the annotation.
fn annotated() -> (Files, (Area, String)) {
    let backend = Memory::new();
    let store = create(backend.clone());
    save(&store, "a", &image(5, 1)).unwrap();
    annotate(&store, "a", "note", b"learned later").unwrap();
    let files = backend.files();
    let file = files.keys().find(|(area, _)| *area == Area::Annotations);
    let file = file.unwrap().clone();
    (files, file)
}

#[test]
fn damage_to_one_hits_no_snapshot_and_is_moved_away() {
    let (mut files, file) = annotated();
    let mut damaged = files[&file].to_vec();
    damaged[20] ^= 1;
    files.insert(file.clone(), Arc::new(damaged));
    let store = Store::open(Memory::with_files(files), options()).unwrap();
    let read = annotation(&store, "a", "note");
    assert!(matches!(read, Err(Error::Damaged { .. })));
    let problems = store.repair().unwrap().problems;
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].file, file.0.path(&file.1));
    assert!(problems[0].snapshots.is_empty());
    assert!(store.fsck().unwrap().problems.is_empty());
    assert_eq!(annotation(&store, "a", "note").unwrap(), None);
    support::load(&store, "a").unwrap();
}

#[test]
fn one_under_anothers_name_is_found() {
    let (mut files, file) = annotated();
    let content = files[&file].clone();
    for name in [file.1.replace("note", "nose"), "neither".to_owned()] {
        files.insert((Area::Annotations, name), content.clone());
    }
    let store = Store::open(Memory::with_files(files), options()).unwrap();
    let read = annotation(&store, "a", "nose");
    assert!(matches!(read, Err(Error::Damaged { .. })));
    assert_eq!(store.fsck().unwrap().problems.len(), 2);
}

#[test]
fn a_disk_that_fills_up_keeps_the_old_one() {
    let (files, _) = annotated();
    for after_writes in 0.. {
        let fault = Fault {
            after_writes,
            times: u64::MAX,
            kind: ErrorKind::StorageFull,
        };
        let memory = Memory::with_files(files.clone());
        let faulty = Faulty::new(memory.clone(), fault);
        let store = Store::open(faulty, options()).unwrap();
        let done = annotate(&store, "a", "note", b"another").is_ok();
        let after = Store::open(memory, options()).unwrap();
        let found = annotation(&after, "a", "note").unwrap().unwrap();
        assert!(found == b"another" || (!done && found == b"learned later"));
        assert!(after.fsck().unwrap().problems.is_empty());
        if done {
            return;
        }
    }
}

#[test]
fn a_store_of_before_there_were_any_gets_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = create(LocalDir::create(&path).unwrap());
    save(&store, "a", &image(5, 1)).unwrap();
    std::fs::remove_dir(path.join("annotations")).unwrap();
    assert_eq!(annotation(&store, "a", "note").unwrap(), None);
    assert_eq!(store.stat().unwrap().annotations, 0);
    assert!(store.fsck().unwrap().problems.is_empty());
    store.gc(&GcOptions::default()).unwrap();
    annotate(&store, "a", "note", b"the first").unwrap();
    assert_eq!(
        annotation(&store, "a", "note").unwrap().unwrap(),
        b"the first"
    );
    std::fs::remove_dir_all(path.join("annotations")).unwrap();
    store.rm("a").unwrap();
}
