//! A directory on a local file system.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::{Area, Backend, Draft, Entry, Lease, Lock, Publish, ReadAt};
use crate::name::FileId;

const DRAFTS: &str = "tmp";
const LEASES: &str = "leases";
const LOCKS: &str = "locks";

/// No lease is longer: 16 bytes for each pack that a process relies on.
const MAX_LEASE_BYTES: u64 = 256 << 20;

/// What machines remember is their owner's: nobody else may look at it.
const OWNER_DIR: u32 = 0o700;
const OWNER_FILE: u32 = 0o600;

/// A store in a directory, shared by all processes of this host.
///
/// Who lives is known from `flock`: the kernel drops a dead process's locks, whatever killed it.
#[derive(Clone, Debug)]
pub struct LocalDir {
    root: PathBuf,
}

impl LocalDir {
    /// The store in `root`, whether or not there is one.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        LocalDir { root: root.into() }
    }

    /// Makes the directories of a store, durably. Does nothing where they are.
    ///
    /// # Errors
    ///
    /// A directory cannot be made.
    pub fn create(root: impl Into<PathBuf>) -> io::Result<Self> {
        let root = root.into();
        make_dir(&root)?;
        let areas = Area::ALL
            .iter()
            .map(|area| area.dir())
            .filter(|dir| !dir.is_empty());
        for dir in areas.chain([DRAFTS, LEASES, LOCKS]) {
            make_dir(&root.join(dir))?;
        }
        Ok(LocalDir { root })
    }

    fn dir(&self, area: Area) -> PathBuf {
        self.root.join(area.dir())
    }

    /// Does something in a directory of the store, which is made if that is what it takes.
    fn in_dir<T>(&self, dir: &str, work: impl Fn() -> io::Result<T>) -> io::Result<T> {
        match work() {
            Err(missing) if missing.kind() == io::ErrorKind::NotFound && self.is_store() => {
                make_dir(&self.root.join(dir))?;
                work()
            }
            other => other,
        }
    }

    /// Whether there is a store, or one that is being made.
    fn is_store(&self) -> bool {
        self.root.is_dir()
    }

    /// Whether an area is empty because its directory is not there: whoever copied the store may have left out directories
    /// that were empty, and an older one lacks some. But where something is left of what was in it, nothing is to be taken for nobody's.
    fn is_empty_without(&self, error: &io::Error, area: Area) -> io::Result<bool> {
        if error.kind() != io::ErrorKind::NotFound || !self.is_store() {
            return Ok(false);
        }
        let witnesses: &[Area] = match area {
            Area::Root => return Ok(false),
            Area::Snapshots => &[Area::Packs, Area::Tags, Area::Annotations],
            Area::Packs => &[Area::Snapshots],
            _ => &[],
        };
        for witness in witnesses {
            if entries(&self.dir(*witness))?.is_some_and(|mut entries| entries.next().is_some()) {
                let (has, lacks) = (witness.dir(), area.dir());
                return Err(io::Error::new(
                    io::ErrorKind::NotFound,
                    format!(
                        "the store has {has} and no directory `{lacks}`: bring it back; only if it was empty, make it"
                    ),
                ));
            }
        }
        Ok(true)
    }

    /// A new file in `tmp/` that is locked, so that nobody takes it for a dead process's.
    fn locked_draft(&self) -> io::Result<(File, PathBuf)> {
        loop {
            let id = FileId::random().map_err(io::Error::other)?;
            let path = self.root.join(DRAFTS).join(id.to_string());
            let create = || {
                File::options()
                    .read(true)
                    .append(true)
                    .create_new(true)
                    .mode(OWNER_FILE)
                    .open(&path)
            };
            let file = self.in_dir(DRAFTS, create)?;
            file.lock()?;
            // `clear_dead` of another process may have come between the two calls and removed it.
            if file.metadata()?.nlink() > 0 {
                return Ok((file, path));
            }
        }
    }
}

