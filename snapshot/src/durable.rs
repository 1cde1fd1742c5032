//! Files that appear whole, or not at all.
//!
//! A [`Pending`] file has no name while it is written (`O_TMPFILE`), so that a crash leaves nothing
//! behind. It is published by renaming, which replaces what is there in one step. Where the file
//! system has no nameless files (9p, some network file systems), it has a hidden name next to its
//! place until then; a crash there leaves that name, which begins with a dot and ends with
//! `.partial`.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, flock},
    io::Errno,
};

use crate::Error;

/// A file being written. Dropped before it is published, it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct Pending {
    file: File,
    target: PathBuf,
    /// Its name, if it has one that has to go when it is given up.
    partial: Option<PathBuf>,
}

impl Pending {
    /// Begins a file that is to appear at `target`.
    pub(crate) fn create(target: &Path) -> Result<Self, Error> {
        let directory = directory_of(target)?;
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => Ok(Self {
                file: file.into(),
                target: target.to_owned(),
                partial: None,
            }),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Self::create_named(target),
            Err(errno) => Err(Error::errno("create a file in", directory)(errno)),
        }
    }

    fn create_named(target: &Path) -> Result<Self, Error> {
        let partial = partial_name(target)?;
        if partial.symlink_metadata().is_ok() {
            // Left by a process that had our number.
            std::fs::remove_file(&partial).map_err(Error::io("replace", &partial))?;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&partial)
            .map_err(Error::io("create", &partial))?;
        Ok(Self {
            file,
            target: target.to_owned(),
            partial: Some(partial),
        })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Where it is going to be.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Brings its content to the disk.
    pub(crate) fn sync(&self) -> Result<(), Error> {
        self.file
            .sync_all()
            .map_err(Error::io("make durable", &self.target))
    }

    /// Gives it its name. What had the name before is replaced in one step. When this fails, nothing
    /// has changed; when it succeeds, the name is not yet durable.
    pub(crate) fn rename(mut self) -> Result<(), Error> {
        if self.partial.is_none() {
            self.partial = Some(self.link()?);
        }
        if let Some(partial) = &self.partial {
            std::fs::rename(partial, &self.target)
                .map_err(Error::io("rename a file to", &self.target))?;
            self.partial = None;
        }
        Ok(())
    }

    /// Gives a nameless file a hidden name: a link cannot replace a file, but a rename can.
    fn link(&self) -> Result<PathBuf, Error> {
        let partial = partial_name(&self.target)?;
        let ours = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let link = || rustix::fs::linkat(CWD, &ours, CWD, &partial, AtFlags::SYMLINK_FOLLOW);
        let linked = link().or_else(|errno| match errno {
            // Left by a process that had our number and was killed at this very point.
            Errno::EXIST if std::fs::remove_file(&partial).is_ok() => link(),
            errno => Err(errno),
        });
        linked.map_err(Error::errno("name", &partial))?;
        Ok(partial)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(partial) = &self.partial
            && let Err(e) = std::fs::remove_file(partial)
        {
            tracing::warn!(path = %partial.display(), "a partial file is left behind: {e}");
        }
    }
}

/// The directory that `path` is in.
pub(crate) fn directory_of(path: &Path) -> Result<&Path, Error> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Ok(Path::new(".")),
        Some(parent) => Ok(parent),
        None => Err(Error::NoFileName(path.to_owned())),
    }
}

/// Of the 255 bytes that a name can have, those that the longest ending and the dot leave: that of a second name, with an id.
const MAX_IN_HIDDEN: usize = 255 - "...previous".len() - 32;

/// A name next to `path` that begins with a dot and ends with `ending`. A file's name for which that has no room is in it as its
/// digest.
pub(crate) fn hidden_name(path: &Path, ending: &str) -> Result<PathBuf, Error> {
    let name = path
        .file_name()
        .ok_or_else(|| Error::NoFileName(path.to_owned()))?;
    let mut hidden = OsString::from(".");
    if name.len() <= MAX_IN_HIDDEN {
        hidden.push(name);
    } else {
        let digest = blake3::hash(name.as_encoded_bytes());
        hidden.push(digest.to_hex().as_str());
    }
    hidden.push(ending);
    Ok(path.with_file_name(hidden))
}

fn partial_name(target: &Path) -> Result<PathBuf, Error> {
    hidden_name(target, &format!(".{}.partial", std::process::id()))
}

