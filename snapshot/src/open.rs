//! Opening a saved machine, wherever it is.

use std::{
    fmt,
    fs::File,
    io::Read,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use dedup::Store;
use memory::{HostPages, MachineMemory};
use saved_state::{Container, HEADER_BYTES, MAX_BODY_BYTES, SnapshotId};

use crate::{
    Error, OnDemand, OnLoss, Saving, StoredDisk, UseWorkingSet,
    durable::{hidden_name, open_for_reading},
    files::Files,
    hot::{self, Hot},
    image::{self, Image},
    reference::Reference,
    stored::{StoreAt, Stored},
};

/// Where a saved machine is.
pub enum Source<'a> {
    /// In two files.
    Files {
        /// The two files.
        files: Files<'a>,
        /// The store that a memory file may refer to; opened only if it does.
        store: Option<StoreAt<'a>>,
    },
    /// In a store.
    Stored {
        /// The store.
        store: &'a Store,
        /// The snapshot's name, tag or id.
        name: &'a str,
    },
    /// In memory: a hot image.
    Hot(OwnedFd),
}

/// A saved machine that has been opened: the state is checked, and the memory is of the same snapshot.
pub struct Snapshot {
    /// The machine's state.
    pub state: Container,
    memory: Memory,
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("header", &self.state.header)
            .field("stored_as", &self.stored_as())
            .finish_non_exhaustive()
    }
}

/// Where the memory is.
enum Memory {
    Image(Box<Image>),
    Stored(Box<Stored>),
    Hot(Hot),
}

impl Snapshot {
    /// Opens a saved machine. The content of the memory is not read yet.
    ///
    /// # Errors
    ///
    /// An [`Error`] that names the file or the snapshot and says what is wrong with it.
    pub fn open(from: Source<'_>) -> Result<Self, Error> {
        let other_size = |path: &Path| Error::Memory {
            path: path.to_owned(),
            reason: "holds another amount of memory than its state file says; take another copy"
                .to_owned(),
        };
        let (opened, wrong_size) = match from {
            Source::Files { files, store } => (open_files(files, store)?, other_size(files.memory)),
            Source::Stored { store, name } => {
                let (stored, state) = Stored::open(store, name)?;
                let memory = Memory::Stored(Box::new(stored));
                let wrong_size = Error::NotAMachine {
                    name: name.to_owned(),
                    reason: "its memory is not of the size that its state says".to_owned(),
                };
                (Snapshot { state, memory }, wrong_size)
            }
            Source::Hot(fd) => {
                let (hot, state) = Hot::open(fd)?;
                let memory = Memory::Hot(hot);
                (
                    Snapshot { state, memory },
                    other_size(Path::new("the hot image")),
                )
            }
        };
        let held = match &opened.memory {
            Memory::Image(image) => image.memory_bytes(),
            Memory::Stored(stored) => stored.memory_bytes(),
            Memory::Hot(hot) => hot.memory_bytes(),
        };
        if held != opened.state.header.memory_bytes {
            return Err(wrong_size);
        }
        Ok(opened)
    }

    /// Writes the machine into `file`, which is empty, as a hot image: all of its memory is verified on the way. Who made the file
    /// seals it.
    ///
    /// # Errors
    ///
    /// As of [`Snapshot::load`]; what was written is of no use then.
    pub fn write_hot(&self, file: &File) -> Result<(), Error> {
        match &self.memory {
            Memory::Image(image) => hot::write_image(file, &self.state, image),
            // A store verifies what it reads, and the rest needs no more than the seals.
            Memory::Stored(_) | Memory::Hot(_) => {
                let image = hot::begin(file, self.state.header.memory_bytes)?;
                let memory = self.load()?;
                hot::write(file, &self.state, image, &memory, &Saving::default()).map(drop)
            }
        }
    }

    /// Takes the state out, to be consumed section by section.
    pub fn take_state(&mut self) -> Container {
        let empty = Container::new(self.state.header.clone());
        std::mem::replace(&mut self.state, empty)
    }

    /// The id of the snapshot in a store from which it is read, if it is: the parent of what the machine will be.
    pub fn stored_as(&self) -> Option<&str> {
        match &self.memory {
            Memory::Image(_) | Memory::Hot(_) => None,
            Memory::Stored(stored) => Some(stored.id()),
        }
    }

