//! Saving a machine: to two files, into a store, or both.

use std::{
    fmt,
    fs::File,
    io::{self, Write},
    path::Path,
};

use dedup::{Saved, Store, Writer};
use memory::MachineMemory;
use saved_state::{Container, Header, SnapshotId};

use crate::{
    Content, Error, PeerAt, Piece, Received, Saving, Written, content, disk,
    files::{Files, PendingFiles},
    granules::{self, Granules},
    hot,
    image::{begin_image, write_image},
    image_file::ImageFile,
    reference::Reference,
    sent::Sender,
    stored,
    transfer::granules_of,
};

/// Where a snapshot is to appear.
#[derive(Clone, Copy)]
pub enum Destination<'a> {
    /// In two files, complete in themselves.
    Files(Files<'a>),
    /// In a store.
    Stored {
        /// Where it is stored.
        place: StorePlace<'a>,
        /// Its name, which nothing in the store has yet.
        name: &'a str,
    },
    /// In a store, under a name made of its id, and in two files of which the memory file is a reference to it.
    Referenced {
        /// Where it is stored.
        place: StorePlace<'a>,
        /// The two files.
        files: Files<'a>,
    },
    /// In this file, which is empty: a hot image. Who made the file seals it.
    Hot(&'a File),
    /// With a peer, which keeps it where it was told to.
    Peer {
        /// The peer.
        at: PeerAt<'a>,
        /// Its name there, which nothing there has yet.
        name: &'a str,
        /// Bytes of the machine's memory.
        memory_bytes: u64,
        /// Who looks whether it is still wanted while the peer is waited for.
        saving: &'a Saving,
    },
}

/// A store, and what it holds already of the machine.
#[derive(Clone, Copy)]
pub struct StorePlace<'a> {
    /// The store.
    pub store: &'a Store,
    /// The machine's last snapshot there, by its id. It need not be there any more.
    pub parent: Option<&'a str>,
}

/// A snapshot that has its place and nothing in it. Dropped, it leaves nothing.
pub struct Draft {
    id: SnapshotId,
    place: Place,
    copies: Copies,
}

/// Copies of memory that were made before the cut, and where they are.
enum Copies {
    /// There are none.
    None,
    /// In the place itself, if what is there can be written over, or in memory.
    In(ImageFile),
    /// With the peer.
    Sent,
}

/// A snapshot whose bytes are written but neither durable nor visible. Dropped, it leaves nothing but, in a
/// store, packs that its next garbage collection removes.
pub struct Unpublished {
    header: Header,
    place: Place,
    /// How much memory was written.
    pub written: Written,
    /// Bytes of the machine's state.
    pub state_bytes: u64,
}

/// Where a snapshot in work is.
enum Place {
    Files(PendingFiles),
    Stored(InStore),
    Referenced {
        stored: InStore,
        files: PendingFiles,
    },
    Hot(File),
    Peer(Box<Sender>),
}

/// Where a snapshot is that is complete and durable.
#[derive(Clone, Debug)]
pub enum Published {
    /// In files, or in a hot image.
    InFiles,
    /// In a store, and perhaps in files that refer to it.
    InStore(Saved),
    /// With a peer.
    WithPeer(Received),
}

impl Published {
    /// What became of it in the store, if that is where it went.
    pub fn in_store(self) -> Option<Saved> {
        match self {
            Self::InStore(saved) => Some(saved),
            Self::InFiles | Self::WithPeer(_) => None,
        }
    }
}

/// A snapshot in work in a store.
struct InStore {
    /// The store's id.
    store: [u8; 16],
    /// Bytes of the store's chunks.
    unit: u64,
    writer: Writer,
}

impl fmt::Debug for Draft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Draft")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Unpublished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unpublished")
            .field("header", &self.header)
            .finish_non_exhaustive()
    }
}

/// Takes the place of the snapshot `id`, where it is not seen yet.
///
/// # Errors
///
/// An [`Error`] that names the file or the snapshot; nothing is left behind, and what was there is untouched.
pub fn begin(to: Destination<'_>, id: SnapshotId) -> Result<Draft, Error> {
    let begin = |place: StorePlace<'_>, name: &str| {
        stored::begin(place, name).map(|writer| InStore {
            store: place.store.id(),
            unit: place.store.chunk_size().into(),
            writer,
        })
    };
    let place = match to {
        Destination::Files(files) => Place::Files(PendingFiles::create(files)?),
        Destination::Stored { place, name } => Place::Stored(begin(place, name)?),
        Destination::Referenced { place, files } => Place::Referenced {
            files: PendingFiles::create(files)?,
            stored: begin(place, &format!("vm-{id}"))?,
        },
        Destination::Hot(file) => {
            Place::Hot(file.try_clone().map_err(Error::io("write", hot::NAME))?)
        }
        Destination::Peer {
            at,
            name,
            memory_bytes,
            saving,
        } => {
            let sender = Sender::begin(at, name, id, memory_bytes, saving)?;
            Place::Peer(Box::new(sender))
        }
    };
    Ok(Draft {
        id,
        place,
        copies: Copies::None,
    })
}

