//! What is behind a disk: a raw image, or a disk that branches.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Seek, SeekFrom},
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use branch_disk::{Awaited, Sink, Source, Space};

use super::{SECTOR_BYTES, ring::Part, vectored};
use crate::{sync::lock, virtio::buffers::Run};

/// A disk that branches, shared with who takes snapshots of the machine.
pub type SharedDisk = Arc<Mutex<branch_disk::Disk>>;

/// Why a disk could not be opened, or is not the one that was saved.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file could not be opened.
    #[error("the disk image {} cannot be opened: {source}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// Somebody else has it open in a way that excludes this one.
    #[error(
        "the disk image {} is in use by another VM; stop that one, give this one a copy, or attach it read-only to both",
        path.display()
    )]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// It is neither a file nor a block device.
    #[error("{} is neither a regular file nor a block device; a raw disk image is needed", path.display())]
    NotADisk {
        /// What was given as the image.
        path: PathBuf,
    },
    /// Its end is not on a sector boundary.
    #[error(
        "the disk image {} has {bytes} bytes, which is not a multiple of {SECTOR_BYTES}; extend it with `truncate --size=%{SECTOR_BYTES}`",
        path.display()
    )]
    PartialSector {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
    },
    /// The path cannot be written down in a saved state.
    #[error("the path {} of a disk image is not UTF-8; rename it", path.display())]
    NotUtf8 {
        /// The path.
        path: PathBuf,
    },
    /// The identity is too long for the guest to see all of it.
    #[error(
        "the disk identity {id:?} has more than {} bytes; choose a shorter one",
        super::ID_BYTES
    )]
    LongId {
        /// The identity.
        id: String,
    },
    /// It would lose what is at its end.
    #[error("the disk {path} has {now} bytes and cannot be made to have {bytes}; disks only grow")]
    Smaller {
        /// The image.
        path: String,
        /// The size that it was to have.
        bytes: u64,
        /// The size that it has.
        now: u64,
    },
    /// No disk has such a size.
    #[error("a disk cannot have {bytes} bytes; take a multiple of {SECTOR_BYTES}")]
    Size {
        /// The size that it was to have.
        bytes: u64,
    },
    /// It is attached read-only.
    #[error("the disk {path} is attached read-only and cannot grow; attach it writable")]
    ReadOnly {
        /// The image.
        path: String,
    },
    /// It is a block device, which fermata cannot make larger.
    #[error(
        "the block device {path} has {there} bytes; make it as large as the disk is to be, then ask again"
    )]
    DeviceTooSmall {
        /// The device.
        path: String,
        /// Its size in bytes.
        there: u64,
    },
    /// More is there than it is to have: a snapshot of it would not be restored, for a restored disk has all that is there.
    #[error(
        "the disk {path} has {there} bytes there already, more than {bytes}; ask for all of them"
    )]
    MoreThere {
        /// The image or device.
        path: String,
        /// What was asked for.
        bytes: u64,
        /// Bytes of its whole sectors.
        there: u64,
    },
    /// The host does not let it grow.
    #[error("the disk {path} cannot grow: {source}")]
    Grow {
        /// The image.
        path: String,
        /// What the host says.
        source: io::Error,
    },
    /// There is no timer for its limits, or no eventfd for its reads and flushes.
    #[error("a disk needs a timer and an eventfd: {0}; raise the limit of open files (ulimit -n)")]
    Events(#[source] io::Error),
    /// A disk that branches cannot get another layer.
    #[error(transparent)]
    Branch(#[from] branch_disk::Error),
    /// The image has another size than when the machine was saved.
    #[error(
        "the disk image {path} has {found} sectors, but had {saved} when the machine was saved; restore the image that belongs to the snapshot"
    )]
    CapacityChanged {
        /// The image.
        path: String,
        /// Sectors of 512 bytes when saved.
        saved: u64,
        /// Sectors of 512 bytes now.
        found: u64,
    },
    /// The image is attached in another mode than when the machine was saved.
    #[error(
        "the disk image {path} was attached {} when the machine was saved; attach it the same way",
        if *read_only { "read-only" } else { "writable" }
    )]
    ModeChanged {
        /// The image.
        path: String,
        /// Whether it was read-only.
        read_only: bool,
    },
}