    /// The content of the machine's disk with this number, if it was saved.
    ///
    /// # Errors
    ///
    /// [`Error::Store`].
    pub fn disk(&self, number: usize) -> Result<Option<StoredDisk>, Error> {
        match &self.memory {
            Memory::Image(_) | Memory::Hot(_) => Ok(None),
            Memory::Stored(stored) => stored.disk(number),
        }
    }

    /// The memory, all of it verified. That of a memory file is mapped privately (see
    /// [`MachineMemory::from_image`]), that of a store is read.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] or [`Error::Store`] says where it is damaged; the host may have no room for it.
    pub fn load(&self) -> Result<MachineMemory, Error> {
        self.load_into(HostPages::Any)
    }

    /// As [`Snapshot::load`], into memory of such pages. Huge pages cannot be those of a file, so that all of the memory is read
    /// into them.
    ///
    /// # Errors
    ///
    /// As of [`Snapshot::load`].
    pub fn load_into(&self, pages: HostPages) -> Result<MachineMemory, Error> {
        match &self.memory {
            Memory::Image(image) => image.load(pages),
            Memory::Stored(stored) => stored.load(pages),
            Memory::Hot(hot) => hot.load(pages),
        }
    }

    /// Gives `memory`, which is as of [`MachineMemory::map_over`], the content of the memory; returns whether that was done, which
    /// takes a hot image and memory of its size.
    ///
    /// # Errors
    ///
    /// The host may have no room for it; `memory` is of no use then.
    pub fn load_over(&self, memory: &MachineMemory) -> Result<bool, Error> {
        match &self.memory {
            Memory::Hot(hot) if hot.memory_bytes() == memory.layout().bytes() => {
                hot.load_over(memory)?;
                Ok(true)
            }
            Memory::Hot(_) | Memory::Image(_) | Memory::Stored(_) => Ok(false),
        }
    }

    /// The memory of a store, none of which is there yet: it comes when it is touched, each page verified, and what nobody
    /// touches by the way ([`OnDemand::bring_the_rest`]). `on_loss` is told when somebody waits for a page that cannot be had. It comes
    /// into `memory`, which must be as of [`MachineMemory::arriving`] and of its size, if that is there, and else into new. What is
    /// known of its working set begins to come at once.
    ///
    /// # Errors
    ///
    /// [`Error::NotOnDemand`], [`Error::GuestMemory`] where this cannot be; as of [`Snapshot::load`].
    pub fn load_on_demand(
        &self,
        memory: Option<MachineMemory>,
        working_set: UseWorkingSet,
        on_loss: OnLoss,
    ) -> Result<(MachineMemory, OnDemand), Error> {
        match &self.memory {
            Memory::Image(image) => Err(Error::NotOnDemand {
                what: image.path().display().to_string(),
                reason: "it is a file, which is mapped anyway",
            }),
            Memory::Stored(stored) => stored.load_on_demand(memory, working_set, on_loss),
            Memory::Hot(_) => Err(Error::NotOnDemand {
                what: hot::NAME.to_owned(),
                reason: "it is in memory, which is mapped anyway",
            }),
        }
    }
}

/// How often two files are opened again that somebody has replaced meanwhile.
const OPENED_AGAIN: usize = 8;

fn open_files(files: Files<'_>, store: Option<StoreAt<'_>>) -> Result<Snapshot, Error> {
    let mut state = read_state(files.state)?;
    let mut stood = 0;
    for _ in 0..OPENED_AGAIN {
        let id = state.header.id;
        let error = match open_with(state, files, store) {
            Ok(snapshot) => return Ok(snapshot),
            Err(error) => error,
        };
        // Who saves to the same place replaces one after the other. Where only the memory file is a new one, the old one has another
        // name, until the state file is a new one, too.
        state = read_state(files.state)?;
        stood = match state.header.id == id {
            true => stood + 1,
            false => 0,
        };
        if stood == 2 {
            return Err(error);
        }
    }
    open_with(state, files, store)
}