/// Writes `state` and `memory`, all of which is in memory, to where they are not seen yet.
///
/// # Errors
///
/// As of [`begin`] and [`Draft::write`].
pub fn write(
    to: Destination<'_>,
    state: &Container,
    memory: &MachineMemory,
    saving: &Saving,
) -> Result<Unpublished, Error> {
    begin(to, state.header.id)?.write(state, memory, saving)
}

impl Place {
    /// Begins copies of a machine's memory, of so many bytes, that can be written over.
    fn begin_copies(&self, memory_bytes: u64) -> Result<Copies, Error> {
        let image = match self {
            Self::Files(files) => begin_image(&files.memory, memory_bytes),
            Self::Hot(file) => hot::begin(file, memory_bytes),
            Self::Stored(_) | Self::Referenced { .. } => stored::begin_copies(memory_bytes),
            Self::Peer(_) => return Ok(Copies::Sent),
        };
        image.map(Copies::In)
    }

    /// What copies that cannot be written here are.
    fn failed(&self, error: io::Error) -> Error {
        let path = match self {
            Self::Files(files) => files.memory.target(),
            Self::Hot(_) => Path::new(hot::NAME),
            Self::Stored(_) | Self::Referenced { .. } => Path::new(stored::COPIES),
            Self::Peer(sender) => return sender.failed()(error),
        };
        Error::io("write", path)(error)
    }
}

impl Draft {
    /// Whether memory of so many bytes that did not change since the parent can be kept from there, if it is in whole parts of
    /// `unit` bytes.
    pub fn can_keep(&self, memory_bytes: u64, unit: u64) -> bool {
        match &self.place {
            Place::Files(_) | Place::Hot(_) | Place::Peer(_) => false,
            Place::Stored(stored) | Place::Referenced { stored, .. } => {
                let parent = stored.writer.parent_size(stored::MEMORY_IMAGE);
                parent == Some(memory_bytes) && unit.is_multiple_of(stored.unit)
            }
        }
    }

    /// Begins with copies of memory, of so many bytes, that are made before the machine's cut. To files and peers they are streamed;
    /// for a store they are kept in memory.
    ///
    /// # Errors
    ///
    /// What the host says.
    pub fn begin_copies(&mut self, memory_bytes: u64) -> Result<(), Error> {
        self.copies = self.place.begin_copies(memory_bytes)?;
        Ok(())
    }

    /// Whether there are any.
    pub fn has_copies(&self) -> bool {
        !matches!(self.copies, Copies::None)
    }

    /// Has the copy of this granule be `content`.
    pub(crate) fn put(&self, granule: usize, content: &[u8]) -> Result<(), Error> {
        let Copies::In(image) = &self.copies else {
            return Err(no_copies());
        };
        // Nobody cancels it.
        let put = image.put(&[(granule, content)], &Saving::default());
        put.map_err(|error| self.place.failed(error))
    }

    /// What of the copies is not zeros.
    pub(crate) fn copied(&self) -> Vec<Piece> {
        match &self.copies {
            Copies::In(image) => image.pieces(),
            Copies::None | Copies::Sent => Vec::new(),
        }
    }

    /// Copies the parts of `unit` bytes at these offsets of memory, as `read` has them, over what was copied of them before. Those
    /// of which `read` says that it has none are left as they are. Returns how many bytes were copied.
    ///
    /// # Errors
    ///
    /// What `read` or the host says, or that the snapshot is not wanted any more.
    ///
    /// # Panics
    ///
    /// When `read` does.
    pub fn copy(
        &self,
        offsets: &[u64],
        unit: u64,
        read: impl Fn(u64, &mut [u8]) -> io::Result<bool> + Sync,
        saving: &Saving,
    ) -> Result<u64, Error> {
        let ranges: Vec<_> = offsets.iter().map(|at| *at..*at + unit).collect();
        let ranges = granules_of(&ranges);
        saving.begin(offsets.len() as u64 * unit);
        let copied = match (&self.copies, &self.place) {
            (Copies::In(image), _) => granules::write(image, &ranges, read, saving),
            (Copies::Sent, Place::Peer(sender)) => {
                granules::write(&sender.memory(), &ranges, read, saving)
            }
            _ => return Err(no_copies()),
        };
        copied.map_err(|error| self.place.failed(error))
    }

