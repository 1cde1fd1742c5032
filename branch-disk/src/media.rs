//! A file of a chain.

use std::{
    fs::{File, TryLockError},
    io::{self, Seek, SeekFrom},
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::{
    fs::{Gid, Mode, OFlags, SeekFrom as Seeked, Stat, Uid},
    io::Errno,
};

#[cfg(test)]
use crate::tape::Call;
use crate::{
    arrival::{Arrival, Awaited},
    error::Error,
    io::{Sink, Source, Space, zero_range},
    layout::SECTOR_BYTES,
};

/// How a file is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    /// Nobody else has it.
    Alone,
    /// Others only read it.
    Shared,
    /// Somebody sees to it already.
    Not,
}

/// A file, open and locked.
#[derive(Debug)]
pub(crate) struct Media {
    file: File,
    path: PathBuf,
    reads: AtomicU64,
    /// There if its data comes from elsewhere.
    coming: Option<Box<Coming>>,
}

/// How a file's data comes.
#[derive(Debug)]
struct Coming {
    arrival: Arc<Arrival>,
    /// The same by somebody else, which is used instead.
    stand_in: OnceLock<File>,
    /// Held by who reads the data.
    reading: RwLock<()>,
}

/// How long those who read from a file are waited for that is not used any more, and how often it is looked.
const READING_BOUND: u32 = 100;
const READING_INTERVAL: Duration = Duration::from_millis(1);

impl Media {
    /// Opens what is at `path`, whose last component is no link: a regular file or, if `device`, a block device.
    pub(crate) fn open(path: &Path, write: bool, lock: Lock, device: bool) -> Result<Self, Error> {
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        // A pipe without a writer is opened, too, and at once; then it is seen that it is one.
        let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(path, flags, Mode::empty());
        let file = File::from(file.map_err(Error::errno("open", path))?);
        let kind = file
            .metadata()
            .map_err(Error::io("look at", path))?
            .file_type();
        let fits = kind.is_file() || (device && kind.is_block_device());
        if !fits {
            return Err(Error::NotAFile {
                path: path.to_owned(),
            });
        }
        let media = Self::new(file, path);
        media.lock(lock)?;
        Ok(media)
    }

    pub(crate) fn new(file: File, path: &Path) -> Self {
        Self {
            file,
            path: path.to_owned(),
            reads: AtomicU64::new(0),
            coming: None,
        }
    }

    /// Uses another file instead, which has the same and stays locked as it is.
    pub(crate) fn stand_in(&self, other: Self) {
        let Some(coming) = &self.coming else { return };
        // The first one stays, which has the same.
        let _ = coming.stand_in.set(other.file);
        // Who began to read before goes on from the other, unless that takes long: then it keeps its space.
        let is_read = || coming.reading.try_write().is_err();
        let mut left = READING_BOUND;
        while is_read() {
            left -= 1;
            if left == 0 {
                return;
            }
            std::thread::sleep(READING_INTERVAL);
        }
        if let Err(error) = self.file.set_len(0) {
            tracing::debug!("a file that nobody needs keeps its space: {error}");
        }
    }

    /// Its data comes so.
    pub(crate) fn arrives(&mut self, arrival: Arc<Arrival>) {
        self.coming = Some(Box::new(Coming {
            arrival,
            stand_in: OnceLock::new(),
            reading: RwLock::new(()),
        }));
    }

    /// What of it has to come before it can be read there.
    fn awaited(&self, offset: u64, len: u64) -> Option<Awaited> {
        let Coming { arrival, .. } = self.coming.as_deref()?;
        (!arrival.has(offset, len)).then(|| Awaited {
            arrival: Arc::clone(arrival),
            offset,
            len,
        })
    }

    /// Whether all of its data is there.
    pub(crate) fn is_whole(&self) -> bool {
        let coming = self.coming.as_ref();
        coming.is_none_or(|coming| coming.arrival.is_complete())
    }

    /// Locks it, or changes its lock.
    pub(crate) fn lock(&self, lock: Lock) -> Result<(), Error> {
        let locked = match lock {
            Lock::Alone => self.file().try_lock(),
            Lock::Shared => self.file().try_lock_shared(),
            Lock::Not => Ok(()),
        };
        locked.map_err(|error| match error {
            TryLockError::WouldBlock => Error::InUse {
                path: self.path.clone(),
            },
            TryLockError::Error(source) => Error::io("lock", &self.path)(source),
        })
    }

