//! A snapshot's two files: whole or not there, checked before they are believed.

#![allow(clippy::unwrap_used)] // a test that cannot go on should stop

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    thread,
};

use memory::{MIN_MEMORY_BYTES, MachineMemory};
use saved_state::SnapshotId;
use snapshot::{Destination, Error, Files, Saving, Snapshot, Source, Unpublished, write};
use vm_memory::{Bytes, GuestAddress};

#[path = "support/mod.rs"]
mod support;
use support::{LAST, container, mark, memory_with};

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
        }
    }
    fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }
    fn memory(&self) -> PathBuf {
        self.directory.path().join("memory")
    }
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
    fn save(&self, id: u8, memory: &MachineMemory) -> Result<(), Error> {
        save(&self.state(), &self.memory(), id, memory)?
            .publish()
            .map(drop)
    }
    fn open(&self) -> Result<Snapshot, Error> {
        open(&self.state(), &self.memory())
    }
    fn flip(path: &Path, at: u64) {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    }
}

fn save(state: &Path, file: &Path, id: u8, memory: &MachineMemory) -> Result<Unpublished, Error> {
    let files = Files {
        state,
        memory: file,
    };
    write(
        Destination::Files(files),
        &container(id),
        memory,
        &Saving::default(),
    )
}

fn open(state: &Path, memory: &Path) -> Result<Snapshot, Error> {
    let files = Files { state, memory };
    Snapshot::open(Source::Files { files, store: None })
}

#[test]
fn memory_comes_back_and_its_zeros_are_holes() {
    let place = Place::new();
    place
        .save(1, &memory_with(&[(0, 1), (10 << 20, 2), (LAST, 3)]))
        .unwrap();
    assert_eq!(place.names(), ["memory", "state"]);
    let blocks = fs::metadata(place.memory()).unwrap().blocks() * 512;
    assert!(blocks < 1 << 20, "{blocks} bytes on disk");
    let pair = place.open().unwrap();
    let memory = pair.load().unwrap();
    assert_eq!(
        [0, 10 << 20, LAST, 20 << 20].map(|gpa| mark(&memory, gpa)),
        [1, 2, 3, 0]
    );
}

#[test]
fn a_machine_saved_over_its_own_files_keeps_what_it_mapped() {
    let place = Place::new();
    place
        .save(1, &memory_with(&[(0, 1), (10 << 20, 2)]))
        .unwrap();
    let memory = place.open().unwrap().load().unwrap();
    memory.guest().write_slice(&[9], GuestAddress(0)).unwrap();
    place.save(2, &memory).unwrap();
    assert_eq!(mark(&memory, 10 << 20), 2);
    let again = place.open().unwrap();
    let again = again.load().unwrap();
    assert_eq!([mark(&again, 0), mark(&again, 10 << 20)], [9, 2]);
    assert_eq!(place.names(), ["memory", "state"]);
}

#[test]
fn damage_anywhere_is_found() {
    let place = Place::new();
    place
        .save(1, &memory_with(&[(0, 1), (10 << 20, 2)]))
        .unwrap();
    let length = fs::metadata(place.memory()).unwrap().len();
    let intact = fs::read(place.memory()).unwrap();
    // In data, in a zero page beside data, in a hole, in the table, in the footer.
    for at in [5, 8192, 30 << 20, MIN_MEMORY_BYTES + 3, length - 100] {
        Place::flip(&place.memory(), at);
        let found = place.open().and_then(|pair| pair.load());
        assert!(
            matches!(found, Err(Error::Memory { .. })),
            "byte {at}: {found:?}"
        );
        Place::flip(&place.memory(), at);
    }
    place.open().unwrap().load().unwrap();
    for cut in [0, 100, MIN_MEMORY_BYTES, length - 1] {
        fs::write(place.memory(), &intact[..cut as usize]).unwrap();
        assert!(
            matches!(place.open(), Err(Error::Memory { .. })),
            "cut at {cut}"
        );
    }
    fs::write(place.memory(), &intact).unwrap();
    place.open().unwrap().load().unwrap();
    let state = fs::metadata(place.state()).unwrap().len();
    for at in 0..state {
        Place::flip(&place.state(), at);
        assert!(
            matches!(place.open(), Err(Error::State { .. })),
            "byte {at}"
        );
        Place::flip(&place.state(), at);
    }
}

