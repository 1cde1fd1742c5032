//! The two files of a snapshot, written together and read together.

use std::{
    fs::File,
    io::{Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use memory::MachineMemory;
use saved_state::{Container, HEADER_BYTES, MAX_BODY_BYTES, SnapshotId};

use crate::{
    Error, Written,
    durable::{Pending, directory_of, discard, hidden_name, sweep, sync_directory},
    image::{Image, id_of, write_image},
};

/// Where a snapshot is to appear.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// The state file.
    pub state: &'a Path,
    /// The memory file.
    pub memory: &'a Path,
}

/// A snapshot whose bytes are written but neither durable nor visible. Dropped, it leaves nothing.
#[derive(Debug)]
pub struct Unpublished {
    state: Pending,
    memory: Pending,
    /// How much memory was written.
    pub written: Written,
    /// Bytes of the state file.
    pub state_bytes: u64,
}

/// Writes `state` and `memory` to files that do not have their names yet. The machine may run on
/// when this returns: what is left, [`Unpublished::publish`], does not look at it.
///
/// # Errors
///
/// An [`Error`] that names the file; nothing is left behind, and what was at the paths is untouched.
pub fn write(
    targets: Targets<'_>,
    state: &Container,
    memory: &MachineMemory,
) -> Result<Unpublished, Error> {
    let Targets {
        state: state_path,
        memory: memory_path,
    } = targets;
    if same_place(state_path, memory_path) {
        return Err(Error::SamePath(state_path.to_owned()));
    }
    for path in [state_path, memory_path] {
        if path.is_dir() {
            return Err(Error::NoFileName(path.to_owned()));
        }
    }
    let pending_state = Pending::create(state_path)?;
    let pending_memory = Pending::create(memory_path)?;
    let bytes = state.to_bytes();
    let mut file = pending_state.file();
    file.write_all(&bytes)
        .map_err(Error::io("write", state_path))?;
    let written = write_image(&pending_memory, memory, state.header.id)?;
    Ok(Unpublished {
        state: pending_state,
        memory: pending_memory,
        written,
        state_bytes: bytes.len() as u64,
    })
}

/// Whether two paths are one place, however they are spelled.
fn same_place(one: &Path, other: &Path) -> bool {
    let directory = |path: &Path| directory_of(path).ok()?.canonicalize().ok();
    one == other
        || (one.file_name() == other.file_name()
            && directory(one).is_some_and(|one| directory(other) == Some(one)))
}

impl Unpublished {
    /// Makes both files durable and gives them their names. When it returns, a power cut does not
    /// take the snapshot away; when it fails, what was at the paths is still there.
    ///
    /// Two renames are not one step. So that a crash between them loses nothing, the memory file
    /// that is replaced keeps a hidden second name with its id until the state file is in its place
    /// too; the old state file still finds it there.
    ///
    /// # Errors
    ///
    /// An [`Error`] that names the file.
    pub fn publish(self) -> Result<(), Error> {
        let Self { state, memory, .. } = self;
        memory.sync()?;
        state.sync()?;
        let (state_path, memory_path) = (state.target().to_owned(), memory.target().to_owned());
        let replaced = keep_replaced(&memory_path, memory.file())?;
        memory.rename().inspect_err(|_| replaced.forget())?;
        // Durable before the state is renamed: a new state file must never be left with an old memory.
        sync_directory(directory_of(&memory_path)?)
            .and_then(|()| state.rename())
            .inspect_err(|_| replaced.put_back(&memory_path))?;
        // Both have their names. Nothing is put back any more, for this pair may be what is left.
        sync_directory(directory_of(&state_path)?)?;
        sweep(&memory_path);
        sweep(&state_path);
        Ok(())
    }
}

/// What was at the place of the new memory file.
enum Replaced {
    /// Nothing.
    Nothing,
    /// A file that has this second name now.
    Kept(PathBuf),
    /// A file that could not be kept, because the file system has no hard links.
    Lost,
}

impl Replaced {
    /// The new file did not take the place.
    fn forget(&self) {
        if let Self::Kept(kept) = self {
            discard(kept);
        }
    }

    /// The new file did, and has to give it back.
    fn put_back(&self, path: &Path) {
        match self {
            Self::Nothing => discard(path),
            Self::Kept(kept) => {
                if let Err(e) = std::fs::rename(kept, path) {
                    tracing::warn!(path = %kept.display(), "the previous file is left here: {e}");
                }
            }
            Self::Lost => {
                tracing::warn!(path = %path.display(), "the previous file could not be kept");
            }
        }
    }
}

/// Gives the file at `path`, if there is one, a second name, durably: that of its snapshot, or of
/// nobody's if it is not a memory file.
fn keep_replaced(path: &Path, replacement: &File) -> Result<Replaced, Error> {
    let id = match id_of(path) {
        Ok(id) => id.to_string(),
        Err(Error::NotFound { .. }) => return Ok(Replaced::Nothing),
        Err(_) => {
            let inode = replacement
                .metadata()
                .map_err(Error::io("read", path))?
                .ino();
            format!("foreign-{inode}")
        }
    };
    let kept = hidden_name(path, &format!(".{id}.previous"))?;
    match std::fs::hard_link(path, &kept) {
        Ok(()) => {}
        // From an earlier try: the id says that it is the same file.
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(e) => {
            tracing::warn!(path = %path.display(), "the file system has no hard links: {e}");
            return Ok(Replaced::Lost);
        }
    }
    sync_directory(directory_of(path)?)?;
    Ok(Replaced::Kept(kept))
}

/// A snapshot whose files have been opened: the state is checked, the memory is of the same snapshot.
#[derive(Debug)]
pub struct Pair {
    /// The machine's state.
    pub state: Container,
    image: Image,
}

impl Pair {
    /// Opens the two files of a snapshot. The content of the memory is not read yet.
    ///
    /// # Errors
    ///
    /// An [`Error`] that names the file and says what is wrong with it.
    pub fn open(state_path: &Path, memory_path: &Path) -> Result<Self, Error> {
        let state = read_state(state_path)?;
        let id = state.header.id;
        let image = open_image(memory_path, id)?;
        if image.id() != id {
            return Err(Error::Memory {
                path: memory_path.to_owned(),
                reason: format!(
                    "belongs to snapshot {}, but {} to snapshot {id}; give two files of one snapshot",
                    image.id(),
                    state_path.display(),
                ),
            });
        }
        if image.memory_bytes() != state.header.memory_bytes {
            return Err(Error::Memory {
                path: memory_path.to_owned(),
                reason:
                    "holds another amount of memory than its state file says; take another copy"
                        .to_owned(),
            });
        }
        Ok(Self { state, image })
    }

    /// Takes the state out, to be consumed section by section.
    pub fn take_state(&mut self) -> Container {
        let empty = Container::new(self.state.header.clone());
        std::mem::replace(&mut self.state, empty)
    }

    /// Reads all of the memory and compares it with its checksums.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] says where it is damaged.
    pub fn verify(&self) -> Result<(), Error> {
        self.image.verify()
    }

    /// Maps the memory file as the memory of a machine; see [`MachineMemory::from_image`].
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] when the host has no room for it.
    pub fn map(&self) -> Result<MachineMemory, Error> {
        self.image.map()
    }
}

/// Reads and checks a state file, without its memory file.
///
/// # Errors
///
/// An [`Error`] that names the file and says what is wrong with it.
pub fn read_state(path: &Path) -> Result<Container, Error> {
    let mut bytes = Vec::new();
    let limit = MAX_BODY_BYTES + HEADER_BYTES as u64 + 1;
    File::open(path)
        .and_then(|file| file.take(limit).read_to_end(&mut bytes))
        .map_err(Error::io("read", path))?;
    Container::from_bytes(&bytes).map_err(|source| Error::State {
        path: path.to_owned(),
        source,
    })
}

/// The memory file of snapshot `id`: the one at `path`, unless a crash between two renames left the
/// right one under its second name.
fn open_image(path: &Path, id: SnapshotId) -> Result<Image, Error> {
    let image = Image::open(path)?;
    if image.id() == id {
        return Ok(image);
    }
    match Image::open(&hidden_name(path, &format!(".{id}.previous"))?) {
        Ok(kept) => {
            tracing::warn!(path = %kept.path().display(), "a snapshot was interrupted; the one before it is used");
            Ok(kept)
        }
        Err(_) => Ok(image),
    }
}