/// A disk's content.
#[derive(Debug)]
enum Backing {
    /// A raw image, locked against other machines for as long as it is open.
    Raw {
        file: File,
        /// A sync has failed: the kernel may have dropped what it could not write, and call the next one a success.
        failed: AtomicBool,
    },
    Branch(SharedDisk),
}

/// A disk, open.
#[derive(Debug)]
pub(super) struct Disk {
    backing: Backing,
    path: String,
    /// It only grows, and after what is behind it has; unless its machine is reset.
    sectors: AtomicU64,
    read_only: bool,
    peek: Mutex<Peek>,
}

/// What is done with a read before it is made to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peek {
    /// It is tried without waiting.
    Cache,
    /// It is made at once, and waits, as far as it is of this host's files: they cannot tell, and are in memory as a rule, or nobody
    /// can bring what is not.
    Wait,
    /// Nothing: every read is kept.
    Nothing,
}

impl Disk {
    /// Opens a raw image. Whatever its first bytes say, it is raw: a guest may have written them.
    pub(super) fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let failed = |source| DiskError::Open {
            path: path.to_owned(),
            source,
        };
        // The state must name the image for a process with another working directory.
        let path = path.canonicalize().map_err(failed)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            // Opening a FIFO must not wait for its other end; it changes nothing for a disk.
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::NotADisk { path });
        }
        let locked = if read_only {
            file.try_lock_shared()
        } else {
            file.try_lock()
        };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DiskError::InUse { path }),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        // Unlike the metadata, the position of the end is right for block devices too.
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskError::PartialSector { path, bytes });
        }
        let backing = Backing::Raw {
            file,
            failed: AtomicBool::new(false),
        };
        Self::new(backing, path, bytes / SECTOR_BYTES, read_only)
    }

    /// Takes a disk that branches.
    pub(super) fn branching(disk: SharedDisk) -> Result<Self, DiskError> {
        let (path, sectors, read_only) = {
            let disk = lock(&disk);
            let sectors = disk.bytes() / SECTOR_BYTES;
            (disk.path().to_owned(), sectors, disk.read_only())
        };
        Self::new(Backing::Branch(disk), path, sectors, read_only)
    }

    fn new(
        backing: Backing,
        path: PathBuf,
        sectors: u64,
        read_only: bool,
    ) -> Result<Self, DiskError> {
        let path = path
            .into_os_string()
            .into_string()
            .map_err(|path| DiskError::NotUtf8 { path: path.into() })?;
        Ok(Self {
            backing,
            path,
            sectors: AtomicU64::new(sectors),
            read_only,
            peek: Mutex::new(Peek::Cache),
        })
    }

    /// The image's absolute path, or that of the layer that is written to.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// Sectors of 512 bytes.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    pub(super) fn read(&self, sector: u64, data: &Run<'_>) -> io::Result<()> {
        let offset = self.offset(sector, data.len())?;
        match &self.backing {
            Backing::Raw { file, .. } => vectored::read_exact_at(file, data.slices(), offset),
            Backing::Branch(disk) => lock(disk).read(offset, &mut Guest(data.clone())),
        }
    }

    /// The same, of what was fetched for it: what is not on this host is an error.
    pub(super) fn read_here(&self, sector: u64, data: &Run<'_>) -> io::Result<()> {
        let offset = self.offset(sector, data.len())?;
        match &self.backing {
            Backing::Raw { .. } => self.read(sector, data),
            Backing::Branch(disk) => lock(disk).read(offset, &mut Here(Guest(data.clone()))),
        }
    }

    /// Reads as much as need not wait, and says what is left.
    pub(super) fn read_without_waiting(&self, sector: u64, data: &Run<'_>) -> io::Result<Left> {
        self.read_peeking(sector, data, &mut lock(&self.peek))
    }

    /// Reads what is on this host, and says what is left.
    pub(super) fn read_what_is_here(&self, sector: u64, data: &Run<'_>) -> io::Result<Left> {
        self.read_peeking(sector, data, &mut Peek::Wait)
    }

    fn read_peeking(&self, sector: u64, data: &Run<'_>, peek: &mut Peek) -> io::Result<Left> {
        let offset = self.offset(sector, data.len())?;
        let mut sink = Peeking {
            rest: data.clone(),
            peek,
            left: Left::default(),
        };
        match &self.backing {
            Backing::Raw { file, .. } => sink.fill(file, offset, data.len())?,
            Backing::Branch(disk) => lock(disk).read(offset, &mut sink)?,
        }
        Ok(sink.left)
    }

    /// Says what is done with reads.
    pub(super) fn set_peek(&self, peek: Peek) {
        *lock(&self.peek) = peek;
    }

    pub(super) fn write(&self, sector: u64, data: &Run<'_>) -> io::Result<()> {
        let offset = self.writable(sector, data.len())?;
        match &self.backing {
            Backing::Raw { file, .. } => vectored::write_all_at(file, data.slices(), offset),
            Backing::Branch(disk) => lock(disk).write(offset, &mut Guest(data.clone())),
        }
    }

    /// The guest does not need what is in `len` bytes from `sector` on.
    pub(super) fn discard(&self, sector: u64, len: u64) -> io::Result<()> {
        let offset = self.writable(sector, len)?;
        match &self.backing {
            Backing::Raw { file, .. } => branch_disk::discard_range(file, offset, len),
            Backing::Branch(disk) => lock(disk).discard(offset, len),
        }
    }

    /// Makes `len` bytes from `sector` on read as zeros.
    pub(super) fn write_zeroes(&self, sector: u64, len: u64, space: Space) -> io::Result<()> {
        let offset = self.writable(sector, len)?;
        match &self.backing {
            Backing::Raw { file, .. } => branch_disk::zero_range(file, offset, len, space),
            Backing::Branch(disk) => lock(disk).write_zeroes(offset, len, space),
        }
    }

    /// Makes what was written durable.
    pub(super) fn flush(&self) -> io::Result<()> {
        match &self.backing {
            Backing::Raw { file, failed } => {
                if failed.load(Ordering::Relaxed) {
                    return Err(io::Error::other("an earlier sync failed"));
                }
                let synced = file.sync_data();
                failed.store(synced.is_err(), Ordering::Relaxed);
                synced
            }
            Backing::Branch(disk) => lock(disk).flush().map_err(io::Error::other),
        }
    }

    /// Has a sync of a raw image have failed, as far as the disk knows.
    #[cfg(test)]
    pub(super) fn has_failed(&self) {
        if let Backing::Raw { failed, .. } = &self.backing {
            failed.store(true, Ordering::Relaxed);
        }
    }

    /// As [`super::DiskControl::grow`].
    pub(super) fn grow(&self, bytes: u64) -> Result<(), DiskError> {
        let (path, now) = (self.path.clone(), self.sectors() * SECTOR_BYTES);
        if bytes < now {
            return Err(DiskError::Smaller { path, bytes, now });
        }
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskError::Size { bytes });
        }
        if bytes == now {
            return Ok(());
        }
        if self.read_only {
            return Err(DiskError::ReadOnly { path });
        }
        match &self.backing {
            Backing::Raw { file, .. } => grow_raw(file, path, bytes)?,
            Backing::Branch(disk) => {
                let plan = lock(disk).plan();
                // It syncs files, and the guest goes on meanwhile.
                let next = plan.grown_to(bytes)?.prepare()?;
                let cut = lock(disk).cut(next)?;
                // The disk has grown already. What is not durable yet will be with the next flush, or is finished when the
                // disk is opened again.
                if let Err(error) = cut.finish() {
                    tracing::warn!(path = self.path, %error, "a layer is not finished");
                }
            }
        }
        self.sectors.store(bytes / SECTOR_BYTES, Ordering::Release);
        Ok(())
    }

    /// As [`super::DiskControl::refresh_size`].
    pub(super) fn refresh_size(&self) {
        if let Backing::Branch(disk) = &self.backing {
            let bytes = lock(disk).bytes();
            self.sectors.store(bytes / SECTOR_BYTES, Ordering::Release);
        }
    }

    fn writable(&self, sector: u64, len: u64) -> io::Result<u64> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        self.offset(sector, len)
    }

    /// The byte offset of `sector`, if `len` bytes from there on are whole sectors of this disk.
    fn offset(&self, sector: u64, len: u64) -> io::Result<u64> {
        let end = sector.checked_add(len / SECTOR_BYTES);
        if !len.is_multiple_of(SECTOR_BYTES) || end.is_none_or(|end| end > self.sectors()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // It is less than the size of the file, which is a u64.
        Ok(sector * SECTOR_BYTES)
    }
}

