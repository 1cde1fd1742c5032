//! Every prefix of the writes, and every kind of loss of unsynced ones, leaves a store that keeps its word.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};

use dedup::backend::{Area, Backend, Draft, Entry, Files, Lease, Lock, Memory, Publish, ReadAt};
use dedup::{GcOptions, OpenOptions, Store};
use support::{Random, annotate, annotation, create_options, image, load, save, touch};

/// What a backend was asked to do, and what the library had promised by then.
#[derive(Clone, Debug)]
enum Op {
    Append(usize, Vec<u8>),
    SyncDraft(usize),
    Publish(usize, Area, String),
    Remove(Area, String),
    SyncArea(Area),
    Promise(Promise),
}

#[derive(Clone, Debug)]
enum Promise {
    Created,
    Saved(String),
    Removing(String),
    Removed(String),
    Annotating(Vec<u8>),
    Annotated,
}

/// Does what memory does, and writes it down.
#[derive(Clone, Default)]
struct Recorder {
    memory: Memory,
    log: Arc<Mutex<(usize, Vec<Op>)>>,
}

impl Recorder {
    fn note(&self, op: Op) {
        self.log.lock().unwrap().1.push(op);
    }

    fn promise(&self, promise: Promise) {
        self.note(Op::Promise(promise));
    }
}

impl Backend for Recorder {
    fn list(&self, area: Area) -> io::Result<Vec<Entry>> {
        self.memory.list(area)
    }
    fn open(&self, area: Area, name: &str) -> io::Result<Arc<dyn ReadAt>> {
        self.memory.open(area, name)
    }
    fn draft(&self) -> io::Result<Box<dyn Draft>> {
        let mut log = self.log.lock().unwrap();
        log.0 += 1;
        Ok(Box::new(RecordedDraft {
            recorder: self.clone(),
            number: log.0,
            inner: self.memory.draft()?,
        }))
    }
    fn remove(&self, area: Area, name: &str) -> io::Result<()> {
        self.note(Op::Remove(area, name.to_owned()));
        self.memory.remove(area, name)
    }
    fn sync(&self, area: Area) -> io::Result<()> {
        self.note(Op::SyncArea(area));
        Ok(())
    }
    fn lease(&self) -> io::Result<Box<dyn Lease>> {
        self.memory.lease()
    }
    fn leases(&self) -> io::Result<Vec<Vec<u8>>> {
        self.memory.leases()
    }
    fn clear_dead(&self) -> io::Result<u64> {
        Ok(0)
    }
    fn try_lock(&self, lock: Lock) -> io::Result<Option<Box<dyn Send>>> {
        self.memory.try_lock(lock)
    }
}

struct RecordedDraft {
    recorder: Recorder,
    number: usize,
    inner: Box<dyn Draft>,
}

impl Draft for RecordedDraft {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.recorder.note(Op::Append(self.number, bytes.to_vec()));
        self.inner.append(bytes)
    }
    fn sync(&mut self) -> io::Result<()> {
        self.recorder.note(Op::SyncDraft(self.number));
        self.inner.sync()
    }
    fn publish(self: Box<Self>, area: Area, name: &str, how: Publish) -> io::Result<()> {
        self.recorder
            .note(Op::Publish(self.number, area, name.to_owned()));
        self.inner.publish(area, name, how)
    }
}

/// What becomes of unsynced bytes at the end of a file.
#[derive(Clone, Copy, Debug)]
enum Tail {
    Kept,
    Lost,
    Half,
    Zeros,
}

/// What a power cut leaves of the first operations. `lost` says of the `n`th unsynced change of a directory whether it is
/// lost.
fn after_crash(ops: &[Op], tail: Tail, lost: &mut dyn FnMut(usize) -> bool) -> Files {
    let mut drafts: BTreeMap<usize, (Vec<u8>, usize)> = BTreeMap::new();
    let synced_before = |at: usize, area: Area| {
        ops[at..]
            .iter()
            .any(|later| matches!(later, Op::SyncArea(synced) if *synced == area))
    };
    let mut names: BTreeMap<(Area, String), usize> = BTreeMap::new();
    let mut unsynced = 0;
    for (at, op) in ops.iter().enumerate() {
        let mut happens = |area: Area| {
            synced_before(at, area) || {
                unsynced += 1;
                !lost(unsynced - 1)
            }
        };
        match op {
            Op::Append(draft, bytes) => {
                drafts.entry(*draft).or_default().0.extend_from_slice(bytes)
            }
            Op::SyncDraft(draft) => {
                let content = drafts.entry(*draft).or_default();
                content.1 = content.0.len();
            }
            Op::Publish(draft, area, name) if happens(*area) => {
                names.insert((*area, name.clone()), *draft);
            }
            Op::Remove(area, name) if happens(*area) => {
                names.remove(&(*area, name.clone()));
            }
            _ => {}
        }
    }
    let content = |draft: usize| {
        let (bytes, synced) = drafts.get(&draft).cloned().unwrap_or_default();
        let (whole, rest) = bytes.split_at(synced);
        let rest = match tail {
            Tail::Kept => rest.to_vec(),
            Tail::Lost => Vec::new(),
            Tail::Half => rest[..rest.len() / 2].to_vec(),
            Tail::Zeros => vec![0; rest.len()],
        };
        Arc::new([whole, &rest].concat())
    };
    names
        .into_iter()
        .map(|(name, draft)| (name, content(draft)))
        .collect()
}

