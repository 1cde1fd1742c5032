//! A snapshot in a store: whole or not there, checked before it is believed, and found through references.

#![allow(clippy::unwrap_used)] // a test that cannot go on should stop

use std::{
    fs,
    path::{Path, PathBuf},
};

use dedup::{CreateOptions, OpenOptions, Store};
use memory::{MIN_MEMORY_BYTES, MachineMemory, PAGE_BYTES};
use saved_state::SnapshotId;
use snapshot::{
    Content, Destination, Error, Files, Piece, Saved, Saving, Snapshot, Source, StoreAt,
    StorePlace, write,
};
use vm_memory::{Bytes, GuestAddress};

#[path = "support/mod.rs"]
mod support;
use support::{LAST, container, mark, memory_with};

struct Place {
    directory: tempfile::TempDir,
    store: Store,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::create_dir(
            directory.path().join("store"),
            &CreateOptions::default(),
            OpenOptions::default(),
        );
        Self {
            store: store.unwrap(),
            directory,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn place<'a>(&'a self, parent: Option<&'a str>) -> StorePlace<'a> {
        StorePlace {
            store: &self.store,
            parent,
        }
    }

    /// Saves by name.
    fn save(&self, name: &str, parent: Option<&str>, memory: &MachineMemory) -> Saved {
        let place = self.place(parent);
        publish(Destination::Stored { place, name }, 1, memory).unwrap()
    }

    /// Saves to two files, `state` and `memory`, the latter a reference.
    fn refer(&self, id: u8, memory: &MachineMemory) -> Saved {
        let (state, file) = (self.path("state"), self.path("memory"));
        let files = files(&state, &file);
        let place = self.place(None);
        publish(Destination::Referenced { place, files }, id, memory).unwrap()
    }

    fn open(&self, name: &str) -> Result<Snapshot, Error> {
        let store = &self.store;
        Snapshot::open(Source::Stored { store, name })
    }

    /// Follows the reference into its own store.
    fn follow_home(&self) -> Result<Snapshot, Error> {
        self.follow(Some(at(&self.path("store"))))
    }

    fn follow(&self, store: Option<StoreAt<'_>>) -> Result<Snapshot, Error> {
        let (state, memory) = (self.path("state"), self.path("memory"));
        let files = files(&state, &memory);
        Snapshot::open(Source::Files { files, store })
    }
}

fn files<'a>(state: &'a Path, memory: &'a Path) -> Files<'a> {
    Files { state, memory }
}

fn at(directory: &Path) -> StoreAt<'_> {
    StoreAt {
        directory,
        key_file: None,
    }
}

fn publish(to: Destination<'_>, id: u8, memory: &MachineMemory) -> Result<Saved, Error> {
    let saved = write(to, &container(id), memory, &Saving::default())?
        .publish()?
        .in_store();
    Ok(saved.unwrap())
}

#[test]
fn memory_and_state_come_back() {
    let place = Place::new();
    let memory = memory_with(&[(0, 1), (10 << 20, 2), (LAST, 3)]);
    let saving = Saving::default();
    let to = Destination::Stored {
        place: place.place(None),
        name: "monday",
    };
    let unpublished = write(to, &container(7), &memory, &saving).unwrap();
    assert_eq!(unpublished.written.memory_bytes, MIN_MEMORY_BYTES);
    assert_eq!(unpublished.written.data_bytes, 3 * PAGE_BYTES);
    let progress = saving.progress();
    assert!(progress.total() > 0);
    assert_eq!(progress.done(), progress.total());
    let saved = unpublished.publish().unwrap().in_store().unwrap();

    let snapshot = place.open("monday").unwrap();
    assert_eq!(snapshot.state.header.id, SnapshotId([7; 16]));
    assert_eq!(snapshot.stored_as(), Some(saved.id.to_string()).as_deref());
    let memory = snapshot.load().unwrap();
    assert_eq!(
        [0, 10 << 20, LAST, 20 << 20].map(|gpa| mark(&memory, gpa)),
        [1, 2, 3, 0]
    );
    // What was zero was not touched.
    let held: u64 = memory
        .populated()
        .unwrap()
        .iter()
        .map(|range| range.end - range.start)
        .sum();
    assert!(held < MIN_MEMORY_BYTES / 2, "{held} bytes");
}

#[test]
fn a_machine_that_goes_on_is_saved_on_top_of_what_it_was() {
    let place = Place::new();
    let first = place.save("one", None, &memory_with(&[(0, 1), (10 << 20, 2)]));
    assert_eq!(first.images[0].new_chunks, 2);
    let snapshot = place.open("one").unwrap();
    let memory = snapshot.load().unwrap();
    memory.guest().write_slice(&[9], GuestAddress(0)).unwrap();
    let second = place.save("two", snapshot.stored_as(), &memory);
    assert_eq!(second.images[0].new_chunks, 1);
    let log = place.store.log().unwrap();
    let two = log.iter().find(|entry| entry.name == "two").unwrap();
    assert_eq!(two.facts.parent, Some(first.id));
    let memory = place.open("two").unwrap().load().unwrap();
    assert_eq!([0, 10 << 20].map(|gpa| mark(&memory, gpa)), [9, 2]);
}

