//! Where saved machines are: in files, in a store, or in files that refer to a store.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A store of snapshots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreLocation {
    /// Its directory; absolute.
    pub directory: PathBuf,
    /// The file with its key, if it is encrypted; absolute.
    #[serde(default)]
    pub key_file: Option<PathBuf>,
}

/// Where a snapshot goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Destination {
    /// Into two files. Those that are there are replaced when the new ones are whole.
    Files {
        /// Where the state file goes; absolute.
        state: PathBuf,
        /// Where the memory file goes; absolute, and not the same.
        memory: PathBuf,
    },
    /// Into a store.
    Stored {
        /// The store.
        store: StoreLocation,
        /// A name that nothing there has yet.
        name: String,
    },
    /// Into a store, and into two files of which the memory file is a small reference to it.
    Referenced {
        /// The store.
        store: StoreLocation,
        /// Where the state file goes; absolute.
        state: PathBuf,
        /// Where the memory file goes; absolute, and not the same.
        memory: PathBuf,
    },
    /// Into a memfd: a hot image, which who made the memfd seals.
    Image {
        /// Where the memfd is open, like `/proc/<pid>/fd/<number>`; absolute.
        path: PathBuf,
    },
    /// To another fermata, which keeps it.
    Peer {
        /// Where that listens, like `host:7070`.
        address: String,
        /// The file with the key that both have; absolute.
        key_file: PathBuf,
        /// A name that nothing there has yet.
        name: String,
    },
}

/// Where a saved machine comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Source {
    /// From two files.
    Files {
        /// The state file; absolute.
        state: PathBuf,
        /// The memory file; absolute.
        memory: PathBuf,
        /// The store that the memory file may refer to.
        #[serde(default)]
        store: Option<StoreLocation>,
    },
    /// From a store.
    Stored {
        /// The store.
        store: StoreLocation,
        /// The snapshot's name, tag or id.
        name: String,
    },
}

impl Source {
    /// Two files that need no store.
    #[must_use]
    pub fn files(state: impl Into<PathBuf>, memory: impl Into<PathBuf>) -> Self {
        Self::Files {
            state: state.into(),
            memory: memory.into(),
            store: None,
        }
    }
}

impl Destination {
    /// Two files that need no store.
    #[must_use]
    pub fn files(state: impl Into<PathBuf>, memory: impl Into<PathBuf>) -> Self {
        Self::Files {
            state: state.into(),
            memory: memory.into(),
        }
    }

    /// Whether all its paths are absolute: a VMM works in a directory of its own.
    #[must_use]
    pub fn is_absolute(&self) -> bool {
        let (store, files) = match self {
            Self::Image { path } | Self::Peer { key_file: path, .. } => return path.is_absolute(),
            Self::Files { state, memory } => (None, Some((state, memory))),
            Self::Stored { store, .. } => (Some(store), None),
            Self::Referenced {
                store,
                state,
                memory,
            } => (Some(store), Some((state, memory))),
        };
        let absolute = |store: &StoreLocation| {
            let key_file = store.key_file.as_ref();
            store.directory.is_absolute() && key_file.is_none_or(|file| file.is_absolute())
        };
        store.is_none_or(absolute)
            && files.is_none_or(|(state, memory)| state.is_absolute() && memory.is_absolute())
    }
}
