//! Places of saved machines, as clients name them, opened.

use std::{fs::File, os::fd::OwnedFd, path::Path};

use control::{Destination, Source, StoreLocation};
use rustix::fs::{SealFlags, fcntl_get_seals};
use snapshot::{Files, PeerAt, Saving, Snapshot, Store, StoreAt, StorePlace};

use crate::error::Error;

/// Where a snapshot goes, with its store opened.
pub(crate) enum OpenDestination<'a> {
    Files(Files<'a>),
    Stored { store: Store, name: &'a str },
    Referenced { store: Store, files: Files<'a> },
    Hot(File),
    Peer { at: PeerAt<'a>, name: &'a str },
}

impl<'a> OpenDestination<'a> {
    pub(crate) fn new(to: &'a Destination) -> Result<Self, Error> {
        Ok(match to {
            Destination::Files { state, memory } => Self::Files(Files { state, memory }),
            Destination::Stored { store, name } => Self::Stored {
                store: open_store(store)?,
                name,
            },
            Destination::Referenced {
                store,
                state,
                memory,
            } => Self::Referenced {
                store: open_store(store)?,
                files: Files { state, memory },
            },
            Destination::Image { path } => Self::Hot(open_memfd(path)?),
            Destination::Peer {
                address,
                key_file,
                name,
            } => Self::Peer {
                at: PeerAt { address, key_file },
                name,
            },
        })
    }

    /// Whether a snapshot there has the disks with it, as far as is known beforehand.
    pub(crate) fn keeps_disks(&self) -> bool {
        match self {
            Self::Stored { .. } | Self::Referenced { .. } => true,
            Self::Files(_) | Self::Hot(_) | Self::Peer { .. } => false,
        }
    }

    /// As `snapshot` takes it for a machine with so many bytes of memory, with what it was last in the store. While it has to be waited for, it is looked
    /// whether the snapshot is still wanted.
    pub(crate) fn of_machine<'s>(
        &'s self,
        parent: Option<&'s str>,
        memory_bytes: u64,
        saving: &'s Saving,
    ) -> snapshot::Destination<'s> {
        match self {
            Self::Files(files) => snapshot::Destination::Files(*files),
            Self::Stored { store, name } => snapshot::Destination::Stored {
                place: StorePlace { store, parent },
                name,
            },
            Self::Referenced { store, files } => snapshot::Destination::Referenced {
                place: StorePlace { store, parent },
                files: *files,
            },
            Self::Hot(file) => snapshot::Destination::Hot(file),
            Self::Peer { at, name } => snapshot::Destination::Peer {
                at: *at,
                name,
                memory_bytes,
                saving,
            },
        }
    }
}

/// Opens a saved machine.
pub(crate) fn open(source: &Source) -> Result<Snapshot, Error> {
    let opened = match source {
        Source::Files {
            state,
            memory,
            store,
        } => Snapshot::open(snapshot::Source::Files {
            files: Files { state, memory },
            store: store.as_ref().map(at),
        }),
        Source::Stored { store, name } => {
            let store = open_store(store)?;
            let store = &store;
            Snapshot::open(snapshot::Source::Stored { store, name })
        }
    };
    Ok(opened?)
}

/// Opens a hot image.
pub(crate) fn open_image(image: OwnedFd) -> Result<Snapshot, Error> {
    Ok(Snapshot::open(snapshot::Source::Hot(image))?)
}

/// Opens a memfd that a hot image goes into: one that is empty and can be sealed, and no file that was there before.
fn open_memfd(path: &Path) -> Result<File, Error> {
    let place = || path.display().to_string();
    let opened = File::options().read(true).write(true).open(path);
    let file = opened.map_err(|source| Error::ImageOpen {
        path: place(),
        source,
    })?;
    // That it can be no program is nothing against it.
    let can_be_sealed = fcntl_get_seals(&file).is_ok_and(|seals| SealFlags::EXEC.contains(seals));
    let empty = file.metadata().is_ok_and(|metadata| metadata.len() == 0);
    if !(can_be_sealed && empty) {
        return Err(Error::NoMemfd { path: place() });
    }
    Ok(file)
}

fn open_store(location: &StoreLocation) -> Result<Store, Error> {
    Ok(at(location).open()?)
}

fn at(location: &StoreLocation) -> StoreAt<'_> {
    StoreAt {
        directory: &location.directory,
        key_file: location.key_file.as_deref(),
    }
}