/// Makes a directory, with those above it, durably. Those that are there stay as they are.
fn make_dir(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(OWNER_DIR).create(dir) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            make_dir(parent_of(dir))?;
            DirBuilder::new().mode(OWNER_DIR).create(dir)?;
        }
        made => made?,
    }
    sync_dir(dir)?;
    sync_dir(parent_of(dir))
}

fn parent_of(dir: &Path) -> &Path {
    dir.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// What is in a directory; nothing, if it is not there.
fn entries(dir: &Path) -> io::Result<Option<fs::ReadDir>> {
    match fs::read_dir(dir) {
        Ok(entries) => Ok(Some(entries)),
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(other) => Err(other),
    }
}

/// Removes the files of `dir` that nobody has locked.
fn remove_unlocked(dir: &Path) -> io::Result<u64> {
    let mut removed = 0;
    for entry in entries(dir)?.into_iter().flatten() {
        let path = entry?.path();
        let Some(file) = open_to_lock(&path)? else {
            continue;
        };
        if try_lock(&file)? && remove_if_there(&path)? {
            removed += 1;
        }
    }
    Ok(removed)
}

/// Opens a file, to read it or for what `options` say. Only a regular one will do: of others, some would have us wait, and what is
/// found through a symbolic link is not what [`LocalDir::list`] tells of.
fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    options.custom_flags((OFlags::NONBLOCK | OFlags::NOFOLLOW).bits() as i32);
    let opened = options.read(true).open(path);
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(code) if code == Errno::LOOP.raw_os_error() => symbolic_link(path),
        _ => error,
    })?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file",
        ))
    }
}

/// The error for a symbolic link where a file should be. To pass it over would be to take what it names for nobody's.
fn symbolic_link(path: &Path) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!(
            "{} is a symbolic link, which is no file of a store: put the file that it leads to in its place, or remove it",
            path.display()
        ),
    )
}

/// Opens a file to lock it; `None` for what is gone, or no regular file and so nobody's here. A symbolic link is an error, as in
/// [`LocalDir::list`]. NFS locks it only for who may
/// write to it (flock(2)).
fn open_to_lock(path: &Path) -> io::Result<Option<File>> {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_symlink() => return Err(symbolic_link(path)),
        Ok(metadata) if !metadata.is_file() => return Ok(None),
        _ => {}
    }
    match open(path, File::options().write(true)) {
        Ok(file) => Ok(Some(file)),
        Err(gone) if gone.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(other) => Err(other),
    }
}

fn try_lock(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn remove_if_there(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(gone) if gone.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(other) => Err(other),
    }
}

impl Backend for LocalDir {
    fn list(&self, area: Area) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let directory = match fs::read_dir(self.dir(area)) {
            Err(missing) if self.is_empty_without(&missing, area)? => return Ok(entries),
            other => other?,
        };
        for entry in directory {
            let entry = entry?;
            // A file may go between the listing and the look at it.
            let metadata = match entry.metadata() {
                Err(gone) if gone.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            // In the root, areas may be elsewhere, as all of the store may.
            if metadata.is_symlink() && area != Area::Root {
                return Err(symbolic_link(&entry.path()));
            }
            if let (true, Ok(name)) = (metadata.is_file(), entry.file_name().into_string()) {
                entries.push(Entry {
                    name,
                    size: metadata.len(),
                });
            }
        }
        Ok(entries)
    }

    fn open(&self, area: Area, name: &str) -> io::Result<Arc<dyn ReadAt>> {
        let file = open(&self.dir(area).join(name), &mut File::options())?;
        let size = file.metadata()?.len();
        Ok(Arc::new(LocalFile { file, size }))
    }

    fn draft(&self) -> io::Result<Box<dyn Draft>> {
        let (file, path) = self.locked_draft()?;
        Ok(Box::new(LocalDraft {
            file,
            path,
            store: self.clone(),
        }))
    }

    fn remove(&self, area: Area, name: &str) -> io::Result<()> {
        fs::remove_file(self.dir(area).join(name))
    }

    fn sync(&self, area: Area) -> io::Result<()> {
        match sync_dir(&self.dir(area)) {
            Err(missing) if self.is_empty_without(&missing, area)? => Ok(()),
            other => other,
        }
    }

