//! Reading what a failing disk still gives.

use std::io;

use rustix::io::Errno;

use crate::backend::ReadAt;

/// Bytes that are tried alone: no disk loses less than a sector, which is this or a part of it.
const PIECE_BYTES: usize = 4096;

/// Fills `buf` from `offset` with what can be read, and with zeros where a disk has lost something; gives the number of bytes that
/// could be read.
///
/// # Errors
///
/// Every one but those by which a disk or a file system tells that it has lost a part of a file.
pub(crate) fn read_readable(file: &dyn ReadAt, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    if !is_lost(file.read_exact_at(buf, offset))? {
        return Ok(buf.len());
    }
    let (mut at, mut readable) = (0, 0);
    while at < buf.len() {
        // Those of the file, so that what is lost is in as few of them as can be.
        let in_piece = ((offset + at as u64) % PIECE_BYTES as u64) as usize;
        let len = (PIECE_BYTES - in_piece).min(buf.len() - at);
        let piece = &mut buf[at..at + len];
        if is_lost(file.read_exact_at(piece, offset + at as u64))? {
            piece.fill(0);
        } else {
            readable += len;
        }
        at += len;
    }
    Ok(readable)
}

/// Whether a read has failed because its bytes are lost.
fn is_lost(read: io::Result<()>) -> io::Result<bool> {
    const LOST: [Errno; 3] = [Errno::IO, Errno::BADMSG, Errno::UCLEAN];
    match read {
        Ok(()) => Ok(false),
        Err(error)
            if LOST
                .iter()
                .any(|lost| error.raw_os_error() == Some(lost.raw_os_error())) =>
        {
            Ok(true)
        }
        Err(other) => Err(other),
    }
}
