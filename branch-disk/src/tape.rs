//! What a test's thread did to files, in order, so that a crash can be played at any point of it.

use std::{
    cell::RefCell,
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

#[derive(Clone, Debug)]
pub(crate) enum Event {
    Created {
        inode: u64,
        bytes: u64,
    },
    Wrote {
        inode: u64,
        offset: u64,
        bytes: Vec<u8>,
    },
    Zeroed {
        inode: u64,
        offset: u64,
        len: u64,
    },
    Synced {
        inode: u64,
    },
    Linked {
        inode: u64,
        name: PathBuf,
    },
    Renamed {
        from: PathBuf,
        to: PathBuf,
    },
    Removed {
        name: PathBuf,
    },
    SyncedNames,
    /// The test's own.
    Told(Told),
}

#[derive(Clone, Debug)]
pub(crate) enum Told {
    /// These sectors are going to have this content.
    Begins { start: u64, end: u64, stamp: u32 },
    /// All that has begun is on the disk.
    Flushed,
    /// This layer can be relied upon, and has this content.
    Snapshot { layer: PathBuf, content: Vec<u32> },
}

thread_local! {
    static TAPE: RefCell<Option<Vec<Event>>> = const { RefCell::new(None) };
}

pub(crate) fn start() {
    TAPE.set(Some(Vec::new()));
}

pub(crate) fn stop() -> Vec<Event> {
    TAPE.take().unwrap_or_default()
}

pub(crate) fn note(event: Event) {
    TAPE.with_borrow_mut(|tape| {
        if let Some(tape) = tape {
            tape.push(event);
        }
    });
}

fn running() -> bool {
    TAPE.with_borrow(Option::is_some)
}

fn inode(file: &File) -> u64 {
    file.metadata().unwrap().ino()
}

pub(crate) fn created(file: &File) {
    if running() {
        note(Event::Created {
            inode: inode(file),
            bytes: file.metadata().unwrap().len(),
        });
    }
}

pub(crate) fn wrote(file: &File, offset: u64, len: u64) {
    if running() {
        let mut bytes = vec![0; len as usize];
        file.read_exact_at(&mut bytes, offset).unwrap();
        note(Event::Wrote {
            inode: inode(file),
            offset,
            bytes,
        });
    }
}

pub(crate) fn zeroed(file: &File, offset: u64, len: u64) {
    if running() {
        note(Event::Zeroed {
            inode: inode(file),
            offset,
            len,
        });
    }
}

pub(crate) fn synced(file: &File) {
    if running() {
        note(Event::Synced { inode: inode(file) });
    }
}

pub(crate) fn synced_names() {
    note(Event::SyncedNames);
}

pub(crate) fn linked(file: &File, name: &Path) {
    if running() {
        note(Event::Linked {
            inode: inode(file),
            name: name.to_owned(),
        });
    }
}

pub(crate) fn renamed(from: &Path, to: &Path) {
    note(Event::Renamed {
        from: from.to_owned(),
        to: to.to_owned(),
    });
}

pub(crate) fn removed(name: &Path) {
    note(Event::Removed {
        name: name.to_owned(),
    });
}