#[test]
fn files_of_two_snapshots_do_not_go_together() {
    let (one, two) = (Place::new(), Place::new());
    one.save(1, &memory_with(&[])).unwrap();
    two.save(2, &memory_with(&[])).unwrap();
    let error = open(&one.state(), &two.memory()).unwrap_err().to_string();
    assert!(error.contains("give two files of one snapshot"), "{error}");
}

#[test]
fn a_crash_between_the_two_renames_loses_nothing() {
    let place = Place::new();
    place.save(1, &memory_with(&[(0, 1)])).unwrap();
    let old_state = fs::read(place.state()).unwrap();
    let old_memory = place
        .directory
        .path()
        .join(format!(".memory.{}.previous", SnapshotId([1; 16])));
    fs::hard_link(place.memory(), &old_memory).unwrap();
    place.save(2, &memory_with(&[(0, 2)])).unwrap();
    // As if the process had died before the second rename.
    fs::write(place.state(), old_state).unwrap();
    if !old_memory.exists() {
        // The save above has tidied up; put back what the crash would have left.
        let spare = Place::new();
        spare.save(1, &memory_with(&[(0, 1)])).unwrap();
        fs::copy(spare.memory(), &old_memory).unwrap();
    }
    let pair = place.open().unwrap();
    assert_eq!(mark(&pair.load().unwrap(), 0), 1);
    // The next snapshot to the same place is whole again.
    place.save(3, &memory_with(&[(0, 3)])).unwrap();
    assert_eq!(mark(&place.open().unwrap().load().unwrap(), 0), 3);
    assert_eq!(place.names(), ["memory", "state"]);
}

#[test]
fn what_cannot_be_written_leaves_what_was_there() {
    let place = Place::new();
    place.save(1, &memory_with(&[(0, 1)])).unwrap();
    let memory = memory_with(&[(0, 2)]);
    let missing = place.directory.path().join("no/such");
    let directory = place.directory.path().to_owned();
    for (state, target) in [
        (place.state(), missing.clone()),
        (missing, place.memory()),
        (place.state(), directory.clone()),
        (directory, place.memory()),
        (place.state(), place.state()),
    ] {
        assert!(
            save(&state, &target, 2, &memory)
                .and_then(|w| w.publish())
                .is_err()
        );
        assert_eq!(place.names(), ["memory", "state"]);
        assert_eq!(mark(&place.open().unwrap().load().unwrap(), 0), 1);
    }
}

#[test]
fn a_pair_that_cannot_be_completed_gives_the_place_back() {
    for foreign in [false, true] {
        let place = Place::new();
        place.save(1, &memory_with(&[(0, 1)])).unwrap();
        if foreign {
            fs::write(place.memory(), "somebody's").unwrap();
        }
        let before = fs::read(place.memory()).unwrap();
        let memory = memory_with(&[(0, 2)]);
        let unpublished = save(&place.state(), &place.memory(), 2, &memory).unwrap();
        // A directory cannot be replaced by a file.
        fs::remove_file(place.state()).unwrap();
        fs::create_dir(place.state()).unwrap();
        assert!(unpublished.publish().is_err());
        assert!(fs::read(place.memory()).unwrap() == before);
        assert_eq!(place.names(), ["memory", "state"]);
    }
}

#[test]
fn the_longest_names_are_given_back_and_swept_like_any_other() {
    let place = Place::new();
    let directory = place.directory.path();
    let (state, memory) = (
        directory.join("s".repeat(255)),
        directory.join("m".repeat(255)),
    );
    let publish = |id| {
        let unpublished = save(&state, &memory, id, &memory_with(&[(0, id)])).unwrap();
        unpublished.publish()
    };
    publish(1).unwrap();
    let old_state = fs::read(&state).unwrap();
    let unpublished = save(&state, &memory, 2, &memory_with(&[])).unwrap();
    fs::remove_file(&state).unwrap();
    fs::create_dir(&state).unwrap();
    assert!(unpublished.publish().is_err());
    fs::remove_dir(&state).unwrap();
    fs::write(&state, old_state).unwrap();
    assert_eq!(mark(&open(&state, &memory).unwrap().load().unwrap(), 0), 1);
    publish(3).unwrap();
    assert_eq!(mark(&open(&state, &memory).unwrap().load().unwrap(), 0), 3);
    assert_eq!(place.names().len(), 2);
}