/// Opens the memory file beside a state file that was read.
fn open_with(
    state: Container,
    files: Files<'_>,
    store: Option<StoreAt<'_>>,
) -> Result<Snapshot, Error> {
    let id = state.header.id;
    let path = memory_file(files, id)?;
    let (found, memory) = match Reference::read(&path)? {
        None => {
            let image = Image::open(&path)?;
            (image.id(), Memory::Image(Box::new(image)))
        }
        Some(reference) => {
            let stored = follow(&path, &reference, store)?;
            (reference.id, Memory::Stored(Box::new(stored)))
        }
    };
    // Once more: somebody may have replaced it meanwhile.
    if found != id {
        return Err(not_together(files, found, id));
    }
    Ok(Snapshot { state, memory })
}

/// The memory file of snapshot `id`: the one that is named, unless a crash between two renames left the
/// right one under its second name.
fn memory_file(files: Files<'_>, id: SnapshotId) -> Result<PathBuf, Error> {
    let path = files.memory;
    let found = id_of(path)?;
    if found == id {
        return Ok(path.to_owned());
    }
    let kept = hidden_name(path, &format!(".{id}.previous"))?;
    if id_of(&kept).is_ok_and(|kept| kept == id) {
        tracing::warn!(path = %kept.display(), "a snapshot was interrupted; the one before it is used");
        return Ok(kept);
    }
    Err(not_together(files, found, id))
}

fn not_together(files: Files<'_>, found: SnapshotId, wanted: SnapshotId) -> Error {
    Error::Memory {
        path: files.memory.to_owned(),
        reason: format!(
            "belongs to snapshot {found}, but {} to snapshot {wanted}; give two files of one snapshot",
            files.state.display(),
        ),
    }
}

/// Opens what a reference refers to.
fn follow(path: &Path, reference: &Reference, store: Option<StoreAt<'_>>) -> Result<Stored, Error> {
    let store = store.ok_or_else(|| Error::NeedsStore {
        path: path.to_owned(),
    })?;
    let bad = |reason: &str| Error::Memory {
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    let store = store.open()?;
    if store.id() != reference.store {
        return Err(bad(
            "refers to another store than the one that was named; name that one",
        ));
    }
    let wanted = hex::encode(reference.stored);
    let (stored, state) = Stored::open(&store, &wanted)?;
    // A name or a tag is found before an id, and whoever sends a snapshot chooses its name.
    if stored.id() != wanted {
        return Err(bad(&format!(
            "refers to snapshot {wanted}, and another one in the store has that for a name or a tag; remove it (`fermata store rm {wanted}`)"
        )));
    }
    if state.header.id != reference.id || stored.memory_bytes() != reference.memory_bytes {
        return Err(bad(
            "refers to another machine's snapshot; take another copy",
        ));
    }
    Ok(stored)
}

/// The snapshot that the memory file at `path` belongs to, without a look at the memory.
pub(crate) fn id_of(path: &Path) -> Result<SnapshotId, Error> {
    match Reference::read(path)? {
        Some(reference) => Ok(reference.id),
        None => image::id_of(path),
    }
}

/// Reads and checks a state file, without its memory file.
///
/// # Errors
///
/// An [`Error`] that names the file and says what is wrong with it.
pub fn read_state(path: &Path) -> Result<Container, Error> {
    Container::from_bytes(&read_state_bytes(path)?).map_err(|source| Error::State {
        path: path.to_owned(),
        source,
    })
}

/// The bytes of what may be a state file: no more of them than one byte beyond what one can have, so that a longer one is recognised.
///
/// # Errors
///
/// An [`Error`] that names the file: when it cannot be read, or is none.
pub fn read_state_bytes(path: &Path) -> Result<Vec<u8>, Error> {
    let file = open_for_reading(path)?;
    // Of a pipe, one would wait for who writes.
    if !file.metadata().map_err(Error::io("read", path))?.is_file() {
        return Err(Error::NotAFile(path.to_owned()));
    }
    let mut bytes = Vec::new();
    let limit = MAX_BODY_BYTES + HEADER_BYTES as u64 + 1;
    file.take(limit)
        .read_to_end(&mut bytes)
        .map_err(Error::io("read", path))?;
    Ok(bytes)
}
