//! What a machine touches first is recorded, and comes first the next time.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that cannot go on should stop

use std::{
    fs,
    path::PathBuf,
    sync::mpsc::{Receiver, channel},
    thread,
    time::Duration,
};

use dedup::{CreateOptions, GcOptions, Key, OpenOptions, Store};
use memory::{Layout, MIN_MEMORY_BYTES, MachineMemory, PAGE_BYTES};
use snapshot::{
    Destination, Error, Lost, OnDemand, Saving, Snapshot, Source, StorePlace, UseWorkingSet,
    WorkingSet, write,
};
use vm_memory::{Bytes, GuestAddress};

#[path = "support/mod.rs"]
mod support;
use support::container;

const PAGES: u64 = MIN_MEMORY_BYTES / PAGE_BYTES;

/// Pages of a frame.
const FRAME: u64 = 4;

/// Far apart, not in order, and none in the frame of another. Every third page is zero.
const TOUCHED: [u64; 5] = [1000, 13, PAGES - 5, 999 + 3 * FRAME, 2];

const ANNOTATION: &str = "working-set";

struct Place {
    directory: tempfile::TempDir,
    key: Option<Key>,
}

impl Place {
    /// With the snapshot `a`.
    fn new(key: Option<Key>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let place = Self { directory, key };
        let create = CreateOptions {
            key: place.key.clone(),
            ..CreateOptions::default()
        };
        Store::create_dir(place.path(), &create, OpenOptions::default()).unwrap();
        let memory = MachineMemory::zeroed(Layout::new(MIN_MEMORY_BYTES).unwrap()).unwrap();
        for page in 0..PAGES {
            let at = GuestAddress(page * PAGE_BYTES);
            memory.guest().write_obj(content(page), at).unwrap();
        }
        let store = &place.store();
        let to = Destination::Stored {
            place: StorePlace {
                store,
                parent: None,
            },
            name: "a",
        };
        let unpublished = write(to, &container(1), &memory, &Saving::default()).unwrap();
        unpublished.publish().unwrap();
        place
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("store")
    }

    fn store(&self) -> Store {
        let options = OpenOptions {
            key: self.key.clone(),
            ..OpenOptions::default()
        };
        Store::open_dir(self.path(), options).unwrap()
    }

    fn kept(&self) -> Option<Vec<u64>> {
        let snapshot = self.store().snapshot("a").unwrap();
        let set = WorkingSet::of(&snapshot).unwrap();
        set.map(|set| set.pages().to_vec())
    }

    fn annotate(&self, content: &[u8]) {
        let snapshot = self.store().snapshot("a").unwrap();
        snapshot.annotate(ANNOTATION, content).unwrap();
    }

    fn restore(&self, how: UseWorkingSet) -> Option<Restored> {
        let store = &self.store();
        let snapshot = Snapshot::open(Source::Stored { store, name: "a" }).unwrap();
        let (losses, lost) = channel();
        let on_loss = move |lost: &Lost| {
            let _ = losses.send(lost.clone());
        };
        match snapshot.load_on_demand(None, how, Box::new(on_loss)) {
            Ok((memory, coming)) => Some(Restored {
                memory,
                coming,
                lost,
            }),
            Err(Error::GuestMemory(memory::Error::Userfault(e))) => {
                eprintln!("there is no userfaultfd here, so nothing was tested: {e}");
                None
            }
            Err(e) => panic!("{e}"),
        }
    }

    /// Half of each pack.
    fn damage(&self) {
        for pack in fs::read_dir(self.path().join("packs")).unwrap() {
            let pack = pack.unwrap().path();
            let mut bytes = fs::read(&pack).unwrap();
            let middle = bytes.len() / 4..bytes.len() * 3 / 4;
            bytes[middle].fill(0xee);
            fs::write(pack, bytes).unwrap();
        }
    }