#[test]
fn of_two_who_save_to_one_place_at_once_both_files_are_of_one() {
    let place = Place::new();
    for _ in 0..20 {
        let both = [1, 2].map(|id| {
            let memory = memory_with(&[(0, id)]);
            save(&place.state(), &place.memory(), id, &memory).unwrap()
        });
        thread::scope(|scope| {
            let publishing = both.map(|unpublished| scope.spawn(|| unpublished.publish()));
            for published in publishing {
                published.join().unwrap().unwrap();
            }
        });
        assert_eq!(place.names(), ["memory", "state"]);
        let pair = place.open().unwrap();
        let id = pair.state.header.id;
        assert_eq!(SnapshotId([mark(&pair.load().unwrap(), 0); 16]), id);
    }
}

#[test]
fn what_cannot_be_kept_is_not_replaced() {
    let place = Place::new();
    // A path that has room for a hidden name, and for none with an id.
    let mut directory = place.directory.path().to_owned();
    while directory.as_os_str().len() < 4050 {
        directory.push("d".repeat(15));
    }
    fs::create_dir_all(&directory).unwrap();
    let memory = directory.join("memory");
    let publish = |id| {
        let unpublished = save(&place.state(), &memory, id, &memory_with(&[(0, id)])).unwrap();
        unpublished.publish()
    };
    publish(1).unwrap();
    let refused = publish(2).unwrap_err().to_string();
    assert!(refused.contains("choose another path"), "{refused}");
    let pair = open(&place.state(), &memory).unwrap();
    assert_eq!(mark(&pair.load().unwrap(), 0), 1);
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
}

#[test]
fn one_place_under_two_spellings_is_one() {
    let place = Place::new();
    let other = place.directory.path().join(".").join("state");
    let error = save(&place.state(), &other, 1, &memory_with(&[])).unwrap_err();
    assert!(matches!(error, Error::SamePath(_)), "{error}");
}

#[test]
fn a_footer_that_promises_more_than_a_machine_can_have_is_refused() {
    let place = Place::new();
    place.save(1, &memory_with(&[])).unwrap();
    // Sparse, and as long as the footer would have it; only the checksum is what it should not be.
    let file = OpenOptions::new().write(true).open(place.memory()).unwrap();
    file.set_len(1 << 43).unwrap();
    assert!(matches!(place.open(), Err(Error::Memory { .. })));
}

#[test]
fn what_is_no_file_is_neither_replaced_nor_waited_for() {
    let place = Place::new();
    let pipe = rustix::fs::FileType::Fifo;
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    for (path, other) in [
        (place.state(), place.memory()),
        (place.memory(), place.state()),
    ] {
        rustix::fs::mknodat(rustix::fs::CWD, &path, pipe, mode, 0).unwrap();
        let refused = place.save(1, &memory_with(&[])).unwrap_err();
        assert!(matches!(refused, Error::NoFileName(_)), "{refused}");
        assert!(!other.exists() && fs::metadata(&path).unwrap().mode() & 0o170_000 == 0o010_000);
        let refused = place.open().unwrap_err();
        assert!(refused.to_string().contains("not"), "{refused}");
        fs::remove_file(&path).unwrap();
    }
    place.save(1, &memory_with(&[])).unwrap();
    place.open().unwrap();
}

#[test]
fn who_opens_two_files_that_are_just_replaced_finds_a_pair() {
    let place = Place::new();
    place.save(1, &memory_with(&[])).unwrap();
    thread::scope(|scope| {
        let saves = scope.spawn(|| {
            for id in 2..120 {
                place.save(id, &memory_with(&[])).unwrap();
            }
        });
        while !saves.is_finished() {
            place.open().unwrap();
        }
    });
}