/// Makes a file as long; a block device is that long, or not.
fn grow_raw(file: &File, path: String, bytes: u64) -> Result<(), DiskError> {
    let failed = |source| DiskError::Grow {
        path: path.clone(),
        source,
    };
    let there = (&*file).seek(SeekFrom::End(0)).map_err(failed)?;
    // As when it is opened: a part of a sector is nothing.
    let there = there - there % SECTOR_BYTES;
    if there > bytes {
        return Err(DiskError::MoreThere { path, bytes, there });
    }
    if there == bytes {
        return Ok(());
    }
    if file.metadata().map_err(failed)?.is_file() {
        return file.set_len(bytes).map_err(failed);
    }
    Err(DiskError::DeviceTooSmall { path, there })
}

/// What has to wait of reads.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// What is not in the page cache: parts of files that stay open until the machine is held, when nothing is under way
    /// ([`branch_disk::Disk::adopt`]).
    pub(super) parts: Vec<Part>,
    /// What is not on this host, in pieces.
    pub(super) awaited: Vec<Awaited>,
}

impl Left {
    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty() && self.awaited.is_empty()
    }

    /// How many reads bring it.
    pub(super) fn read_count(&self) -> u64 {
        let parts = self.parts.iter().map(|part| part.read_count());
        parts.sum::<u64>() + self.awaited.len() as u64
    }

    pub(super) fn extend(&mut self, more: Self) {
        self.parts.extend(more.parts);
        self.awaited.extend(more.awaited);
    }
}