/// Removes the names next to `path` that crashes have left there: second names of files that a later
/// pair has replaced, and partial files of processes that are gone.
pub(crate) fn sweep(path: &Path) {
    let (Ok(directory), Ok(prefix)) = (directory_of(path), hidden_name(path, ".")) else {
        return;
    };
    let Ok(entries) = std::fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let prefix = prefix.file_name().unwrap_or_default().as_encoded_bytes();
        let Some(rest) = name.as_encoded_bytes().strip_prefix(prefix) else {
            continue;
        };
        let orphan = |pid: &[u8]| {
            let pid = std::str::from_utf8(pid)
                .ok()
                .and_then(|pid| pid.parse::<u32>().ok());
            pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
        };
        if rest.strip_suffix(b".previous").is_some_and(is_id)
            || rest.strip_suffix(b".partial").is_some_and(orphan)
        {
            discard(&entry.path());
        }
    }
}

/// Whether this is what a second name has between the file's own and its ending: the id of a snapshot, or the mark of a
/// foreign file. A longer one is the second name of another file, whose name begins like this one's.
fn is_id(middle: &[u8]) -> bool {
    match middle.strip_prefix(b"foreign-") {
        Some(inode) => !inode.is_empty() && inode.iter().all(u8::is_ascii_digit),
        None => middle.len() == 32 && middle.iter().all(u8::is_ascii_hexdigit),
    }
}

/// Removes a file that nobody needs any more.
pub(crate) fn discard(path: &Path) {
    if let Err(e) = std::fs::remove_file(path) {
        tracing::warn!(path = %path.display(), "a file is left behind: {e}");
    }
}

/// Opens what is at `path`, which need not be a file: a pipe without a writer is opened, too, and at once.
pub(crate) fn open_for_reading(path: &Path) -> Result<File, Error> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .map(File::from)
        .map_err(Error::errno("open", path))
}

/// How long another is waited for who changes names in a directory: it takes two renames. Anybody who may look into the directory can
/// hold its lock for as long as they like.
const LOCK_BOUND: Duration = Duration::from_secs(10);
const LOCK_INTERVAL: Duration = Duration::from_millis(5);

/// Has nobody else who asks for it change the names in `directory`, until what this returns is dropped. It waits for who does, for a
/// while.
pub(crate) fn lock_directory(directory: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let locked = rustix::fs::open(directory, flags, Mode::empty())
        .map_err(Error::errno("open", directory))?;
    let begun = Instant::now();
    loop {
        match flock(&locked, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(locked),
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if begun.elapsed() < LOCK_BOUND => {
                std::thread::sleep(LOCK_INTERVAL);
            }
            // Some network file systems have no locks on directories. A snapshot without one is better than none.
            Err(errno) => {
                tracing::warn!(path = %directory.display(), "two who save here at once are not kept apart: {errno}");
                return Ok(locked);
            }
        }
    }
}

/// Makes the names in `directory` durable.
pub(crate) fn sync_directory(directory: &Path) -> Result<(), Error> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(Error::io("make durable", directory))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn names(directory: &Path) -> Vec<OsString> {
        let entries = std::fs::read_dir(directory).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("file");
        for named in [false, true] {
            std::fs::write(&target, "old").unwrap();
            let create = if named {
                Pending::create_named
            } else {
                Pending::create
            };
            let pending = create(&target).unwrap();
            pending.file().write_all(b"given up").unwrap();
            drop(pending);
            assert_eq!(std::fs::read(&target).unwrap(), b"old");
            let pending = create(&target).unwrap();
            pending.file().write_all(b"new").unwrap();
            assert_eq!(std::fs::read(&target).unwrap(), b"old");
            pending.sync().unwrap();
            pending.rename().unwrap();
            assert_eq!(std::fs::read(&target).unwrap(), b"new");
            assert_eq!(names(directory.path()), ["file"]);
        }
    }

    #[test]
    fn a_sweep_leaves_what_belongs_to_another_file() {
        let directory = tempfile::tempdir().unwrap();
        let id = "0123456789abcdef0123456789abcdef";
        for name in [
            format!(".vm.{id}.previous"),
            ".vm.foreign-7.previous".to_owned(),
            format!(".vm.1.{id}.previous"),
            ".vm.1.foreign-7.previous".to_owned(),
        ] {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        sweep(&directory.path().join("vm"));
        let left = [
            ".vm.1.foreign-7.previous".to_owned(),
            format!(".vm.1.{id}.previous"),
        ];
        let mut left = left.map(OsString::from);
        left.sort();
        assert_eq!(names(directory.path()), left);
    }

    #[test]
    fn a_missing_directory_is_named() {
        let error = Pending::create(Path::new("/nonexistent/file")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "/nonexistent does not exist; check the path"
        );
    }
}
