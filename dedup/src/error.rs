//! What can go wrong, and what to do about it.

use std::io;

use crate::store::CONFIG;

/// The result of everything that touches a store.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation on a store failed. Unless a variant says otherwise, the store is as it was before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no store at this place.
    #[error("no store here: create one first, or check the path")]
    NoStore,

    /// A store is there already.
    #[error("there is a store here already: open it instead of creating it")]
    StoreExists,

    /// A store is there, with files in this directory, and has lost its parameters.
    #[error(
        "there is a store here, with files in `{0}`, that has lost its `config`: run `fsck --repair`, which brings it back from a pack, or choose another place"
    )]
    LostConfig(&'static str),

    /// A store has lost its parameters, and nothing in it tells them.
    #[error(
        "the store's `config` is lost or damaged, and no pack has a copy of it: take the file from a copy of the store, or choose another place"
    )]
    NoCopyOfConfig,

    /// The store was written before the first release.
    #[error(
        "the store has format version {found}, which no release has written: export its snapshots with the program that wrote it"
    )]
    OlderStore {
        /// Its version.
        found: u32,
    },
    /// The store was written by a newer release.
    #[error(
        "the store has format version {found}, this release reads up to {supported}: use a newer release"
    )]
    NewerStore {
        /// The version found in the file.
        found: u32,
        /// The newest version this release reads.
        supported: u32,
    },

    /// A file of the store was written by a newer release.
    #[error(
        "{file} has format version {found}, this release reads up to {supported}: use a newer release"
    )]
    NewerFile {
        /// The file, as `area/name`.
        file: String,
        /// The version found in it.
        found: u32,
        /// The newest version this release reads.
        supported: u32,
    },

    /// The store uses a feature that this release does not know.
    #[error(
        "the store needs features that this release lacks (flags {flags:#x}): use a newer release"
    )]
    UnknownFlags {
        /// All flags of the store.
        flags: u32,
    },

    /// The store is encrypted and no key, or another one, was given.
    #[error("the store is encrypted, and {0}: give the key file that it was created with")]
    Key(&'static str),

    /// A parameter is outside of what the format allows.
    #[error("{0}")]
    Parameter(String),

    /// A name that no snapshot, image or tag can have.
    #[error("{0:?} is not a name: use 1 to 128 of A-Z a-z 0-9 . _ -, not beginning with . or -")]
    Name(String),

    /// No snapshot has this name, tag or id.
    #[error("there is no snapshot {0:?}: list those that there are")]
    NoSnapshot(String),

    /// More than one snapshot's id begins like this.
    #[error("{0:?} is the beginning of several snapshot ids: give more of it")]
    Ambiguous(String),

    /// The snapshot has no such image.
    #[error("the snapshot has no image {0:?}: list those that it has")]
    NoImage(String),

    /// The name belongs to another snapshot.
    #[error("there is a snapshot or tag {0:?} already: choose another name or remove it")]
    NameTaken(String),

    /// Two images of a snapshot would have this name.
    #[error("two images of the snapshot would be called {0:?}: give one of them another name")]
    ImageTaken(String),

    /// A file's bytes are not what the format allows.
    #[error("{file} is damaged ({what}): run {}", advice(file))]
    Damaged {
        /// The file, as `area/name`.
        file: String,
        /// What is wrong with it.
        what: &'static str,
    },

    /// A read beyond the end of an image.
    #[error("read of {len} bytes at {offset} is beyond the image's end at {size}")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Size of the image in bytes.
        size: u64,
    },

    /// Another process does what only one can do at a time.
    #[error("another process runs {0} on this store: try again when it has ended")]
    Busy(&'static str),

    /// A repair has written packs anew in which the snapshot in work had found chunks, and may have lost those.
    #[error(
        "packs that the snapshot would refer to were repaired meanwhile: save it again, which stores what they may have lost"
    )]
    Repaired,

    /// What was decoded again was not what had been encoded; nothing was written.
    #[error(
        "a frame did not decode to what was encoded: suspect this machine's memory, and test it"
    )]
    EncodeCheck,

    /// A collection could not free all that it might have: what it could not change is as it was.
    #[error(
        "{bytes} bytes of packs were freed, and not all that could be: see to the cause, and collect again"
    )]
    CollectedInPart {
        /// Bytes of packs freed.
        bytes: u64,
        /// The first of the causes.
        #[source]
        source: Box<Error>,
    },

    /// The disk is full. What was saved before is safe, and of the failed save nothing is visible.
    #[error(
        "no space left in the store: free some, for instance with `rm` and `gc`, and try again"
    )]
    NoSpace(#[source] io::Error),

    /// The store, or a part of it, cannot be written.
    #[error(
        "the store cannot be written: check its permissions and whether its file system is mounted read-only"
    )]
    ReadOnly(#[source] io::Error),

    /// Anything else that reading or writing a file can meet.
    #[error("cannot {what}")]
    Io {
        /// What was attempted, as `verb area/name`.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// Gives an I/O error its place, of what is only read, or is no file of a store's: `what` completes "cannot …".
    pub(crate) fn file(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io {
            what: what.into(),
            source,
        }
    }

    /// Gives an I/O error its place, of what is written to a store: what is in its way is named.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::NoSpace(source),
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
                Error::ReadOnly(source)
            }
            _ => Error::Io {
                what: what.into(),
                source,
            },
        }
    }

    /// Whether a check, too, would say that something is wrong with the store.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Error::Damaged { .. } | Error::LostConfig(_) | Error::NoCopyOfConfig
        )
    }

    /// What is wrong with a file, for a report that names it beside that, and is of the check that is advised elsewhere.
    pub(crate) fn of_its_file(&self) -> String {
        match self {
            Error::Damaged { what, .. } => (*what).to_owned(),
            Error::NewerFile {
                found, supported, ..
            } => format!(
                "it has format version {found}, this release reads up to {supported}: use a newer release"
            ),
            other => other.in_full(),
        }
    }

    /// What happened, and why.
    pub(crate) fn in_full(&self) -> String {
        let mut said = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            said.push_str(&format!(": {error}"));
            cause = error.source();
        }
        said
    }

    /// Whether the file is missing, as opposed to unreadable.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// What to run when a file is damaged. Without `config` there is nothing to check by.
fn advice(file: &str) -> &'static str {
    if file == CONFIG {
        "`fsck --repair`, which brings it back from a pack"
    } else {
        "`fsck`, which names the snapshots it hits"
    }
}

/// A place in a file that breaks the format; becomes [`Error::Damaged`] where the file's name is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) &'static str);

impl Malformed {
    /// Says which file it is.
    pub(crate) fn in_file(self, file: impl std::fmt::Display) -> Error {
        Error::Damaged {
            file: file.to_string(),
            what: self.0,
        }
    }
}