fn options() -> OpenOptions {
    OpenOptions {
        threads: 1,
        ..support::options()
    }
}

/// The snapshot that is annotated and stays.
const ANNOTATED: &str = "child";

/// The image of each snapshot.
type Images = BTreeMap<String, Vec<u8>>;

/// A life of a store, in which everything happens.
fn record() -> (Vec<Op>, Images) {
    let recorder = Recorder::default();
    let store = Store::create(recorder.clone(), &create_options(), options()).unwrap();
    recorder.promise(Promise::Created);
    let mut images = Images::new();
    let mut save = |name: &str, image: &[u8]| {
        images.insert(name.to_owned(), image.to_vec());
        save(&store, name, image).unwrap();
        recorder.promise(Promise::Saved(name.to_owned()));
    };
    let remove = |name: &str| {
        recorder.promise(Promise::Removing(name.to_owned()));
        store.rm(name).unwrap();
        recorder.promise(Promise::Removed(name.to_owned()));
    };
    let base = image(60, 1);
    let mut child = base.clone();
    child[..40 * 4096].fill(0);
    touch(&mut child, 3, 2);
    let annotate = |content: &[u8]| {
        recorder.promise(Promise::Annotating(content.to_vec()));
        annotate(&store, ANNOTATED, "note", content).unwrap();
        recorder.promise(Promise::Annotated);
    };
    save("base", &base);
    save("child", &child);
    annotate(b"first");
    annotate(b"second, and longer");
    save("other", &image(30, 3));
    store
        .snapshot("other")
        .unwrap()
        .annotate("note", b"of one that goes")
        .unwrap();
    store.tag("base", "gold").unwrap();
    remove("base");
    remove("other");
    // Shrinks the pack of the base, removes the other's.
    let collected = store.gc(&GcOptions::default()).unwrap();
    assert_eq!((collected.packs_removed, collected.packs_shrunk), (1, 1));
    save("again", &base);
    let ops = recorder.log.lock().unwrap().1.clone();
    (ops, images)
}

