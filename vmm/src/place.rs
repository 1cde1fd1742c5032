//! Places of saved machines, as clients name them, opened.

use control::{Destination, Source, StoreLocation};
use snapshot::{Files, Snapshot, Store, StoreAt, StorePlace};

use crate::error::Error;

/// Where a snapshot goes, with its store opened.
pub(crate) enum OpenDestination<'a> {
    Files(Files<'a>),
    Stored { store: Store, name: &'a str },
    Referenced { store: Store, files: Files<'a> },
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
        })
    }

    /// As `snapshot` takes it, with what the machine was last in the store.
    pub(crate) fn with_parent<'s>(&'s self, parent: Option<&'s str>) -> snapshot::Destination<'s> {
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

fn open_store(location: &StoreLocation) -> Result<Store, Error> {
    Ok(at(location).open()?)
}

fn at(location: &StoreLocation) -> StoreAt<'_> {
    StoreAt {
        directory: &location.directory,
        key_file: location.key_file.as_deref(),
    }
}