    pub(crate) fn file(&self) -> &File {
        let coming = self.coming.as_ref();
        coming
            .and_then(|coming| coming.stand_in.get())
            .unwrap_or(&self.file)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where its data ends; unlike the metadata, right for a block device, too.
    pub(crate) fn bytes(&self) -> Result<u64, Error> {
        let end = self.file().seek(SeekFrom::End(0));
        end.map_err(Error::io("look at", &self.path))
    }

    /// Device and inode.
    pub(crate) fn identity(&self) -> Result<(u64, u64), Error> {
        let metadata = self
            .file()
            .metadata()
            .map_err(Error::io("look at", &self.path))?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// Where the next data is from `at` on and before `end`, if there is any; rounded down to a page.
    pub(crate) fn next_data(&self, at: u64, end: u64) -> Result<Option<u64>, Error> {
        if at >= end {
            return Ok(None);
        }
        let found = match rustix::fs::seek(self.file(), Seeked::Data(at)) {
            Ok(found) => found.max(at),
            Err(Errno::NXIO) => return Ok(None),
            // A file system that does not know: everything may be data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(errno) => return Err(Error::errno("look for data in", self.path())(errno)),
        };
        Ok((found < end).then_some(found))
    }

    /// Bytes that are free where it is, for who is not privileged; as many as there can be where the file system does not tell.
    pub(crate) fn free_bytes(&self) -> Result<u64, Error> {
        let found = rustix::fs::fstatvfs(self.file());
        let found = found.map_err(Error::errno("look at the file system of", &self.path))?;
        Ok(match found.f_blocks {
            0 => u64::MAX,
            _ => found.f_bavail.saturating_mul(found.f_frsize),
        })
    }

    /// Gives it the owner and the permissions of `other`, if it has others.
    pub(crate) fn belong_as(&self, other: &Self) -> Result<(), Error> {
        let of = |media: &Self| rustix::fs::fstat(media.file());
        let changed = of(self).and_then(|ours| {
            let theirs = of(other)?;
            if (ours.st_uid, ours.st_gid) != (theirs.st_uid, theirs.st_gid) {
                let (user, group) = (Uid::from_raw(theirs.st_uid), Gid::from_raw(theirs.st_gid));
                rustix::fs::fchown(self.file(), Some(user), Some(group))?;
            }
            let mode = |stat: &Stat| Mode::from_raw_mode(stat.st_mode);
            if mode(&ours) != mode(&theirs) {
                rustix::fs::fchmod(self.file(), mode(&theirs))?;
            }
            Ok(())
        });
        changed.map_err(Error::errno("set owner and permissions of", &self.path))
    }

    /// Fails if it was removed after it was opened, and before it was locked.
    pub(crate) fn has_a_name(&self) -> Result<(), Error> {
        match self.names()? {
            0 => Err(Error::errno("open", &self.path)(Errno::NOENT)),
            _ => Ok(()),
        }
    }

    /// How many names it has.
    pub(crate) fn names(&self) -> Result<u64, Error> {
        let metadata = self.file().metadata();
        Ok(metadata.map_err(Error::io("look at", &self.path))?.nlink())
    }

    /// Bytes that it takes on the host.
    pub(crate) fn allocated_bytes(&self) -> Result<u64, Error> {
        let metadata = self.file().metadata();
        let metadata = metadata.map_err(Error::io("look at", &self.path))?;
        Ok(metadata.blocks() * SECTOR_BYTES)
    }

    /// How often data was read from it.
    pub(crate) fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    pub(crate) fn fill(
        &self,
        sink: &mut (impl Sink + ?Sized),
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if let Some(awaited) = self.awaited(offset, len)
            && !sink.is_to_wait(awaited)?
        {
            return Ok(());
        }
        let coming = self.coming.as_deref();
        let _reading = coming.map(|coming| coming.reading.read());
        sink.fill(self.file(), offset, len)
    }

    pub(crate) fn drain(&self, source: &mut (impl Source + ?Sized), offset: u64) -> io::Result<()> {
        #[cfg(test)]
        let len = source.len();
        let done = source.drain(self.file(), offset);
        #[cfg(test)]
        crate::tape::wrote(self.file(), offset, len);
        done
    }

    pub(crate) fn zero(&self, offset: u64, len: u64, space: Space) -> io::Result<()> {
        let done = zero_range(self.file(), offset, len, space);
        #[cfg(test)]
        crate::tape::zeroed(self.file(), offset, len);
        done
    }

    /// Writes what is not data.
    pub(crate) fn write(&self, bytes: &[u8], offset: u64) -> Result<(), Error> {
        let written = self.put(bytes, offset);
        #[cfg(test)]
        crate::tape::wrote(self.file(), offset, bytes.len() as u64);
        written.map_err(Error::io("write to", &self.path))
    }

    fn put(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        if let Err(error) = crate::tape::ask(Call::Write) {
            // As where the space ends within it: behind the digest, before what it is of.
            self.file()
                .write_all_at(&bytes[..bytes.len() / 64], offset)?;
            return Err(error);
        }
        self.file().write_all_at(bytes, offset)
    }

    /// Makes its data durable. When this fails, what is durable cannot be known any more, and a later call that does not
    /// fail tells nothing.
    pub(crate) fn sync(&self) -> Result<(), Error> {
        let synced = self.file().sync_data();
        #[cfg(test)]
        let synced = synced.and(crate::tape::ask(Call::Sync));
        #[cfg(test)]
        if synced.is_ok() {
            crate::tape::synced(self.file());
        }
        synced.map_err(Error::io("make durable", &self.path))
    }
}

/// Where files have their names.
#[derive(Debug)]
pub(crate) struct Directory {
    file: File,
    path: PathBuf,
}

impl Directory {
    /// That of `path`.
    pub(crate) fn of(path: &Path) -> Result<Self, Error> {
        let path = path.parent().unwrap_or(Path::new("/"));
        let file = File::open(path);
        #[cfg(test)]
        let file = file.and_then(|file| crate::tape::ask(Call::OpenNames).map(|()| file));
        Ok(Self {
            file: file.map_err(Error::io("open", path))?,
            path: path.to_owned(),
        })
    }

    /// Makes its names durable. When this fails, it is as with [`Media::sync`].
    pub(crate) fn sync(&self) -> Result<(), Error> {
        let synced = self.file.sync_all();
        #[cfg(test)]
        let synced = synced.and(crate::tape::ask(Call::SyncNames));
        #[cfg(test)]
        if synced.is_ok() {
            crate::tape::synced_names();
        }
        synced.map_err(Error::io("make durable", &self.path))
    }
}

/// Makes the names in the directory of `path` durable.
pub(crate) fn sync_directory_of(path: &Path) -> Result<(), Error> {
    Directory::of(path)?.sync()
}
