//! Why a snapshot could not be written or opened.

use std::{io, path::PathBuf};

use rustix::io::Errno;

use crate::PeerError;

/// An error that names the file it is about.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The two files of a snapshot are one.
    #[error("state and memory cannot both go to {0}; give two paths")]
    SamePath(PathBuf),
    /// The path names no file in a directory.
    #[error("{0} is not the path of a file; give the directory and the name of the file to write")]
    NoFileName(PathBuf),
    /// What is there is a device or a pipe, say.
    #[error("{0} is not a file; name one")]
    NotAFile(PathBuf),
    /// The file system has no room.
    #[error("there is no space left to write {path}; free some, or choose another file system")]
    NoSpace {
        /// The file that was to be written.
        path: PathBuf,
    },
    /// What was to be replaced cannot be kept until what replaces it is complete.
    #[error(
        "{path} cannot be kept until the snapshot that replaces it is complete: {source}; move it away, or choose another path"
    )]
    NotKept {
        /// The file that was to be replaced.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file is not there.
    #[error("{path} does not exist; check the path")]
    NotFound {
        /// The file looked for.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The state file cannot be believed.
    #[error("{path}: {source}")]
    State {
        /// The state file.
        path: PathBuf,
        /// Why.
        source: saved_state::Error,
    },
    /// The memory file cannot be believed.
    #[error("{path} {reason}")]
    Memory {
        /// The memory file.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// The store refused, or what is in it cannot be believed.
    #[error("{what}: {}", in_full(cause))]
    Store {
        /// The store, or the snapshot in it.
        what: String,
        /// What the store said.
        cause: dedup::Error,
    },
    /// A state in the store cannot be believed.
    #[error("the state of snapshot {name}: {source}")]
    StoredState {
        /// The snapshot.
        name: String,
        /// Why.
        source: saved_state::Error,
    },
    /// The snapshot is in the store, but is not that of a machine.
    #[error("{name} is in the store, but is not a machine's snapshot: {reason}")]
    NotAMachine {
        /// The snapshot.
        name: String,
        /// Why.
        reason: String,
    },
    /// What is kept of a snapshot's working set cannot be believed.
    #[error("snapshot {name}: {malformed}")]
    WorkingSet {
        /// The snapshot.
        name: String,
        /// Why.
        malformed: crate::Malformed,
    },
    /// A memory file refers to a store, and none was named.
    #[error(
        "{path} refers to memory in a store, and no store was named: name it by --store, to the server or to the command"
    )]
    NeedsStore {
        /// The memory file.
        path: PathBuf,
    },
    /// What was given as a hot image can still be changed.
    #[error(
        "the hot image is not a sealed memfd, so that nobody can know what is in it; `fermata fork` makes one"
    )]
    NotSealed,
    /// Memory is to come on demand, and cannot.
    #[error("the memory of {what} cannot come on demand: {reason}; restore it without that")]
    NotOnDemand {
        /// The memory file, or the snapshot.
        what: String,
        /// Why.
        reason: &'static str,
    },
    /// A snapshot that was to be sent is not with its peer.
    #[error("the peer at {address} {cause}")]
    Peer {
        /// The peer.
        address: String,
        /// Why.
        cause: PeerError,
    },
    /// A snapshot that comes does not come any more.
    #[error("the sender {0}")]
    Sender(#[source] PeerError),
    /// A snapshot that comes is not kept.
    #[error("{0}")]
    Refused(String),
    /// There is a snapshot of that name.
    #[error("there is a snapshot {0:?} here already; choose another name or remove it")]
    NameTaken(String),
    /// There is no thread to bring memory, or to keep a snapshot.
    #[error(
        "a thread that is needed for a snapshot cannot be started: {0}; the host is out of threads"
    )]
    Thread(#[source] io::Error),
    /// Guest memory could not be had or read.
    #[error("{0}")]
    GuestMemory(#[from] memory::Error),
    /// Guest memory could not be read.
    #[error("the guest's memory cannot be read: {0}")]
    Read(#[source] io::Error),
}

/// An error with what it came from: a client gets nothing but the text.
pub(crate) fn in_full(error: &dedup::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        text += &format!(": {source}");
        cause = source.source();
    }
    text
}

impl Error {
    /// Names the file and what was tried with it.
    pub(crate) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound { path },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { path },
            _ => Self::Io { what, path, source },
        }
    }

    /// Names the store, or the snapshot in it.
    pub(crate) fn store(what: impl Into<String>) -> impl FnOnce(dedup::Error) -> Self {
        let what = what.into();
        move |cause| Self::Store { what, cause }
    }

    /// As [`Error::io`], for errors of rustix.
    pub(crate) fn errno(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(Errno) -> Self {
        let named = Self::io(what, path);
        move |errno| named(errno.into())
    }
}