/// Guest memory that a disk reads into as far as that need not wait.
struct Peeking<'m, 'p> {
    rest: Run<'m>,
    peek: &'p mut Peek,
    left: Left,
}

impl Sink for Peeking<'_, '_> {
    fn len(&self) -> u64 {
        self.rest.len()
    }

    fn fill(&mut self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let rest = self.rest.split_off(len);
        let now = std::mem::replace(&mut self.rest, rest);
        if *self.peek == Peek::Cache {
            match vectored::read_without_waiting(file, now.slices(), offset) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Unsupported => *self.peek = Peek::Wait,
                Err(_) => {}
            }
        }
        if *self.peek == Peek::Wait {
            return vectored::read_exact_at(file, now.slices(), offset);
        }
        self.left.parts.push(Part {
            file: file.as_raw_fd(),
            offset,
            len,
        });
        Ok(())
    }

    fn zero(&mut self, len: u64) {
        let rest = self.rest.split_off(len);
        std::mem::replace(&mut self.rest, rest).zero();
    }

    fn is_to_wait(&mut self, awaited: Awaited) -> io::Result<bool> {
        self.rest = self.rest.split_off(awaited.bytes());
        self.left.awaited.extend(awaited.pieces());
        Ok(false)
    }
}

/// Guest memory that a disk reads into or writes from, without a copy in between.
struct Guest<'m>(Run<'m>);

impl Sink for Guest<'_> {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn fill(&mut self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let rest = self.0.split_off(len);
        let now = std::mem::replace(&mut self.0, rest);
        vectored::read_exact_at(file, now.slices(), offset)
    }

    fn zero(&mut self, len: u64) {
        let rest = self.0.split_off(len);
        std::mem::replace(&mut self.0, rest).zero();
    }
}

/// Guest memory that a disk reads into what is on this host.
struct Here<'m>(Guest<'m>);

impl Sink for Here<'_> {
    fn len(&self) -> u64 {
        Sink::len(&self.0)
    }

    fn fill(&mut self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        self.0.fill(file, offset, len)
    }

    fn zero(&mut self, len: u64) {
        self.0.zero(len);
    }

    fn is_to_wait(&mut self, awaited: Awaited) -> io::Result<bool> {
        tracing::debug!(?awaited, "a part of a disk was not to be had");
        Err(io::ErrorKind::NotFound.into())
    }
}

impl Source for Guest<'_> {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn drain(&mut self, file: &File, offset: u64) -> io::Result<()> {
        vectored::write_all_at(file, std::mem::take(&mut self.0).slices(), offset)
    }
}