    /// Records [`TOUCHED`].
    fn record(&self) -> Option<()> {
        let restored = self.restore(UseWorkingSet::Record)?;
        restored.coming.bring_the_rest(true).unwrap();
        restored.touch(&TOUCHED);
        until("the working set to be kept", || self.kept());
        Some(())
    }
}

struct Restored {
    memory: MachineMemory,
    coming: OnDemand,
    lost: Receiver<Lost>,
}

impl Restored {
    fn touch(&self, pages: &[u64]) {
        for page in pages {
            let at = GuestAddress(page * PAGE_BYTES);
            let found: u64 = self.memory.guest().read_obj(at).unwrap();
            assert_eq!(found, content(*page), "page {page}");
        }
    }

    fn wait_for_working_set(&self) {
        until("the working set to come", || {
            self.coming.has_working_set_come().then_some(())
        });
    }

    fn finish(&self) {
        self.coming.finisher().finish(&|| true).unwrap();
        self.touch(&(0..PAGES).collect::<Vec<_>>());
    }
}

fn content(page: u64) -> u64 {
    if page.is_multiple_of(3) {
        0
    } else {
        page.wrapping_mul(0x9E37_79B9_7F4A_7C15)
    }
}

/// Waits until there is something.
#[track_caller]
fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    for _ in 0..6000 {
        if let Some(found) = look() {
            return found;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("waited too long for {what}");
}

#[test]
fn what_was_touched_in_the_first_second_comes_first_the_next_time() {
    for key in [None, Some(Key::from([7; 32]))] {
        let place = Place::new(key);
        let Some(first) = place.restore(UseWorkingSet::Bring) else {
            return;
        };
        assert!(!first.coming.has_working_set_come());
        first.coming.bring_the_rest(true).unwrap();
        first.touch(&TOUCHED[..3]);
        // Whoever reads the rest would have brought these long ago, if nobody kept it from that.
        thread::sleep(Duration::from_millis(300));
        first.touch(&TOUCHED[3..]);
        assert_eq!(first.coming.waited_for(), 5);
        assert_eq!(first.coming.recorded_pages(), 5);
        let kept = until("the working set to be kept", || place.kept());
        assert_eq!(kept, TOUCHED);
        first.finish();
        assert_eq!(first.coming.recorded_pages(), 5);

        let second = place.restore(UseWorkingSet::Bring).unwrap();
        assert_eq!(second.coming.working_set_pages(), 5);
        second.wait_for_working_set();
        // Nothing else, and nobody waits for any of it.
        assert!(second.coming.progress().done() <= 5 * FRAME * PAGE_BYTES);
        assert!(second.coming.working_set_bytes() >= 5 * PAGE_BYTES);
        second.touch(&TOUCHED);
        assert_eq!(second.coming.waited_for(), 0);
        second.touch(&[500]);
        assert_eq!(second.coming.waited_for(), 1);
        second.coming.bring_the_rest(true).unwrap();
        second.finish();
        assert_eq!(place.kept().unwrap(), TOUCHED);
        assert!(place.store().fsck().unwrap().problems.is_empty());
    }
}

#[test]
fn it_is_recorded_anew_or_left_alone_if_that_is_asked_for() {
    let place = Place::new(None);
    let Some(()) = place.record() else { return };
    let ignoring = place.restore(UseWorkingSet::Ignore).unwrap();
    assert_eq!(ignoring.coming.working_set_pages(), 0);
    assert!(ignoring.coming.has_working_set_come());
    ignoring.touch(&[500]);
    assert_eq!(ignoring.coming.recorded_pages(), 0);
    ignoring.coming.bring_the_rest(true).unwrap();
    ignoring.finish();
    assert_eq!(place.kept().unwrap(), TOUCHED);
    let anew = place.restore(UseWorkingSet::Record).unwrap();
    anew.coming.bring_the_rest(true).unwrap();
    anew.touch(&[500, 13]);
    until("another to be kept", || {
        (place.kept().unwrap() == [500, 13]).then_some(())
    });
}

#[test]
fn what_did_not_run_alone_for_long_enough_is_not_recorded() {
    let place = Place::new(None);
    // Held at first, and saved soon.
    for (runs, finishes) in [(false, false), (true, true)] {
        let Some(restored) = place.restore(UseWorkingSet::Bring) else {
            return;
        };
        restored.coming.bring_the_rest(runs).unwrap();
        restored.touch(&TOUCHED);
        if finishes {
            restored.finish();
        }
        until("all to come", || {
            restored.coming.is_complete().then_some(())
        });
        assert_eq!(place.kept(), None);
    }
}

#[test]
fn nothing_is_recorded_once_somebody_waits_for_everything() {
    let place = Place::new(None);
    place.damage();
    let Some(restored) = place.restore(UseWorkingSet::Bring) else {
        return;
    };
    restored.coming.bring_the_rest(true).unwrap();
    // Not all can come, but much has that nobody touched.
    restored.coming.finisher().finish(&|| true).unwrap_err();
    restored.wait_for_working_set();
    // As long as it would take to keep it.
    thread::sleep(Duration::from_millis(300));
    assert_eq!(place.kept(), None);
}

#[test]
fn one_that_is_malformed_is_recorded_anew() {
    for content in [
        &b"\x01\x01\x00"[..],
        b"",
        &[0xff; 1000],
        &[1, 1, 0xfe, 0xff, 0x3f, 0],
    ] {
        let place = Place::new(None);
        place.annotate(content);
        let snapshot = place.store().snapshot("a").unwrap();
        assert!(matches!(
            WorkingSet::of(&snapshot),
            Err(Error::WorkingSet { .. })
        ));
        let Some(restored) = place.restore(UseWorkingSet::Bring) else {
            return;
        };
        assert_eq!(restored.coming.working_set_pages(), 0);
        restored.coming.bring_the_rest(true).unwrap();
        restored.touch(&TOUCHED);
        until("it to be replaced", || {
            let kept = WorkingSet::of(&snapshot).ok().flatten()?;
            (kept.pages() == TOUCHED).then_some(())
        });
        restored.finish();
    }
}

#[test]
fn nothing_is_left_of_one_whose_snapshot_is_removed_meanwhile() {
    let place = Place::new(None);
    let Some(restored) = place.restore(UseWorkingSet::Bring) else {
        return;
    };
    restored.coming.bring_the_rest(true).unwrap();
    restored.touch(&TOUCHED);
    let store = place.store();
    store.rm("a").unwrap();
    // The rest comes once it has been tried to keep it, or shortly before.
    until("all to come", || {
        restored.coming.is_complete().then_some(())
    });
    restored.finish();
    drop(restored);
    store.gc(&GcOptions::default()).unwrap();
    assert_eq!(store.stat().unwrap().annotations, 0);
}

#[test]
fn who_waits_for_everything_does_not_outlive_the_machine() {
    let place = Place::new(None);
    let Some(restored) = place.restore(UseWorkingSet::Bring) else {
        return;
    };
    let finisher = restored.coming.finisher();
    let (begun, begins) = std::sync::mpsc::channel();
    let waits = thread::spawn(move || {
        begun.send(()).unwrap();
        finisher.finish(&|| true)
    });
    begins.recv().unwrap();
    drop(restored);
    // With everything, or without.
    let came = waits.join().unwrap();
    assert!(came.is_ok() || came.unwrap_err().to_string().contains("machine"));
}

#[test]
fn one_that_cannot_be_had_is_not_waited_for_before_it_is_touched() {
    let place = Place::new(None);
    let Some(()) = place.record() else { return };
    place.damage();
    let restored = place.restore(UseWorkingSet::Bring).unwrap();
    restored.wait_for_working_set();
    assert!(restored.lost.try_recv().is_err());
    restored.coming.bring_the_rest(true).unwrap();
    let lost = restored.coming.finisher().finish(&|| true).unwrap_err();
    assert!(lost.to_string().contains("packs/"), "{lost}");
}