#[test]
fn a_parent_that_is_gone_is_no_reason_not_to_save() {
    let place = Place::new();
    place.save("two", Some("one"), &memory_with(&[(0, 1)]));
    assert_eq!(mark(&place.open("two").unwrap().load().unwrap(), 0), 1);
}

#[test]
fn a_snapshot_that_has_the_parents_id_for_a_name_is_not_built_on() {
    let place = Place::new();
    let first = place.save("one", None, &memory_with(&[(0, 1)]));
    let id = first.id.to_string();
    place.save(&id, None, &memory_with(&[(0, 2)]));
    place.save("two", Some(&id), &memory_with(&[(0, 1)]));
    let log = place.store.log().unwrap();
    let two = log.iter().find(|entry| entry.name == "two").unwrap();
    assert_eq!(two.facts.parent, None);
}

#[test]
fn a_snapshot_that_has_the_id_of_a_reference_for_a_name_or_a_tag_is_not_followed() {
    for is_tag in [false, true] {
        let place = Place::new();
        let id = place.refer(5, &memory_with(&[(0, 1)])).id.to_string();
        // Of the same machine, as its own state file says.
        let name = if is_tag { "forged" } else { &id };
        let forged = Destination::Stored {
            place: place.place(None),
            name,
        };
        publish(forged, 5, &memory_with(&[(0, 2)])).unwrap();
        if is_tag {
            place.store.tag("forged", &id).unwrap();
        }
        let refused = place.follow_home().unwrap_err().to_string();
        assert!(refused.contains(&format!("store rm {id}")), "{refused}");
        place.store.rm(&id).unwrap();
        let memory = place.follow_home().unwrap().load().unwrap();
        assert_eq!(mark(&memory, 0), 1);
    }
}

#[test]
fn a_reference_that_promises_another_amount_of_memory_is_not_followed() {
    let place = Place::new();
    place.refer(5, &memory_with(&[(0, 1)]));
    let mut reference = fs::read(place.path("memory")).unwrap();
    reference[16..24].copy_from_slice(&(2 * MIN_MEMORY_BYTES).to_le_bytes());
    let checksum = blake3::hash(&reference[..96]);
    reference[96..].copy_from_slice(checksum.as_bytes());
    fs::write(place.path("memory"), reference).unwrap();
    let refused = place.follow_home().unwrap_err().to_string();
    assert!(refused.contains("take another copy"), "{refused}");
}

#[test]
fn a_reference_is_small_and_leads_to_the_memory() {
    let place = Place::new();
    place.refer(5, &memory_with(&[(0, 1), (LAST, 2)]));
    assert_eq!(fs::metadata(place.path("memory")).unwrap().len(), 128);
    let memory = place.follow_home().unwrap().load().unwrap();
    assert_eq!([0, LAST].map(|gpa| mark(&memory, gpa)), [1, 2]);
    // It is complete in the store, too.
    let name = format!("vm-{}", SnapshotId([5; 16]));
    assert_eq!(mark(&place.open(&name).unwrap().load().unwrap(), 0), 1);
}

#[test]
fn a_reference_that_leads_nowhere_says_why() {
    let (place, other) = (Place::new(), Place::new());
    place.refer(5, &memory_with(&[(0, 1)]));
    let said = |store: Option<StoreAt<'_>>| place.follow(store).unwrap_err().to_string();
    assert!(said(None).contains("--store"), "{}", said(None));
    let foreign = said(Some(at(&other.path("store"))));
    assert!(foreign.contains("another store"), "{foreign}");
    place
        .store
        .rm(&format!("vm-{}", SnapshotId([5; 16])))
        .unwrap();
    let gone = said(Some(at(&place.path("store"))));
    assert!(gone.contains("no snapshot"), "{gone}");
}

#[test]
fn a_crash_between_the_two_renames_loses_no_reference() {
    let place = Place::new();
    place.refer(1, &memory_with(&[(0, 1)]));
    let (old_state, old_memory) = (
        fs::read(place.path("state")).unwrap(),
        fs::read(place.path("memory")).unwrap(),
    );
    place.refer(2, &memory_with(&[(0, 2)]));
    // As if the process had died before the second rename.
    fs::write(place.path("state"), old_state).unwrap();
    let kept = format!(".memory.{}.previous", SnapshotId([1; 16]));
    fs::write(place.path(&kept), old_memory).unwrap();
    let memory = place.follow_home().unwrap().load().unwrap();
    assert_eq!(mark(&memory, 0), 1);
}

#[test]
fn what_is_given_up_leaves_no_name() {
    let place = Place::new();
    let (state, memory) = (place.path("state"), place.path("memory"));
    for to in [
        Destination::Stored {
            place: place.place(None),
            name: "one",
        },
        Destination::Referenced {
            place: place.place(None),
            files: files(&state, &memory),
        },
    ] {
        let guest = memory_with(&[(0, 1)]);
        drop(write(to, &container(1), &guest, &Saving::default()).unwrap());
    }
    assert!(place.store.log().unwrap().is_empty());
    assert!(!state.exists() && !memory.exists());
}

