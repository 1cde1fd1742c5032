//! Memory that comes from a store while somebody works with it.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that cannot go on should stop

use std::{
    fs,
    path::PathBuf,
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use dedup::{CreateOptions, OpenOptions, Store};
use memory::{Layout, MIN_MEMORY_BYTES, MachineMemory, PAGE_BYTES};
use snapshot::{
    Destination, Error, Files, Lost, OnDemand, Saving, Snapshot, Source, StorePlace, UseWorkingSet,
    write,
};
use vm_memory::{Bytes, GuestAddress};

#[path = "support/mod.rs"]
mod support;
use support::container;

const PAGES: u64 = MIN_MEMORY_BYTES / PAGE_BYTES;

struct Place {
    directory: tempfile::TempDir,
    options: CreateOptions,
}

impl Place {
    fn new(options: CreateOptions) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let place = Self { directory, options };
        Store::create_dir(place.path(), &place.options, OpenOptions::default()).unwrap();
        place
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("store")
    }

    fn store(&self) -> Store {
        Store::open_dir(self.path(), OpenOptions::default()).unwrap()
    }

    fn save(&self, name: &str, memory: &MachineMemory) {
        let store = &self.store();
        let place = StorePlace {
            store,
            parent: None,
        };
        let to = Destination::Stored { place, name };
        let unpublished = write(to, &container(1), memory, &Saving::default()).unwrap();
        unpublished.publish().unwrap();
    }

    fn open(&self, name: &str) -> Snapshot {
        let store = &self.store();
        Snapshot::open(Source::Stored { store, name }).unwrap()
    }

    /// The memory of this snapshot, none of which is there yet, and who tells of losses. None where the host does not permit it.
    /// As [`Place::touched`], and the rest begins to come.
    fn on_demand(&self, name: &str) -> Option<(MachineMemory, OnDemand, Receiver<Lost>)> {
        let touched = self.touched(name)?;
        touched.1.bring_the_rest(true).unwrap();
        Some(touched)
    }

    /// Memory of which only that comes which is touched.
    fn touched(&self, name: &str) -> Option<(MachineMemory, OnDemand, Receiver<Lost>)> {
        let (losses, told) = channel();
        let on_loss = move |lost: &Lost| {
            let _ = losses.send(lost.clone());
        };
        let loaded = self
            .open(name)
            .load_on_demand(None, UseWorkingSet::Ignore, Box::new(on_loss));
        match loaded {
            Ok((memory, coming)) => Some((memory, coming, told)),
            Err(Error::GuestMemory(memory::Error::Userfault(e))) => {
                eprintln!("there is no userfaultfd here, so nothing was tested: {e}");
                None
            }
            Err(e) => panic!("{e}"),
        }
    }

    /// The pack files, and their content.
    fn packs(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let packs = fs::read_dir(self.path().join("packs")).unwrap();
        let paths = packs.map(|pack| pack.unwrap().path());
        paths
            .map(|path| (path.clone(), fs::read(path).unwrap()))
            .collect()
    }
}

/// What a page begins with; a third of them are zero.
fn mark(page: u64) -> u64 {
    if page.is_multiple_of(3) {
        0
    } else {
        page.wrapping_mul(0x9E37_79B9_7F4A_7C15)
    }
}

fn full() -> MachineMemory {
    let memory = MachineMemory::zeroed(Layout::new(MIN_MEMORY_BYTES).unwrap()).unwrap();
    // Nothing in the second half but a page in its middle.
    for page in (0..PAGES / 2).chain([PAGES * 3 / 4 + 1]) {
        set(&memory, page, mark(page));
    }
    memory
}

fn expected(page: u64) -> u64 {
    if page < PAGES / 2 || page == PAGES * 3 / 4 + 1 {
        mark(page)
    } else {
        0
    }
}

fn get(memory: &MachineMemory, page: u64) -> u64 {
    let at = GuestAddress(page * PAGE_BYTES);
    memory.guest().read_obj(at).unwrap()
}

fn set(memory: &MachineMemory, page: u64, value: u64) {
    let at = GuestAddress(page * PAGE_BYTES);
    memory.guest().write_obj(value, at).unwrap();
}

