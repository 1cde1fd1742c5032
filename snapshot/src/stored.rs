//! A saved machine in a store: its memory as an image, its state as the manifest.

use std::path::Path;

use dedup::{ImageReader, Key, OpenOptions, Store, Writer, Zeros};
use memory::{Layout, MachineMemory};
use saved_state::Container;

use crate::{Error, Progress, StorePlace, Written, transfer};

/// The name of the image that is a machine's memory.
pub const MEMORY_IMAGE: &str = "memory";

/// Saves `state` and `memory` as the snapshot `name`. Nothing is visible or durable before the writer's commit,
/// which does not look at the memory any more.
pub(crate) fn write(
    StorePlace { store, parent }: StorePlace<'_>,
    name: &str,
    state: &Container,
    memory: &MachineMemory,
    progress: &Progress,
) -> Result<(Writer, Written), Error> {
    let mut writer = begin(store, name, parent).map_err(Error::store(name))?;
    let written = write_memory(store, &mut writer, name, memory, progress)?;
    writer.set_manifest(state.to_bytes());
    Ok((writer, written))
}

/// A snapshot is complete without its parent, which only makes it faster: one that cannot be built on is no
/// reason not to save.
fn begin(store: &Store, name: &str, parent: Option<&str>) -> Result<Writer, dedup::Error> {
    match store.writer(name, parent) {
        Err(e) if parent.is_some() => {
            tracing::warn!(
                parent,
                "the machine's last snapshot cannot be built on: {e}"
            );
            store.writer(name, None)
        }
        begun => begun,
    }
}

fn write_memory(
    store: &Store,
    writer: &mut Writer,
    name: &str,
    memory: &MachineMemory,
    progress: &Progress,
) -> Result<Written, Error> {
    let failed = || Error::store(name);
    let memory_bytes = memory.layout().bytes();
    let populated = memory.populated().map_err(Error::Read)?;
    progress.begin(populated.iter().map(|range| range.end - range.start).sum());
    let mut image = writer.image(MEMORY_IMAGE).map_err(failed())?;
    let mut at = 0;
    for range in populated {
        image.skip_zeros(range.start - at).map_err(failed())?;
        let read = |offset, piece: &mut [u8]| {
            transfer::read_memory(memory, range.start + offset, piece)?;
            progress.advance(piece.len() as u64);
            Ok(())
        };
        let len = range.end - range.start;
        image.write_with(len, read).map_err(failed())?;
        at = range.end;
    }
    image.skip_zeros(memory_bytes - at).map_err(failed())?;
    let stats = image.finish().map_err(failed())?;
    let data_chunks = stats.known_chunks + stats.new_chunks;
    Ok(Written {
        memory_bytes,
        data_bytes: (data_chunks * u64::from(store.chunk_size())).min(memory_bytes),
    })
}

/// Where a store is.
#[derive(Clone, Copy, Debug)]
pub struct StoreAt<'a> {
    /// Its directory.
    pub directory: &'a Path,
    /// The file with its key, if it is encrypted.
    pub key_file: Option<&'a Path>,
}

impl StoreAt<'_> {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// [`Error::Store`] when there is none, or it cannot be opened like this.
    pub fn open(&self) -> Result<Store, Error> {
        let failed = || Error::store(self.directory.display().to_string());
        let key = self.key_file.map(Key::read_file).transpose();
        let options = OpenOptions {
            key: key.map_err(failed())?,
            ..OpenOptions::default()
        };
        Store::open_dir(self.directory, options).map_err(failed())
    }
}

/// A machine's snapshot in a store, whose state is checked.
pub(crate) struct Stored {
    name: String,
    id: String,
    memory: ImageReader,
}

impl Stored {
    /// Opens the snapshot of this name, tag or id.
    pub(crate) fn open(store: &Store, name: &str) -> Result<(Self, Container), Error> {
        let failed = || Error::store(name);
        let snapshot = store.snapshot(name).map_err(failed())?;
        let manifest = snapshot.manifest().map_err(failed())?;
        if manifest.is_empty() {
            return Err(Error::NotAMachine {
                name: name.to_owned(),
                reason: "it has no state".to_owned(),
            });
        }
        let state = Container::from_bytes(&manifest).map_err(|source| Error::StoredState {
            name: name.to_owned(),
            source,
        })?;
        let memory = snapshot.image(MEMORY_IMAGE).map_err(failed())?;
        let id = snapshot.id().to_string();
        let name = name.to_owned();
        Ok((Self { name, id, memory }, state))
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.memory.size()
    }

    /// Reads the memory, and verifies it on the way, into the memory of a machine.
    pub(crate) fn load(&self) -> Result<MachineMemory, Error> {
        let layout = Layout::new(self.memory_bytes()).map_err(|e| Error::NotAMachine {
            name: self.name.clone(),
            reason: e.to_string(),
        })?;
        MachineMemory::filled(layout, |image| {
            self.memory
                .load_into(image, Zeros::AlreadyThere)
                .map_err(Error::store(&self.name))
        })
    }
}