/// Opens what a crash left, and holds it against what was promised.
fn check(files: Files, ops: &[Op], images: &Images) {
    let (mut created, mut saved, mut removing, mut removed) =
        (false, BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for op in ops {
        match op {
            Op::Promise(Promise::Created) => created = true,
            Op::Promise(Promise::Saved(name)) => drop(saved.insert(name.clone())),
            Op::Promise(Promise::Removing(name)) => drop(removing.insert(name.clone())),
            Op::Promise(Promise::Removed(name)) => drop(removed.insert(name.clone())),
            _ => {}
        }
    }
    let store = match Store::open(Memory::with_files(files), options()) {
        Ok(store) => store,
        Err(error) => return assert!(!created, "{error}"),
    };
    let listed: BTreeSet<String> = store
        .log()
        .unwrap()
        .into_iter()
        .map(|entry| entry.name)
        .collect();
    assert!(
        saved
            .difference(&removing)
            .all(|name| listed.contains(name)),
        "a saved snapshot is gone"
    );
    assert!(removed.is_disjoint(&listed), "a removed snapshot is back");
    let all_load = || {
        for name in &listed {
            assert!(
                load(&store, name).unwrap() == images[name],
                "{name} is not what was saved"
            );
        }
    };
    all_load();
    for problem in store.fsck().unwrap().problems {
        assert!(problem.snapshots.is_empty(), "{problem:?}");
    }
    check_annotation(&store, ops, listed.contains(ANNOTATED));
    // Life goes on.
    store.gc(&GcOptions::default()).unwrap();
    let annotations = store.stat().unwrap().annotations;
    let others = annotations - u64::from(annotated(&store, ANNOTATED));
    assert_eq!(others, u64::from(annotated(&store, "other")), "an orphan");
    save(&store, "after", &images["base"]).unwrap();
    store.gc(&GcOptions::default()).unwrap();
    all_load();
    assert!(load(&store, "after").unwrap() == images["base"]);
}

fn annotated(store: &Store, snapshot: &str) -> bool {
    annotation(store, snapshot, "note").is_ok_and(|found| found.is_some())
}

/// The annotation is the last that was promised, or the one that was being written, and whole.
fn check_annotation(store: &Store, ops: &[Op], is_there: bool) {
    let mut allowed = vec![None];
    for op in ops {
        match op {
            Op::Promise(Promise::Annotating(content)) => allowed.push(Some(content.clone())),
            Op::Promise(Promise::Annotated) => drop(allowed.drain(..allowed.len() - 1)),
            _ => {}
        }
    }
    if is_there {
        let found = annotation(store, ANNOTATED, "note").unwrap();
        assert!(allowed.contains(&found), "{found:?} and not {allowed:?}");
    }
}

#[test]
fn whatever_a_power_cut_leaves_keeps_every_promise() {
    let (ops, images) = record();
    let mut random = Random::new(4);
    for end in 0..=ops.len() {
        let ops = &ops[..end];
        let mut unsynced = 0;
        let mut states = Vec::new();
        for tail in [Tail::Kept, Tail::Lost, Tail::Half, Tail::Zeros] {
            states.push(after_crash(ops, tail, &mut |number| {
                unsynced = unsynced.max(number + 1);
                false
            }));
            states.push(after_crash(ops, tail, &mut |_| true));
        }
        for alone in 0..unsynced {
            states.push(after_crash(ops, Tail::Lost, &mut |number| number == alone));
            states.push(after_crash(ops, Tail::Kept, &mut |number| number != alone));
        }
        for _ in 0..2 {
            states.push(after_crash(ops, Tail::Half, &mut |_| random.below(2) == 0));
        }
        // Many are the same.
        states.sort();
        states.dedup();
        for state in states {
            check(state, ops, &images);
        }
    }
}

/// What is merged was durable, and stays so: a save's own small segment may be lost, and no more than that.
#[test]
fn a_power_cut_after_a_merge_leaves_the_index_whole() {
    let (ops, images) = record();
    let merged = ops
        .iter()
        .rposition(|op| matches!(op, Op::Remove(Area::Index, _)));
    let ops = &ops[..=merged.unwrap()];
    let mut unsynced = 0;
    let mut states = vec![
        after_crash(ops, Tail::Kept, &mut |number| {
            unsynced = unsynced.max(number + 1);
            false
        }),
        after_crash(ops, Tail::Lost, &mut |_| false),
        after_crash(ops, Tail::Lost, &mut |_| true),
    ];
    for alone in 0..unsynced {
        states.push(after_crash(ops, Tail::Lost, &mut |number| number == alone));
    }
    for mut state in states {
        // What is condemned is not found, known or not.
        state.retain(|(area, _), _| *area != Area::Condemned);
        let store = Store::open(Memory::with_files(state), options()).unwrap();
        let again = save(&store, "after", &images["again"]).unwrap();
        let stored = again.images[0].new_chunks;
        assert!(
            stored <= support::left_out(),
            "{stored} chunks are not known"
        );
    }
}

/// The test of all that a power cut leaves can fail: without their syncs, annotations are lost.
#[test]
fn annotations_that_are_not_synced_are_found_out() {
    let (ops, images) = record();
    let end = ops
        .iter()
        .rposition(|op| matches!(op, Op::Promise(Promise::Annotated)));
    let mut careless = ops[..=end.unwrap()].to_vec();
    careless.retain(|op| !matches!(op, Op::SyncArea(Area::Annotations)));
    let lost = after_crash(&careless, Tail::Kept, &mut |_| true);
    let broken = std::panic::catch_unwind(|| check(lost, &careless, &images));
    assert!(broken.is_err());
}

/// And without the others, more is.
#[test]
fn a_store_that_does_not_sync_is_found_out() {
    let (ops, images) = record();
    let careless: Vec<Op> = ops
        .into_iter()
        .filter(|op| {
            !matches!(
                op,
                Op::SyncArea(Area::Snapshots) | Op::SyncArea(Area::Packs)
            )
        })
        .collect();
    let lost = after_crash(&careless, Tail::Kept, &mut |_| true);
    let broken = std::panic::catch_unwind(|| check(lost, &careless, &images));
    assert!(broken.is_err());
}
