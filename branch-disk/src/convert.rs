//! From and to other formats.

use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::FileExt,
    path::Path,
};

use rustix::{fs::SeekFrom, io::Errno};

use crate::{
    chain::Rule,
    create::{Draft, absolute, new_id, vacant},
    disk::Disk,
    error::Error,
    header::{Header, Parent},
    layout::{Geometry, SECTOR_BYTES},
    media::{Lock, Media},
    name,
};

/// Copied at a time, in bytes.
const PIECE_BYTES: u64 = 1 << 20;
/// Where this much is zero, nothing is written.
pub(crate) const BLOCK_BYTES: usize = 4096;

/// How much was copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Size of the disk.
    pub bytes: u64,
    /// Bytes of it that are not zero.
    pub data_bytes: u64,
}

/// Writes what a disk has into a new raw image, in which zeros are holes. It has its name once it is whole and durable.
///
/// # Errors
///
/// [`Error`]; [`Error::Exists`] when there is anything at `to`.
pub fn export_raw(disk: &Disk, to: &Path) -> Result<Copied, Error> {
    export(to, |file| {
        file.set_len(disk.bytes())?;
        copy(
            disk.bytes(),
            |offset| Ok(disk.next_data(offset)),
            |offset, mut piece| disk.read(offset, &mut piece),
            |offset, data| file.write_all_at(data, offset),
        )
    })
}

/// Has `write` fill a new image, which is `to` when it is whole and durable.
pub(crate) fn export(
    to: &Path,
    write: impl FnOnce(&File) -> io::Result<Copied>,
) -> Result<Copied, Error> {
    let to = absolute(to)?;
    vacant(&to)?;
    name::sweep(&to);
    let draft = Draft::of_an_image(&to)?;
    let file = OpenOptions::new().read(true).write(true).open(draft.path());
    let written = file.and_then(|file| {
        let copied = write(&file)?;
        file.sync_all()?;
        #[cfg(test)]
        crate::tape::synced(&file);
        Ok(copied)
    });
    let copied = written.map_err(Error::io("export to", &to))?;
    draft.publish(&to)?;
    Ok(copied)
}

/// Makes a disk at `to` of the raw image `from`, on which it does not depend afterwards.
///
/// # Errors
///
/// [`Error`]; [`Error::Exists`] when there is anything at `to`, [`Error::InUse`] when a machine writes to `from`.
pub fn import_raw(from: &Path, to: &Path, rule: &Rule<'_>) -> Result<Copied, Error> {
    let media = source(from)?;
    let (file, bytes) = (media.file(), media.bytes()?);
    let read = |offset: u64, piece: &mut [u8]| file.read_exact_at(piece, offset);
    let next = |offset| match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => Ok(data),
        Err(Errno::NXIO) => Ok(u64::MAX),
        // A file system that does not know: everything may be data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(offset),
        Err(errno) => Err(errno.into()),
    };
    import(from, bytes, next, read, to, rule)
}

/// Opens what is to be imported, so that nobody who heeds locks writes to it meanwhile.
pub(crate) fn source(from: &Path) -> Result<Media, Error> {
    let from = from
        .canonicalize()
        .map_err(Error::io("import from", from))?;
    Media::open(&from, false, Lock::Shared, true)
}

/// Makes a disk at `to` of what `read` gives of the image `from`, of `bytes`.
pub(crate) fn import(
    from: &Path,
    bytes: u64,
    next: impl FnMut(u64) -> io::Result<u64>,
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    to: &Path,
    rule: &Rule<'_>,
) -> Result<Copied, Error> {
    let to = absolute(to)?;
    if !rule(&to) {
        return Err(Error::NotAllowed { path: to });
    }
    vacant(&to)?;
    let padded = bytes.checked_next_multiple_of(SECTOR_BYTES);
    let geometry = padded.and_then(Geometry::of);
    let header = Header {
        id: new_id(&to)?,
        geometry: geometry.ok_or_else(|| Error::ImageSize {
            path: from.to_owned(),
            bytes,
        })?,
        depth: 1,
        below: 0,
        parent: Parent::Nothing,
    };
    // It gets its name when it is whole.
    name::sweep(&to);
    let draft = Draft::of_its_own(&to, &header)?;
    let mut disk = Disk::of_draft(&draft)?;
    let mut wrote = Ok(());
    let read = |offset: u64, piece: &mut [u8]| {
        // What is missing of the last sector is zeros.
        let there = bytes.saturating_sub(offset).min(piece.len() as u64) as usize;
        let (there, missing) = piece.split_at_mut(there);
        missing.fill(0);
        read(offset, there)
    };
    let copied = copy(disk.bytes(), next, read, |offset, mut data| {
        wrote = disk.write(offset, &mut data);
        // Told apart from what cannot be read.
        wrote.as_ref().map_err(|_| ErrorKind::Other.into()).copied()
    });
    wrote.map_err(Error::io("import to", &to))?;
    let copied = copied.map_err(Error::io("import from", from))?;
    disk.flush()?;
    drop(disk);
    draft.publish(&to)?;
    Ok(copied)
}

/// Copies `bytes`, all but the blocks of zeros. `next` says from where on, at or after an offset, there may be others.
pub(crate) fn copy(
    bytes: u64,
    mut next: impl FnMut(u64) -> io::Result<u64>,
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    mut write: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<Copied> {
    let mut copied = Copied {
        bytes,
        data_bytes: 0,
    };
    let mut buffer = vec![0; PIECE_BYTES as usize];
    let mut offset = 0;
    loop {
        // From a block's beginning, wherever the data's is.
        offset = next(offset)?.max(offset) / BLOCK_BYTES as u64 * BLOCK_BYTES as u64;
        if offset >= bytes {
            return Ok(copied);
        }
        let piece = &mut buffer[..PIECE_BYTES.min(bytes - offset) as usize];
        read(offset, piece)?;
        for (block, at) in piece
            .chunks(BLOCK_BYTES)
            .zip((offset..).step_by(BLOCK_BYTES))
        {
            if block.iter().any(|byte| *byte != 0) {
                write(at, block)?;
                copied.data_bytes += block.len() as u64;
            }
        }
        offset += PIECE_BYTES;
    }
}
