//! What a disk reads into and writes from: memory of whatever kind, a piece at a time, so that nothing is copied on the
//! way between a file and a guest.

use std::{fs::File, io, os::unix::fs::FileExt};

use rustix::{fs::FallocateFlags, io::Errno};

use crate::arrival::Awaited;

/// Memory to be filled, from its front.
pub trait Sink {
    /// Bytes still to be filled.
    fn len(&self) -> u64;

    /// Whether it is full.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills the next `len` bytes from `file` at `offset`; never asked for more than [`Sink::len`].
    ///
    /// # Errors
    ///
    /// What the host says; `UnexpectedEof` when the file is too short.
    fn fill(&mut self, file: &File, offset: u64, len: u64) -> io::Result<()>;

    /// Fills the next `len` bytes with zeros.
    fn zero(&mut self, len: u64);

    /// What its next bytes are is not here yet. Waits for it and says so; or takes those bytes for filled, so that they are not, and
    /// says no.
    ///
    /// # Errors
    ///
    /// When it cannot be had.
    fn is_to_wait(&mut self, awaited: Awaited) -> io::Result<bool> {
        awaited.bring().map(|()| true)
    }
}

/// Memory to be written, from its front.
pub trait Source {
    /// Bytes still to be written.
    fn len(&self) -> u64;

    /// Whether all is written.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes all of it to `file` at `offset`.
    ///
    /// # Errors
    ///
    /// What the host says.
    fn drain(&mut self, file: &File, offset: u64) -> io::Result<()>;
}

impl Sink for &mut [u8] {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn fill(&mut self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let (now, later) = std::mem::take(self).split_at_mut(len as usize);
        *self = later;
        file.read_exact_at(now, offset)
    }

    fn zero(&mut self, len: u64) {
        let (now, later) = std::mem::take(self).split_at_mut(len as usize);
        *self = later;
        now.fill(0);
    }
}

impl Source for &[u8] {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn drain(&mut self, file: &File, offset: u64) -> io::Result<()> {
        file.write_all_at(std::mem::take(self), offset)
    }
}

/// What becomes of the space that zeros take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// It is given back.
    Free,
    /// It stays, so that a later write does not fail for want of it.
    Keep,
}

/// Makes `len` bytes of `file` at `offset` read as zeros.
///
/// # Errors
///
/// What the host says.
pub fn zero_range(file: &File, offset: u64, len: u64, space: Space) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let flags = match space {
        Space::Free => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        Space::Keep => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
    };
    loop {
        return match rustix::fs::fallocate(file, flags, offset, len) {
            Ok(()) => Ok(()),
            Err(Errno::INTR) => continue,
            Err(errno) if cannot(errno) => write_zeros(file, offset, len),
            Err(errno) => Err(errno.into()),
        };
    }
}

/// Gives the space of `len` bytes of `file` at `offset` back, where the host knows how. What is read there afterwards is
/// either what was there, or zeros.
///
/// # Errors
///
/// What the host says.
pub fn discard_range(file: &File, offset: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        return match rustix::fs::fallocate(file, flags, offset, len) {
            Err(Errno::INTR) => continue,
            Ok(()) => Ok(()),
            Err(errno) if cannot(errno) => Ok(()),
            Err(errno) => Err(errno.into()),
        };
    }
}

/// Whether `fallocate` says that it does not know how. Not every file system does and no old block device, and one of
/// larger logical blocks refuses a range that is not of whole blocks as invalid.
fn cannot(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL
    )
}

fn write_zeros(file: &File, offset: u64, len: u64) -> io::Result<()> {
    const ZEROS: &[u8] = &[0; 64 << 10];
    let mut done = 0;
    while done < len {
        let now = (len - done).min(ZEROS.len() as u64);
        file.write_all_at(&ZEROS[..now as usize], offset + done)?;
        done += now;
    }
    Ok(())
}
