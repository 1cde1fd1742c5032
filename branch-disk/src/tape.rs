//! What a test's thread did to files, in order, so that a crash can be played at any point of it; and errors of the host.

use std::{
    cell::RefCell,
    fs::File,
    io,
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
    /// This layer is not relied upon any more.
    Gone { layer: PathBuf },
    /// The host refused something.
    Refused,
}

/// What is about to be done, and can be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// Of what is not data; refused, the beginning of it is written.
    Write,
    Sync,
    OpenNames,
    SyncNames,
}

type Host = Box<dyn FnMut(Call) -> io::Result<()>>;

thread_local! {
    static HOST: RefCell<Option<Host>> = const { RefCell::new(None) };
    static TAPE: RefCell<Option<Vec<Event>>> = const { RefCell::new(None) };
}

pub(crate) fn start() {
    TAPE.set(Some(Vec::new()));
}

/// From now on `host` says what becomes of this thread's calls.
pub(crate) fn answer(host: impl FnMut(Call) -> io::Result<()> + 'static) {
    HOST.set(Some(Box::new(host)));
}

/// After `skip` more calls that `which` means, the next fails, and none after it.
pub(crate) fn fail(which: impl Fn(Call) -> bool + 'static, mut skip: u32, kind: io::ErrorKind) {
    let mut done = false;
    answer(move |call| {
        if done || !which(call) {
            return Ok(());
        }
        done = skip == 0;
        skip = skip.saturating_sub(1);
        if done { Err(kind.into()) } else { Ok(()) }
    });
}

/// The host refuses nothing any more.
pub(crate) fn permit() {
    HOST.set(None);
}

pub(crate) fn ask(call: Call) -> io::Result<()> {
    HOST.with_borrow_mut(|host| host.as_mut().map_or(Ok(()), |host| host(call)))
}

pub(crate) fn stop() -> Vec<Event> {
    permit();
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
        // Less was written if it failed where the file ended.
        let there = file.metadata().unwrap().len().saturating_sub(offset);
        let mut bytes = vec![0; len.min(there) as usize];
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
