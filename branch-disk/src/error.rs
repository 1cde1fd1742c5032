//! Why a branching disk could not be opened or changed.

use std::{
    error::Error as _,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use crate::{
    header::LayerId,
    layout::{MAX_BYTES, MAX_DEPTH, SECTOR_BYTES},
    name,
};

/// An error of a branching disk. Its text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused.
    #[error("cannot {doing} {}{}", path.display(), next_step(doing, source.kind()))]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// A file is not there on which another stands.
    #[error("{} is not there, and {} stands on it; put it back", path.display(), child.display())]
    NotThere {
        /// The file.
        path: PathBuf,
        /// What stands on it.
        child: Box<Path>,
    },
    /// The file has no layer's magic.
    #[error(
        "{} is no branching disk; attach a raw image without `format=branch`, or make a disk on top of it with `fermata disk create --base`",
        path.display()
    )]
    NotALayer {
        /// The file.
        path: PathBuf,
    },
    /// The file is of a later format.
    #[error("{} is a disk of format {version}, which this release does not know; use a newer fermata", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        version: u32,
    },
    /// The file contradicts itself or its checksums.
    #[error("{} is damaged: {what}; go back to a snapshot before it, or to a copy", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// Another process has it.
    #[error("the disk {} is in use by another machine; stop that one, or branch from a snapshot of it", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// A sealed layer was to be written to.
    #[error("{} is sealed and never changes; write to a branch of it (`fermata disk branch`)", path.display())]
    Sealed {
        /// The layer.
        path: PathBuf,
    },
    /// A head was to be written to by the name that it has when it is sealed.
    #[error(
        "{} is called as it will be when it is sealed: a machine ended while its disk went on in a new layer; write to that one, which is called as the disk is, or give this one another name (`mv`) first",
        path.display()
    )]
    SealedName {
        /// The name.
        path: PathBuf,
    },
    /// A layer that is still written to was to be branched from.
    #[error("{} is not sealed, so it can change; branch from a layer that is, or let `fermata disk branch` seal it", path.display())]
    NotSealed {
        /// The layer.
        path: PathBuf,
    },
    /// The rule forbids a file of the chain.
    #[error("{} may not be part of a disk here; move it to where disks are served from", path.display())]
    NotAllowed {
        /// The file.
        path: PathBuf,
    },
    /// What is at a parent's place is another layer.
    #[error("{} is not the layer {expected}; put that one in its place", path.display())]
    OtherLayer {
        /// What was found.
        path: PathBuf,
        /// What should be there.
        expected: LayerId,
    },
    /// The base is not what it was.
    #[error("the base {} has changed since layers were put on it; put back what it was, for they are of no use on anything else", path.display())]
    BaseChanged {
        /// The base.
        path: PathBuf,
    },
    /// It is no file that a disk can be of.
    #[error("{} is no regular file", path.display())]
    NotAFile {
        /// What it is.
        path: PathBuf,
    },
    /// There is something of that name.
    #[error("{} exists; choose another name, or remove it", path.display())]
    Exists {
        /// The name.
        path: PathBuf,
    },
    /// There can be no disk of that size.
    #[error(
        "a disk of {0} bytes cannot be: it must be a multiple of {SECTOR_BYTES}, at least as large as what it stands on, and at most {MAX_BYTES}"
    )]
    Size(u64),
    /// A raw image that a disk was to stand on does not end with a sector.
    #[error(
        "the base {} has {bytes} bytes, which is no multiple of {SECTOR_BYTES}; make it longer (`truncate --size=%{SECTOR_BYTES}`), or make a disk of it with `fermata disk import`",
        path.display()
    )]
    BaseSize {
        /// The base.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// There can be no disk as large as an image.
    #[error(
        "the image {} has {bytes} bytes, and a disk at least {SECTOR_BYTES} and at most {MAX_BYTES}; import another",
        path.display()
    )]
    ImageSize {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// It would lose what is at its end.
    #[error(
        "the disk {} has {now} bytes and cannot be made to have {bytes}; disks only grow",
        path.display()
    )]
    Smaller {
        /// The head.
        path: PathBuf,
        /// The size that it was to have.
        bytes: u64,
        /// The size that it has.
        now: u64,
    },
    /// There is nothing that gives a new disk its size.
    #[error("a disk that stands on nothing needs a size")]
    NoSize,
    /// The chain is as long as it can be.
    #[error("{} stands on {MAX_DEPTH} layers, the most there can be; merge them with `fermata disk merge`", path.display())]
    TooDeep {
        /// The disk.
        path: PathBuf,
    },
    /// Its depth is the greatest that there can be.
    #[error(
        "no more layers can stand on {}, whatever is merged; make a new disk of it with `fermata disk export` and `fermata disk import`",
        path.display()
    )]
    Deepest {
        /// The disk.
        path: PathBuf,
    },
    /// There is no room behind the name for what is put there when it is sealed.
    #[error(
        "the name of {} is too long; a disk's has at most {} bytes, as there are {} more behind it when it is sealed",
        path.display(),
        name::MAX_DISK_BYTES,
        name::SEALED_BYTES
    )]
    LongName {
        /// The path.
        path: PathBuf,
    },
    /// The path does not fit into a header.
    #[error("the path {} is not UTF-8, or too long; use another", path.display())]
    Path {
        /// The path.
        path: PathBuf,
    },
}

/// What can be done when the host refuses this, to be put behind it.
fn next_step(doing: &str, kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::NotFound if matches!(doing, "create" | "name") => "; choose another directory",
        ErrorKind::NotFound => "; give the path of what is there",
        ErrorKind::PermissionDenied => "; have its owner permit it",
        ErrorKind::ReadOnlyFilesystem => "; choose another directory",
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "; make room where it is",
        _ => "",
    }
}

impl Error {
    /// Its text and that of its cause, for a log.
    pub fn with_cause(&self) -> String {
        match self.source() {
            Some(cause) => format!("{self}: {cause}"),
            None => self.to_string(),
        }
    }

    /// For `map_err`.
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            doing,
            path,
            source,
        }
    }

    /// For `map_err`.
    pub(crate) fn errno(
        doing: &'static str,
        path: &Path,
    ) -> impl FnOnce(rustix::io::Errno) -> Self {
        let failed = Self::io(doing, path);
        move |errno| failed(errno.into())
    }

    pub(crate) fn damaged(path: &Path, what: &'static str) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            what,
        }
    }
}