#[test]
fn who_reads_everything_finds_everything_in_whatever_order() {
    for chunk_size in [4096, 16384] {
        let place = Place::new(CreateOptions {
            chunk_size,
            ..CreateOptions::default()
        });
        place.save("a", &full());
        for step in [1, 4093, PAGES - 1] {
            let Some((memory, coming, _)) = place.on_demand("a") else {
                return;
            };
            for page in (0..PAGES).map(|n| n * step % PAGES) {
                assert_eq!(get(&memory, page), expected(page), "page {page}");
            }
            coming.finisher().finish(&|| true).unwrap();
            let progress = coming.progress();
            assert_eq!(progress.done(), progress.total());
            assert!(progress.total() > MIN_MEMORY_BYTES / 4);
        }
    }
}

#[test]
fn what_has_come_is_saved_as_it_was_and_what_was_changed_as_it_is() {
    let place = Place::new(CreateOptions::default());
    place.save("a", &full());
    let Some((memory, coming, _)) = place.on_demand("a") else {
        return;
    };
    // It is all there, or it is refused; what the guest does meanwhile is its own business.
    set(&memory, 7, 77);
    memory
        .discarder()
        .discard(PAGE_BYTES..2 * PAGE_BYTES)
        .unwrap();
    coming.finisher().finish(&|| true).unwrap();
    place.save("b", &memory);
    let again = place.open("b").load().unwrap();
    for page in 0..PAGES {
        let expected = match page {
            1 => 0,
            7 => 77,
            _ => expected(page),
        };
        assert_eq!(get(&again, page), expected, "page {page}");
    }
    // What was never touched and is zero is not there.
    let populated = memory.populated().unwrap();
    let bytes: u64 = populated.iter().map(|range| range.end - range.start).sum();
    assert!(bytes < MIN_MEMORY_BYTES / 2, "{bytes}");
}

#[test]
fn memory_without_content_is_there_at_once() {
    let place = Place::new(CreateOptions::default());
    let zeros = MachineMemory::zeroed(Layout::new(MIN_MEMORY_BYTES).unwrap()).unwrap();
    place.save("zeros", &zeros);
    let Some((memory, coming, _)) = place.on_demand("zeros") else {
        return;
    };
    coming.finisher().finish(&|| true).unwrap();
    assert!(coming.is_complete());
    assert_eq!(get(&memory, PAGES / 2), 0);
    assert!(memory.populated().is_ok());
}

/// Waits for page 1 on a thread of its own, which is left waiting if it must.
fn waits(memory: &MachineMemory) -> thread::JoinHandle<u64> {
    let guest = memory.guest().clone();
    thread::spawn(move || guest.read_obj(GuestAddress(PAGE_BYTES)).unwrap())
}

