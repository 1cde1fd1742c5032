//! Hot images: what is sealed is believed, and nothing else is.

#![allow(clippy::unwrap_used)] // a test that cannot go on should stop

use std::{
    fs::{self, File},
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::PathBuf,
};

use memory::{Layout, MachineMemory};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use snapshot::{Destination, Error, Files, Saving, Snapshot, Source, write};
use vm_memory::{Bytes, GuestAddress};

#[path = "support/mod.rs"]
mod support;
use support::{LAST, container, mark, memory_with};

const ALL: SealFlags = SealFlags::WRITE
    .union(SealFlags::GROW)
    .union(SealFlags::SHRINK);

fn memfd() -> File {
    memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .unwrap()
        .into()
}

/// A hot image of `memory`, not yet sealed.
fn image(memory: &MachineMemory) -> File {
    let file = memfd();
    let saving = Saving::default();
    let written = write(Destination::Hot(&file), &container(7), memory, &saving).unwrap();
    written.publish().unwrap();
    file
}

fn open(file: &File) -> Result<Snapshot, Error> {
    Snapshot::open(Source::Hot(OwnedFd::from(file.try_clone().unwrap())))
}

fn sealed(file: &File) -> Result<Snapshot, Error> {
    fcntl_add_seals(file, ALL).unwrap();
    open(file)
}

#[test]
fn any_number_of_machines_have_the_memory_of_one_and_none_sees_the_others() {
    let memory = memory_with(&[(0, 1), (5 << 20, 2), (LAST, 3)]);
    let file = image(&memory);
    // The machine goes on.
    memory.guest().write_obj(9u8, GuestAddress(0)).unwrap();
    let snapshot = sealed(&file).unwrap();
    assert_eq!(snapshot.state.header.id, container(7).header.id);
    let forks = [0, 1].map(|_| snapshot.load().unwrap());
    for (fork, written) in forks.iter().zip([11u8, 12]) {
        let marks = [0, 5 << 20, LAST, 6 << 20].map(|gpa| mark(fork, gpa));
        assert_eq!(marks, [1, 2, 3, 0]);
        fork.guest().write_obj(written, GuestAddress(0)).unwrap();
    }
    assert_eq!(forks.each_ref().map(|fork| mark(fork, 0)), [11, 12]);
    assert_eq!(mark(&snapshot.load().unwrap(), 0), 1);
}

#[test]
fn memory_that_was_there_before_gets_the_content_where_it_is() {
    let memory = memory_with(&[(0, 1), (5 << 20, 2), (LAST, 3)]);
    let snapshot = sealed(&image(&memory)).unwrap();
    let before = MachineMemory::zeroed(memory.layout().clone()).unwrap();
    let addresses = |memory: &MachineMemory| memory.host_addresses().collect::<Vec<_>>();
    let at = addresses(&before);
    assert!(snapshot.load_over(&before).unwrap());
    assert_eq!(addresses(&before), at);
    let marks = [0, 5 << 20, LAST, 6 << 20].map(|gpa| mark(&before, gpa));
    assert_eq!(marks, [1, 2, 3, 0]);
    before.guest().write_obj(9u8, GuestAddress(0)).unwrap();
    assert_eq!(mark(&snapshot.load().unwrap(), 0), 1);
    // Saved again it is what it is now: what it has from the image is known to be there.
    let again = sealed(&image(&before)).unwrap().load().unwrap();
    assert_eq!([0, LAST].map(|gpa| mark(&again, gpa)), [9, 3]);
    let larger = Layout::new(memory.layout().bytes() + (64 << 20)).unwrap();
    let larger = MachineMemory::zeroed(larger).unwrap();
    assert!(!snapshot.load_over(&larger).unwrap());
    assert!(!Saved::new(&memory).open().load_over(&before).unwrap());
}

#[test]
fn what_can_still_be_changed_is_refused() {
    let memory = memory_with(&[(0, 1)]);
    let file = image(&memory);
    let some = [SealFlags::GROW, SealFlags::SHRINK, SealFlags::WRITE];
    for seal in some {
        assert!(matches!(open(&file), Err(Error::NotSealed)));
        fcntl_add_seals(&file, seal).unwrap();
    }
    open(&file).unwrap();
    // A file that is none of memory, with the same bytes.
    let plain = tempfile::tempfile().unwrap();
    std::io::copy(&mut &file, &mut &plain).unwrap();
    assert!(matches!(open(&plain), Err(Error::NotSealed)));
    let pipe = rustix::pipe::pipe().unwrap().0;
    let pipe = Snapshot::open(Source::Hot(pipe));
    assert!(matches!(pipe, Err(Error::NotSealed)));
}

#[test]
fn what_is_sealed_and_no_image_is_refused() {
    let memory = memory_with(&[(0, 1)]);
    let empty = sealed(&memfd()).unwrap_err().to_string();
    assert!(empty.contains("too short"), "{empty}");
    let len = image(&memory).metadata().unwrap().len();
    // Of another length, of another kind, with another length of each part, and with another state.
    let damages: [(u64, &[u8]); 6] = [
        (len, b"more"),
        (len - 32, b"X"),
        (len - 24, &[1]),
        (len - 16, &[9]),
        (len - 8, &[1]),
        (len - 40, &[0x55]),
    ];
    for (at, bytes) in damages {
        let file = image(&memory);
        file.write_all_at(bytes, at).unwrap();
        let refused = sealed(&file);
        assert!(
            matches!(refused, Err(Error::Memory { .. } | Error::State { .. })),
            "{at} {refused:?}"
        );
    }
}

/// A machine in two files.
struct Saved {
    directory: tempfile::TempDir,
}

impl Saved {
    fn new(memory: &MachineMemory) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let saved = Self { directory };
        let [state, file] = saved.paths();
        let files = Files {
            state: &state,
            memory: &file,
        };
        let saving = Saving::default();
        let to = Destination::Files(files);
        let written = write(to, &container(7), memory, &saving).unwrap();
        written.publish().unwrap();
        saved
    }

    fn paths(&self) -> [PathBuf; 2] {
        ["state", "memory"].map(|name| self.directory.path().join(name))
    }

    fn open(&self) -> Snapshot {
        let [state, memory] = self.paths();
        let files = Files {
            state: &state,
            memory: &memory,
        };
        Snapshot::open(Source::Files { files, store: None }).unwrap()
    }
}

#[test]
fn a_saved_machine_becomes_an_image_and_its_file_no_longer_matters() {
    let saved = Saved::new(&memory_with(&[(0, 1), (5 << 20, 2), (LAST, 3)]));
    let file = memfd();
    saved.open().write_hot(&file).unwrap();
    let snapshot = sealed(&file).unwrap();
    fs::write(&saved.paths()[1], "").unwrap();
    let fork = snapshot.load().unwrap();
    let marks = [0, 5 << 20, LAST, 6 << 20].map(|gpa| mark(&fork, gpa));
    assert_eq!(marks, [1, 2, 3, 0]);
    // And one of an image.
    let again = memfd();
    snapshot.write_hot(&again).unwrap();
    assert_eq!(mark(&sealed(&again).unwrap().load().unwrap(), LAST), 3);
}

#[test]
fn a_damaged_file_becomes_no_image() {
    let saved = Saved::new(&memory_with(&[(5 << 20, 2)]));
    let [_, path] = saved.paths();
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&[3], 5 << 20).unwrap();
    let refused = saved.open().write_hot(&memfd()).unwrap_err();
    assert!(refused.to_string().contains("checksum mismatch"));
}
