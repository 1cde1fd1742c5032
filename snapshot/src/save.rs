//! Saving a machine: to two files, into a store, or both.

use std::{fmt, io::Write};

use dedup::{Saved, Store, Writer};
use memory::MachineMemory;
use saved_state::{Container, Header};

use crate::{
    Error, Progress, Written,
    files::{Files, PendingFiles},
    image::write_image,
    reference::Reference,
    stored,
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
}

/// A store, and what it holds already of the machine.
#[derive(Clone, Copy)]
pub struct StorePlace<'a> {
    /// The store.
    pub store: &'a Store,
    /// The machine's last snapshot there: its name, tag or id. It need not be there any more.
    pub parent: Option<&'a str>,
}

/// A snapshot whose bytes are written but neither durable nor visible. Dropped, it leaves nothing but, in a
/// store, packs that its next garbage collection removes.
pub struct Unpublished {
    header: Header,
    files: Option<PendingFiles>,
    /// The store's id, and the snapshot in work there.
    stored: Option<([u8; 16], Writer)>,
    /// How much memory was written.
    pub written: Written,
    /// Bytes of the machine's state.
    pub state_bytes: u64,
}

impl fmt::Debug for Unpublished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unpublished")
            .field("header", &self.header)
            .field("files", &self.files)
            .field("stored", &self.stored.is_some())
            .finish_non_exhaustive()
    }
}

/// Writes `state` and `memory` to where they are not seen yet. The machine may run on when this returns:
/// what is left, [`Unpublished::publish`], does not look at it.
///
/// # Errors
///
/// An [`Error`] that names the file or the snapshot; nothing is left behind, and what was there is untouched.
pub fn write(
    to: Destination<'_>,
    state: &Container,
    memory: &MachineMemory,
    progress: &Progress,
) -> Result<Unpublished, Error> {
    let id = state.header.id;
    let into = |place: StorePlace<'_>, name: &str| {
        stored::write(place, name, state, memory, progress)
            .map(|(writer, written)| (Some((place.store.id(), writer)), written))
    };
    let (files, (stored, written)) = match to {
        Destination::Files(files) => {
            let files = PendingFiles::create(files)?;
            let written = write_image(&files.memory, memory, id, progress)?;
            (Some(files), (None, written))
        }
        Destination::Stored { place, name } => (None, into(place, name)?),
        Destination::Referenced { place, files } => {
            let files = PendingFiles::create(files)?;
            (Some(files), into(place, &format!("vm-{id}"))?)
        }
    };
    let bytes = state.to_bytes();
    if let Some(PendingFiles { state, .. }) = &files {
        state
            .file()
            .write_all(&bytes)
            .map_err(Error::io("write", state.target()))?;
    }
    Ok(Unpublished {
        header: state.header.clone(),
        files,
        stored,
        written,
        state_bytes: bytes.len() as u64,
    })
}

impl Unpublished {
    /// Makes the snapshot durable and gives it its names. When it returns, a power cut does not take it away;
    /// when it fails, what was at the paths is still there, and a store may have it under the name of its id.
    /// Returns what became of it in the store, if that is where it went.
    ///
    /// # Errors
    ///
    /// An [`Error`] that names the file or the snapshot.
    pub fn publish(self) -> Result<Option<Saved>, Error> {
        let mut saved = None;
        if let Some((store, writer)) = self.stored {
            let stored = writer.commit().map_err(Error::store("the store"))?;
            if let Some(PendingFiles { memory, .. }) = &self.files {
                let reference = Reference {
                    id: self.header.id,
                    memory_bytes: self.header.memory_bytes,
                    store,
                    stored: *stored.id.as_bytes(),
                };
                memory
                    .file()
                    .write_all(&reference.to_bytes())
                    .map_err(Error::io("write", memory.target()))?;
            }
            saved = Some(stored);
        }
        // Only now: a reference must never be there without what it refers to.
        self.files.map_or(Ok(()), PendingFiles::publish)?;
        Ok(saved)
    }
}