#[test]
fn a_name_is_not_taken_twice() {
    let place = Place::new();
    let memory = memory_with(&[(0, 1)]);
    place.save("one", None, &memory);
    let to = Destination::Stored {
        place: place.place(None),
        name: "one",
    };
    let error = publish(to, 2, &memory).unwrap_err().to_string();
    assert!(error.contains("choose another name"), "{error}");
}

#[test]
fn what_is_no_machine_is_refused() {
    let place = Place::new();
    let file = place.path("file");
    fs::write(&file, "a file").unwrap();
    place.store.save_file("file", &file).unwrap();
    let error = place.open("file").unwrap_err();
    assert!(matches!(error, Error::NotAMachine { .. }), "{error}");
    let error = place.open("nothing").unwrap_err().to_string();
    assert!(error.contains("no snapshot \"nothing\""), "{error}");

    let mut writer = place.store.writer("short", None).unwrap();
    let mut image = writer.image(snapshot::MEMORY_IMAGE).unwrap();
    image.skip_zeros(PAGE_BYTES).unwrap();
    image.finish().unwrap();
    writer.set_manifest(container(1).to_bytes());
    writer.commit().unwrap();
    let error = place.open("short").unwrap_err();
    assert!(matches!(error, Error::NotAMachine { .. }), "{error}");
}

#[test]
fn a_damaged_pack_is_not_loaded() {
    let place = Place::new();
    place.save("one", None, &memory_with(&[(0, 1)]));
    let pack = fs::read_dir(place.path("store/packs"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let mut bytes = fs::read(&pack).unwrap();
    // In the first frame's payload, behind the pack's header and the frame's.
    bytes[145] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let store = at(&place.path("store")).open().unwrap();
    let name = "one";
    let snapshot = Snapshot::open(Source::Stored {
        store: &store,
        name,
    });
    let error = snapshot.unwrap().load().unwrap_err().to_string();
    assert!(error.contains("fsck"), "{error}");
}

#[test]
fn a_store_that_is_not_there_is_named() {
    let error = at(Path::new("/no/store")).open().map(drop).unwrap_err();
    assert!(error.to_string().contains("/no/store"), "{error}");
}

/// A disk of 40 KiB and 512 bytes, of which the parent may have all but one chunk.
struct Disk {
    content: Vec<u8>,
    changed: usize,
    kept: std::sync::atomic::AtomicBool,
}

const CHUNK: usize = 4096;

impl Content for Disk {
    fn pieces(&self, parent: Option<u64>, unit: u64) -> std::io::Result<Vec<Piece>> {
        assert_eq!(unit, CHUNK as u64);
        let len = self.content.len() as u64;
        if parent != Some(len) {
            return Ok(vec![
                Piece::Zeros(CHUNK as u64),
                Piece::Data(len - CHUNK as u64),
            ]);
        }
        self.kept.store(true, std::sync::atomic::Ordering::Relaxed);
        let before = (self.changed * CHUNK) as u64;
        let after = len - before - CHUNK as u64;
        Ok(vec![
            Piece::Kept(before),
            Piece::Data(CHUNK as u64),
            Piece::Kept(after),
        ])
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let kept = self.kept.load(std::sync::atomic::Ordering::Relaxed);
        let changed = self.changed * CHUNK..(self.changed + 1) * CHUNK;
        let wanted = offset as usize..offset as usize + buffer.len();
        // What is kept is not read.
        assert!(!kept || (changed.start <= wanted.start && wanted.end <= changed.end));
        buffer.copy_from_slice(&self.content[wanted]);
        Ok(())
    }
}

#[test]
fn a_disk_is_saved_with_its_machine_and_only_what_has_changed_is_read() {
    let place = Place::new();
    let memory = memory_with(&[(0, 1)]);
    let mut content: Vec<u8> = (0..10 * CHUNK + 512).map(|at| (at / 100) as u8).collect();
    content[..CHUNK].fill(0);
    let mut parent: Option<String> = None;
    for (round, changed) in [4, 9].into_iter().enumerate() {
        content[changed * CHUNK..][..100].fill(0xee);
        let disk = Disk {
            content: content.clone(),
            changed,
            kept: false.into(),
        };
        let name = format!("day{round}");
        let to = Destination::Stored {
            place: place.place(parent.as_deref()),
            name: &name,
        };
        let saving = Saving::default();
        let mut unpublished = write(to, &container(1), &memory, &saving).unwrap();
        assert!(unpublished.keeps_disks());
        unpublished.write_disk(0, &disk, &saving).unwrap();
        let saved = unpublished.publish().unwrap().in_store().unwrap();
        assert_eq!(disk.kept.into_inner(), parent.is_some());
        parent = Some(saved.id.to_string());

        let store = &place.store;
        let opened = Snapshot::open(Source::Stored { store, name: &name }).unwrap();
        let stored = opened.disk(0).unwrap().unwrap();
        let mut found = vec![0; stored.bytes() as usize];
        stored.read(0, &mut found).unwrap();
        assert!(found == content);
        assert!(opened.disk(1).unwrap().is_none());
    }
}