    /// Writes `state`, which has this snapshot's id, and `memory` to where they are not seen yet. A machine that stands still
    /// for it may run on when this returns: what is left, [`Unpublished::publish`], does not look at it.
    ///
    /// # Errors
    ///
    /// An [`Error`] that names the file or the snapshot; nothing is left behind, and what was there is untouched.
    pub fn write(
        self,
        state: &Container,
        memory: &impl Content,
        saving: &Saving,
    ) -> Result<Unpublished, Error> {
        let Self {
            id,
            mut place,
            copies,
        } = self;
        let memory_bytes = state.header.memory_bytes;
        let bytes = state.to_bytes();
        let written = match &mut place {
            Place::Files(files) => {
                let image = match copies {
                    Copies::In(image) => image,
                    _ => begin_image(&files.memory, memory_bytes)?,
                };
                write_image(&files.memory, image, memory, id, saving)?
            }
            Place::Hot(file) => {
                let image = match copies {
                    Copies::In(image) => image,
                    _ => hot::begin(file, memory_bytes)?,
                };
                hot::write(file, state, image, memory, saving)?
            }
            Place::Stored(stored) | Place::Referenced { stored, .. } => {
                let InStore { unit, writer, .. } = stored;
                writer.set_manifest(bytes.clone());
                let copies = match &copies {
                    Copies::In(image) => Some(image),
                    _ => None,
                };
                stored::write_memory(writer, *unit, memory_bytes, memory, copies, saving)?
            }
            Place::Peer(sender) => sender.write(&bytes, memory, saving)?,
        };
        if let Place::Files(files) | Place::Referenced { files, .. } = &place {
            let state = &files.state;
            state
                .file()
                .write_all(&bytes)
                .map_err(Error::io("write", state.target()))?;
        }
        Ok(Unpublished {
            header: state.header.clone(),
            place,
            written,
            state_bytes: bytes.len() as u64,
        })
    }
}

impl Unpublished {
    /// Whether it has a place for disks: in a store, or with a peer that has one.
    pub fn keeps_disks(&self) -> bool {
        match &self.place {
            Place::Stored(_) | Place::Referenced { .. } => true,
            Place::Peer(sender) => sender.keeps_disks(),
            Place::Files(_) | Place::Hot(_) => false,
        }
    }

    /// Saves the machine's disk with this number too, if there is a place for it.
    ///
    /// # Errors
    ///
    /// An [`Error`] that names the image; the snapshot is then useless.
    pub fn write_disk(
        &mut self,
        number: usize,
        content: &impl Content,
        saving: &Saving,
    ) -> Result<(), Error> {
        match &mut self.place {
            Place::Files(_) | Place::Hot(_) => Ok(()),
            Place::Stored(stored) | Place::Referenced { stored, .. } => {
                let InStore { unit, writer, .. } = stored;
                let name = disk::image_name(number);
                content::write(writer, *unit, &name, content, None, saving).map(drop)
            }
            Place::Peer(sender) if sender.keeps_disks() => {
                sender.write_disk(number, content, saving)
            }
            Place::Peer(_) => Ok(()),
        }
    }

    /// Does what takes long and can still be cancelled, after which [`Unpublished::publish`] takes a moment: a peer puts together what it was sent.
    ///
    /// # Errors
    ///
    /// An [`Error`] that names the peer, or that the snapshot is not wanted any more; there is none then.
    pub fn finish(&self, saving: &Saving) -> Result<(), Error> {
        match &self.place {
            Place::Peer(sender) => sender.finish(saving),
            Place::Files(_) | Place::Stored(_) | Place::Referenced { .. } | Place::Hot(_) => Ok(()),
        }
    }

    /// Makes the snapshot durable and gives it its names. When it returns, a power cut does not take it away;
    /// when it fails, what was at the paths is still there, and a store may have it under the name of its id, or the peer under its
    /// name. Returns where it is.
    ///
    /// # Errors
    ///
    /// An [`Error`] that names the file or the snapshot.
    pub fn publish(self) -> Result<Published, Error> {
        let commit = |stored: InStore| {
            let saved = stored.writer.commit();
            saved.map_err(Error::store("the store"))
        };
        match self.place {
            Place::Files(files) => files.publish().map(|()| Published::InFiles),
            // Who made it seals it.
            Place::Hot(_) => Ok(Published::InFiles),
            Place::Stored(stored) => commit(stored).map(Published::InStore),
            Place::Peer(sender) => sender.publish().map(Published::WithPeer),
            Place::Referenced { stored, files } => {
                let store = stored.store;
                let saved = commit(stored)?;
                let reference = Reference {
                    id: self.header.id,
                    memory_bytes: self.header.memory_bytes,
                    store,
                    stored: *saved.id.as_bytes(),
                };
                let memory = &files.memory;
                memory
                    .file()
                    .write_all(&reference.to_bytes())
                    .map_err(Error::io("write", memory.target()))?;
                // Only now: a reference must never be there without what it refers to.
                files.publish()?;
                Ok(Published::InStore(saved))
            }
        }
    }
}

/// Of a draft in which nobody has begun with copies.
fn no_copies() -> Error {
    Error::Read(io::ErrorKind::NotFound.into())
}