    fn lease(&self) -> io::Result<Box<dyn Lease>> {
        // Now, and not when the first is published: by then there is something in the other, and neither is to be made anew where it
        // was lost.
        for area in [Area::Snapshots, Area::Packs] {
            let dir = self.dir(area);
            if !dir.is_dir() {
                self.list(area)?;
                make_dir(&dir)?;
            }
        }
        // Locked before it can be seen among the leases, or it would look like a dead process's.
        let (file, draft) = self.locked_draft()?;
        let name = draft.file_name().ok_or(io::ErrorKind::InvalidFilename)?;
        let path = self.root.join(LEASES).join(name);
        self.in_dir(LEASES, || fs::rename(&draft, &path))
            .inspect_err(|_| drop(fs::remove_file(&draft)))?;
        Ok(Box::new(LocalLease { file, path }))
    }

    fn leases(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut leases = Vec::new();
        for entry in entries(&self.root.join(LEASES))?.into_iter().flatten() {
            let Some(file) = open_to_lock(&entry?.path())? else {
                continue;
            };
            if !try_lock(&file)? {
                let len = file.metadata()?.len();
                if len > MAX_LEASE_BYTES {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "a lease is longer than any that is written",
                    ));
                }
                let mut content = vec![0; len as usize];
                file.read_exact_at(&mut content, 0)?;
                leases.push(content);
            }
        }
        Ok(leases)
    }

    fn clear_dead(&self) -> io::Result<u64> {
        Ok(remove_unlocked(&self.root.join(DRAFTS))? + remove_unlocked(&self.root.join(LEASES))?)
    }

    fn try_lock(&self, lock: Lock) -> io::Result<Option<Box<dyn Send>>> {
        let path = self.root.join(LOCKS).join(lock.name());
        let open = || {
            File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(OWNER_FILE)
                .open(&path)
        };
        let file = self.in_dir(LOCKS, open)?;
        Ok(if try_lock(&file)? {
            Some(Box::new(file))
        } else {
            None
        })
    }
}

struct LocalFile {
    file: File,
    size: u64,
}

impl ReadAt for LocalFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

struct LocalDraft {
    file: File,
    path: PathBuf,
    store: LocalDir,
}

impl Draft for LocalDraft {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn publish(self: Box<Self>, area: Area, name: &str, how: Publish) -> io::Result<()> {
        let target = self.store.dir(area).join(name);
        let publish = || match how {
            Publish::Replace => fs::rename(&self.path, &target),
            // Unlike `rename`, `link` fails when the name is taken. Dropping the draft removes its first name.
            Publish::New => fs::hard_link(&self.path, &target),
        };
        match area {
            // With it gone, a snapshot would be the only one there is.
            Area::Snapshots => publish(),
            _ => self.store.in_dir(area.dir(), publish),
        }
    }
}

impl Drop for LocalDraft {
    fn drop(&mut self) {
        // What cannot be removed now, `clear_dead` removes later.
        let _ = fs::remove_file(&self.path);
    }
}

struct LocalLease {
    file: File,
    path: PathBuf,
}

impl Lease for LocalLease {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }
}

impl Drop for LocalLease {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What NFS asks for, which no test has: there, gc and fsck would fail.
    #[test]
    fn what_is_locked_is_open_for_writing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lease");
        fs::write(&path, "content").unwrap();
        let file = open_to_lock(&path).unwrap().unwrap();
        let flags = rustix::fs::fcntl_getfl(&file).unwrap();
        assert!(flags.contains(OFlags::RDWR), "{flags:?}");
        assert!(try_lock(&file).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"content");
        std::os::unix::fs::symlink(&path, dir.path().join("link")).unwrap();
        let open = |name: &str| open_to_lock(&dir.path().join(name));
        assert!(open("link").unwrap_err().to_string().contains("link"));
        fs::create_dir(dir.path().join("directory")).unwrap();
        for nobodys in ["directory", "gone"] {
            assert!(open(nobodys).unwrap().is_none());
        }
    }
}
