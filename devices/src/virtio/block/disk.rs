//! The file behind a disk.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Seek, SeekFrom},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use super::{SECTOR_BYTES, vectored};
use crate::virtio::buffers::Run;

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

/// A raw image, locked against other machines for as long as it is open.
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    path: String,
    sectors: u64,
    read_only: bool,
}

impl Disk {
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
        let path = path
            .into_os_string()
            .into_string()
            .map_err(|path| DiskError::NotUtf8 { path: path.into() })?;
        Ok(Self {
            file,
            path,
            sectors: bytes / SECTOR_BYTES,
            read_only,
        })
    }

    /// The image's absolute path.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// Sectors of 512 bytes.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    pub(super) fn read(&self, sector: u64, data: &Run<'_>) -> io::Result<()> {
        let offset = self.offset(sector, data.len())?;
        vectored::read_exact_at(&self.file, data.slices(), offset)
    }

    pub(super) fn write(&self, sector: u64, data: &Run<'_>) -> io::Result<()> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let offset = self.offset(sector, data.len())?;
        vectored::write_all_at(&self.file, data.slices(), offset)
    }

    /// Makes what was written durable.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// The byte offset of `sector`, if `len` bytes from there on are whole sectors of this disk.
    fn offset(&self, sector: u64, len: u64) -> io::Result<u64> {
        let end = sector.checked_add(len / SECTOR_BYTES);
        if !len.is_multiple_of(SECTOR_BYTES) || end.is_none_or(|end| end > self.sectors) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // It is less than the size of the file, which is a u64.
        Ok(sector * SECTOR_BYTES)
    }
}