#[test]
fn damage_is_named_never_shown_and_put_right() {
    let place = Place::new(CreateOptions::default());
    place.save("a", &full());
    let packs = place.packs();
    for (path, bytes) in &packs {
        let mut bytes = bytes.clone();
        // All that the frames hold, but for their headers' beginnings: those of the table are still believed.
        bytes[200..400].fill(0xee);
        fs::write(path, bytes).unwrap();
    }
    let Some((memory, coming, told)) = place.on_demand("a") else {
        return;
    };
    // Which of them is damaged is the store's choice, so all are looked at.
    let mut lost = None;
    let mut waiting = None;
    for page in 1..PAGES {
        let guest = memory.guest().clone();
        let at = GuestAddress(page * PAGE_BYTES);
        let reads = thread::spawn(move || guest.read_obj::<u64>(at).unwrap());
        while !reads.is_finished() {
            match told.recv_timeout(Duration::from_millis(1)) {
                Ok(told) => {
                    lost = Some(told);
                    break;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(e) => panic!("{e}"),
            }
        }
        if lost.is_some() {
            waiting = Some((page, reads));
            break;
        }
        assert_eq!(reads.join().unwrap(), expected(page), "page {page}");
    }
    let (lost, (page, reads)) = (lost.unwrap(), waiting.unwrap());
    assert_eq!(
        (lost.offset, lost.gpa),
        (page * PAGE_BYTES, page * PAGE_BYTES)
    );
    let said = lost.to_string();
    for part in ["snapshot a", "packs/", "fsck"] {
        assert!(said.contains(part), "{said}");
    }
    assert!(coming.lost().is_some());
    // It stays so, whoever asks, and nobody is told zeros.
    coming.retry().unwrap_err();
    coming.finisher().finish(&|| true).unwrap_err();
    assert!(memory.populated().is_err());
    assert!(!reads.is_finished());
    // Until it is put right. A repair is another file of that name.
    for (path, bytes) in &packs {
        fs::remove_file(path).unwrap();
        fs::write(path, bytes).unwrap();
    }
    coming.retry().unwrap();
    assert_eq!(reads.join().unwrap(), expected(page));
    coming.finisher().finish(&|| true).unwrap();
    assert!(coming.lost().is_none());
    for page in 0..PAGES {
        assert_eq!(get(&memory, page), expected(page), "page {page}");
    }
}

#[test]
fn a_store_that_is_gone_is_a_loss_and_one_that_is_back_is_none() {
    let place = Place::new(CreateOptions::default());
    place.save("a", &full());
    let snapshot = place.open("a");
    let away = place.directory.path().join("away");
    fs::rename(place.path(), &away).unwrap();
    let (losses, told) = channel();
    let on_loss = move |lost: &Lost| {
        let _ = losses.send(lost.clone());
    };
    let Ok((memory, coming)) =
        snapshot.load_on_demand(None, UseWorkingSet::Ignore, Box::new(on_loss))
    else {
        eprintln!("there is no userfaultfd here, so nothing was tested");
        return;
    };
    // The guest goes on as long as it touches nothing.
    assert_eq!(get(&memory, PAGES - 1), 0);
    let reads = waits(&memory);
    let lost = told.recv_timeout(Duration::from_secs(120)).unwrap();
    assert_eq!(lost.offset, PAGE_BYTES);
    assert!(coming.finisher().finish(&|| true).is_err() && !reads.is_finished());
    fs::rename(&away, place.path()).unwrap();
    coming.finisher().finish(&|| true).unwrap();
    assert_eq!(reads.join().unwrap(), expected(1));
}

#[test]
fn what_nobody_waits_for_comes_by_itself_when_the_store_is_back() {
    let place = Place::new(CreateOptions::default());
    place.save("a", &full());
    let away = place.directory.path().join("away");
    let Some((memory, coming, told)) = place.touched("a") else {
        return;
    };
    fs::rename(place.path(), &away).unwrap();
    coming.bring_the_rest(true).unwrap();
    let until = |what: &str, is_so: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !is_so() {
            assert!(begun.elapsed() < Duration::from_secs(120), "{what}");
            thread::sleep(Duration::from_millis(10));
        }
    };
    until("it is known to be away", &|| coming.lost().is_some());
    fs::rename(&away, place.path()).unwrap();
    until("all has come", &|| coming.is_complete());
    assert!(coming.lost().is_none() && told.try_recv().is_err());
    for page in 0..PAGES {
        assert_eq!(get(&memory, page), expected(page), "page {page}");
    }
}

#[test]
fn who_does_not_wait_any_more_has_nothing_brought() {
    let place = Place::new(CreateOptions::default());
    place.save("a", &full());
    let Some((_memory, coming, _told)) = place.touched("a") else {
        return;
    };
    coming.finisher().finish(&|| false).unwrap_err();
    assert_eq!(coming.progress().done(), 0);
    coming.finisher().finish(&|| true).unwrap();
}

#[test]
fn what_cannot_come_on_demand_says_so() {
    let place = Place::new(CreateOptions {
        chunk_size: 512,
        ..CreateOptions::default()
    });
    place.save("a", &full());
    let refused = place
        .open("a")
        .load_on_demand(None, UseWorkingSet::Ignore, Box::new(|_| ()))
        .unwrap_err();
    assert!(
        refused.to_string().contains("smaller than a page"),
        "{refused}"
    );
    let path = |name| place.directory.path().join(name);
    let (state, memory) = (path("state"), path("memory"));
    let files = Files {
        state: &state,
        memory: &memory,
    };
    let to = Destination::Files(files);
    let unpublished = write(to, &container(1), &full(), &Saving::default()).unwrap();
    unpublished.publish().unwrap();
    let opened = Snapshot::open(Source::Files { files, store: None }).unwrap();
    let refused = opened
        .load_on_demand(None, UseWorkingSet::Ignore, Box::new(|_| ()))
        .unwrap_err();
    assert!(refused.to_string().contains("mapped anyway"), "{refused}");
}
