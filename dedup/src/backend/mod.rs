//! Where a store's files are.
//!
//! A [`Backend`] keeps named, immutable files in a few flat areas. A file is written as a draft that nobody
//! sees and published whole. The library orders its writes with [`Draft::sync`] and [`Backend::sync`]; what a
//! backend promises for these calls is what the store's durability rests on. [`conformance`] checks the rest.

use std::io;
use std::sync::Arc;

pub mod conformance;
mod fault;
mod local;
mod memory;

pub use fault::{Fault, Faulty};
pub use local::LocalDir;
pub use memory::{Files, Memory};

/// A kind of file; a directory of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Area {
    /// `config` alone.
    Root,
    /// Packs of chunks.
    Packs,
    /// Snapshots, by name.
    Snapshots,
    /// Further names of snapshots.
    Tags,
    /// What was learned of snapshots after they were saved.
    Annotations,
    /// Segments of the index.
    Index,
    /// Packs that a running collection may change.
    Condemned,
    /// What repair took out of service.
    Damaged,
}

impl Area {
    /// Every area.
    pub const ALL: [Area; 8] = [
        Area::Root,
        Area::Packs,
        Area::Snapshots,
        Area::Tags,
        Area::Annotations,
        Area::Index,
        Area::Condemned,
        Area::Damaged,
    ];

    /// The directory's name; empty for the root.
    pub fn dir(self) -> &'static str {
        match self {
            Area::Root => "",
            Area::Packs => "packs",
            Area::Snapshots => "snapshots",
            Area::Tags => "tags",
            Area::Annotations => "annotations",
            Area::Index => "index",
            Area::Condemned => "condemned",
            Area::Damaged => "damaged",
        }
    }

    /// The path of a file in messages and reports.
    pub fn path(self, name: &str) -> String {
        match self {
            Area::Root => name.to_owned(),
            _ => format!("{}/{name}", self.dir()),
        }
    }
}

/// A lock that one process can hold at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lock {
    /// Held by a collection or a repair.
    Gc,
    /// Held while segments of the index are merged.
    Index,
}

impl Lock {
    /// The file's name.
    pub fn name(self) -> &'static str {
        match self {
            Lock::Gc => "gc",
            Lock::Index => "index",
        }
    }
}

/// A file in an area.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
}

/// Whether a draft may take the place of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publish {
    /// The name must be free, or [`io::ErrorKind::AlreadyExists`]. Of several at once one wins.
    New,
    /// A file of this name is replaced; who has it open goes on reading the old one.
    Replace,
}

/// A place for the files of one store, shared by threads and, where its kind allows it, by processes.
///
/// # Errors
///
/// Methods give the cause as an [`io::Error`]; [`io::ErrorKind::NotFound`] only where a file is not there.
#[expect(
    clippy::missing_errors_doc,
    reason = "the trait says it for all of them"
)]
pub trait Backend: Send + Sync + 'static {
    /// The files of an area, in no order. An area that cannot be read is an error, never an empty list; one that is not there is
    /// empty only if nothing speaks against it.
    fn list(&self, area: Area) -> io::Result<Vec<Entry>>;

    /// Opens a file. It stays readable, with the same bytes, when it is removed or replaced.
    fn open(&self, area: Area, name: &str) -> io::Result<Arc<dyn ReadAt>>;

    /// Begins a file. Dropped without being published, it leaves nothing.
    fn draft(&self) -> io::Result<Box<dyn Draft>>;

    /// Removes a file.
    fn remove(&self, area: Area, name: &str) -> io::Result<()>;

    /// Makes sure that what was published in, and removed from, an area stays so after a power cut.
    fn sync(&self, area: Area) -> io::Result<()>;

    /// Begins a lease, empty. It ends when it is dropped, and when its process dies.
    fn lease(&self) -> io::Result<Box<dyn Lease>>;

    /// The contents of all leases whose owners live.
    fn leases(&self) -> io::Result<Vec<Vec<u8>>>;

    /// Removes drafts and leases whose owners are dead; gives their number.
    fn clear_dead(&self) -> io::Result<u64>;

    /// Takes a lock until the value is dropped or the process dies; `None` when somebody holds it.
    fn try_lock(&self, lock: Lock) -> io::Result<Option<Box<dyn Send>>>;
}

/// An open file.
pub trait ReadAt: Send + Sync {
    /// Its size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::UnexpectedEof`] when the file ends before.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

/// A file nobody sees yet.
pub trait Draft: Send {
    /// Writes at the end.
    ///
    /// # Errors
    ///
    /// The cause; the draft is then useless.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Makes sure that what was appended survives a power cut, once the file is published.
    ///
    /// # Errors
    ///
    /// The cause; nothing is known then about what survives.
    fn sync(&mut self) -> io::Result<()>;

    /// Gives the file its name, atomically.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::AlreadyExists`] when `how` asks for a free name and it is taken.
    fn publish(self: Box<Self>, area: Area, name: &str, how: Publish) -> io::Result<()>;
}

/// A note to others about what this process relies on.
pub trait Lease: Send {
    /// Adds to it. When this returns, every later [`Backend::leases`] of any process sees it.
    ///
    /// # Errors
    ///
    /// The cause.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
}

impl<B: Backend + ?Sized> Backend for Arc<B> {
    fn list(&self, area: Area) -> io::Result<Vec<Entry>> {
        (**self).list(area)
    }
    fn open(&self, area: Area, name: &str) -> io::Result<Arc<dyn ReadAt>> {
        (**self).open(area, name)
    }
    fn draft(&self) -> io::Result<Box<dyn Draft>> {
        (**self).draft()
    }
    fn remove(&self, area: Area, name: &str) -> io::Result<()> {
        (**self).remove(area, name)
    }
    fn sync(&self, area: Area) -> io::Result<()> {
        (**self).sync(area)
    }
    fn lease(&self) -> io::Result<Box<dyn Lease>> {
        (**self).lease()
    }
    fn leases(&self) -> io::Result<Vec<Vec<u8>>> {
        (**self).leases()
    }
    fn clear_dead(&self) -> io::Result<u64> {
        (**self).clear_dead()
    }
    fn try_lock(&self, lock: Lock) -> io::Result<Option<Box<dyn Send>>> {
        (**self).try_lock(lock)
    }
}
