//! A saved machine in a store: its memory as an image, its state as the manifest.

use std::{ops::Range, path::Path, sync::Arc};

use dedup::{ImageReader, Key, OpenOptions, SnapshotReader, Store, Writer, Zeros};
use memory::{HostPages, Layout, MachineMemory, PAGE_BYTES, host_file};
use saved_state::Container;

use crate::{
    Content, Error, OnDemand, OnLoss, Saving, StorePlace, StoredDisk, UseWorkingSet, Written,
    content,
    image_file::ImageFile,
    on_demand::{First, ToCome},
};

/// The name of the image that is a machine's memory.
pub const MEMORY_IMAGE: &str = "memory";

/// Begins the snapshot `name`. It is complete without its parent, which only makes it faster: one that cannot be built on is no
/// reason not to save.
pub(crate) fn begin(
    StorePlace { store, parent }: StorePlace<'_>,
    name: &str,
) -> Result<Writer, Error> {
    let Some(id) = parent else {
        return store.writer(name, None).map_err(Error::store(name));
    };
    // What does not change is taken from there. So it must be that snapshot, and no other that somebody gave its id for a name.
    let is_it = |writer: &Writer| {
        writer
            .parent_id()
            .is_some_and(|parent| parent.to_string() == id)
    };
    let begun = match store.writer(name, parent) {
        Ok(writer) if is_it(&writer) => Ok(writer),
        Ok(_) => {
            tracing::warn!(
                id,
                "another snapshot has the id of the machine's last for a name"
            );
            store.writer(name, None)
        }
        Err(e) => {
            tracing::warn!(id, "the machine's last snapshot cannot be built on: {e}");
            store.writer(name, None)
        }
    };
    begun.map_err(Error::store(name))
}

/// Begins copies of the memory, of so many bytes, of a machine that goes into a store: they are in memory of the host's that is
/// taken for what is not zero.
pub(crate) fn begin_copies(memory_bytes: u64) -> Result<ImageFile, Error> {
    let file = host_file("fermata-copies", memory_bytes).map_err(Error::io("make", COPIES))?;
    Ok(ImageFile::new(file, memory_bytes))
}

/// Saves `memory`, of `bytes` bytes. Nothing is visible or durable before the writer's commit, which does not look at the
/// memory any more.
pub(crate) fn write_memory(
    writer: &mut Writer,
    unit: u64,
    bytes: u64,
    memory: &impl Content,
    copies: Option<&ImageFile>,
    saving: &Saving,
) -> Result<Written, Error> {
    let stats = content::write(writer, unit, MEMORY_IMAGE, memory, copies, saving)?;
    let data_chunks = stats.known_chunks + stats.new_chunks;
    Ok(Written {
        memory_bytes: bytes,
        data_bytes: (data_chunks * unit).min(bytes),
    })
}

/// What copies of a machine's memory are called in messages: they have no path.
pub(crate) const COPIES: &str = "the copies of the guest's memory";

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
    snapshot: SnapshotReader,
    memory: Arc<ImageReader>,
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
        let stored = Self {
            name,
            id,
            snapshot,
            memory: Arc::new(memory),
        };
        Ok((stored, state))
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn disk(&self, number: usize) -> Result<Option<StoredDisk>, Error> {
        StoredDisk::open(&self.snapshot, number)
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.memory.size()
    }

    /// Reads the memory, and verifies it on the way, into the memory of a machine, made of `pages`.
    pub(crate) fn load(&self, pages: HostPages) -> Result<MachineMemory, Error> {
        MachineMemory::filled(self.layout()?, pages, |image| {
            self.memory
                .load_into(image, Zeros::AlreadyThere)
                .map_err(Error::store(&self.name))
        })
    }

    /// `memory`, which must be of its size, into which this comes; its working set first, if one is kept and `working_set` says so.
    pub(crate) fn load_on_demand(
        &self,
        memory: Option<MachineMemory>,
        working_set: UseWorkingSet,
        on_loss: OnLoss,
    ) -> Result<(MachineMemory, OnDemand), Error> {
        let image = Arc::clone(&self.memory);
        if !image.chunk_bytes().is_multiple_of(PAGE_BYTES) {
            return Err(Error::NotOnDemand {
                what: self.name.clone(),
                reason: "the store's chunks are smaller than a page",
            });
        }
        let layout = self.layout()?;
        let memory = match memory {
            Some(memory) => memory,
            None => MachineMemory::zeroed(layout.clone())?,
        };
        let parts: Vec<Range<u64>> = image.parts().map(|part| image.part(part)).collect();
        let (memory, arrivals) = memory.arriving(&parts)?;
        let facts = self.snapshot.facts().images.iter();
        let zeros = facts
            .filter(|image| image.name == MEMORY_IMAGE)
            .map(|image| image.zero_chunks);
        let zero_bytes = zeros.sum::<u64>().saturating_mul(image.chunk_bytes());
        let to_come = ToCome {
            data_bytes: image.size().saturating_sub(zero_bytes),
            image,
            first: First::of(&self.snapshot, working_set),
        };
        let coming = OnDemand::begin(&self.name, to_come, layout, arrivals, on_loss)?;
        Ok((memory, coming))
    }

    fn layout(&self) -> Result<Layout, Error> {
        Layout::new(self.memory_bytes()).map_err(|e| Error::NotAMachine {
            name: self.name.clone(),
            reason: e.to_string(),
        })
    }
}
