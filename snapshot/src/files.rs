//! Two files that get their names together, or not at all.

use std::{
    fs::File,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::{io::Errno, process::geteuid};

use crate::{
    Error,
    durable::{Pending, directory_of, discard, hidden_name, lock_directory, sweep, sync_directory},
    open::id_of,
};

/// Where the two files of a snapshot are.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// The state file.
    pub state: &'a Path,
    /// The memory file.
    pub memory: &'a Path,
}

/// Two files that have no names yet. Dropped, they leave nothing.
#[derive(Debug)]
pub(crate) struct PendingFiles {
    pub(crate) state: Pending,
    pub(crate) memory: Pending,
}

impl PendingFiles {
    pub(crate) fn create(files: Files<'_>) -> Result<Self, Error> {
        if same_place(files.state, files.memory) {
            return Err(Error::SamePath(files.state.to_owned()));
        }
        for path in [files.state, files.memory] {
            // Of a device or a pipe, a file would take the place.
            if path.metadata().is_ok_and(|there| !there.is_file()) {
                return Err(Error::NoFileName(path.to_owned()));
            }
        }
        Ok(Self {
            state: Pending::create(files.state)?,
            memory: Pending::create(files.memory)?,
        })
    }

    /// Makes both files durable and gives them their names. When it returns, a power cut does not
    /// take them away; when it fails, what was at the paths is still there.
    ///
    /// Two renames are not one step. So that a crash between them loses nothing, the memory file
    /// that is replaced keeps a hidden second name with its id until the state file is in its place
    /// too; the old state file still finds it there. Of two who save to one place, each waits for the other, so that both files
    /// are of who comes last, and nobody sweeps what somebody else still needs.
    pub(crate) fn publish(self) -> Result<(), Error> {
        let Self { state, memory } = self;
        memory.sync()?;
        state.sync()?;
        let (state_path, memory_path) = (state.target().to_owned(), memory.target().to_owned());
        let _alone = lock_directory(directory_of(&memory_path)?)?;
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

/// Whether two paths are one place, however they are spelled.
fn same_place(one: &Path, other: &Path) -> bool {
    let directory = |path: &Path| directory_of(path).ok()?.canonicalize().ok();
    one == other
        || (one.file_name() == other.file_name()
            && directory(one).is_some_and(|one| directory(other) == Some(one)))
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
    match rustix::fs::link(path, &kept) {
        Ok(()) => {}
        // From an earlier try: the id says that it is the same file.
        Err(Errno::EXIST) => {}
        Err(errno) if has_no_links(errno, path) => {
            tracing::warn!(path = %path.display(), "the file system has no hard links: {errno}");
            return Ok(Replaced::Lost);
        }
        Err(errno) => {
            return Err(Error::NotKept {
                path: path.to_owned(),
                source: errno.into(),
            });
        }
    }
    sync_directory(directory_of(path)?)?;
    Ok(Replaced::Kept(kept))
}

/// Whether that is what a file system says that has no hard links. It may be EPERM, which of somebody else's file the kernel says
/// by itself (`fs.protected_hardlinks`).
fn has_no_links(errno: Errno, path: &Path) -> bool {
    match errno {
        Errno::OPNOTSUPP | Errno::NOSYS => true,
        Errno::PERM => path
            .symlink_metadata()
            .is_ok_and(|file| file.uid() == geteuid().as_raw()),
        _ => false,
    }
}
