//! Reads of a round that have to wait for the host's disk: they wait together.
//!
//! What is in the host's page cache is copied at once, which costs less than to hand it to anybody. What is not is kept until
//! the round ends, and read by [`Ring`] with the others; a disk does many at once several times as fast as one after
//! the other (`docs/decisions/io-uring.md`). Writes go to the page cache and do not wait.

use std::io;

use super::{
    Header,
    disk::Disk,
    ring::{Piece, Ring},
};
use crate::virtio::buffers::Run;

/// The most bytes that are kept, as of one request.
const MAX_BYTES: u64 = super::MAX_REQUEST_BYTES;

/// What reads may overlap by.
pub(super) enum Overlap {
    /// Nothing had to wait so far.
    Untried,
    Ready(Box<Ring>),
    /// One after the other.
    Never,
}

/// A read that is kept.
pub(super) struct Kept<'m> {
    pub(super) head: u16,
    pub(super) status: Run<'m>,
    pub(super) header: Header,
    pub(super) data: Run<'m>,
    /// What of it is still to be read.
    pub(super) pieces: Vec<Piece<'m>>,
}

impl Overlap {
    /// Whether a read that would wait can be kept beside others of `bytes`.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        !matches!(self, Self::Never) && bytes <= MAX_BYTES
    }

    /// Reads what was kept; of each, what came of it.
    pub(super) fn read(&mut self, disk: &Disk, kept: &[Kept<'_>]) -> Vec<io::Result<()>> {
        let mut complete = vec![false; kept.len()];
        if kept.len() > 1
            && let Some(ring) = self.ring(disk)
        {
            match disk.while_open(|| read_all(ring, kept)) {
                Ok(all) => complete = all,
                Err(error) => self.give_up(disk, &error),
            }
        }
        let both = kept.iter().zip(complete);
        // One that is alone, or was read in part or with an error: the host says once more what is wrong.
        both.map(|(kept, complete)| match complete {
            true => Ok(()),
            false => disk.read(kept.header.sector, &kept.data),
        })
        .collect()
    }

    fn ring(&mut self, disk: &Disk) -> Option<&mut Ring> {
        if let Self::Untried = self {
            match Ring::new() {
                Ok(ring) => *self = Self::Ready(Box::new(ring)),
                Err(error) => self.give_up(disk, &error),
            }
        }
        match self {
            Self::Ready(ring) => Some(ring),
            Self::Untried | Self::Never => None,
        }
    }

    fn give_up(&mut self, disk: &Disk, error: &io::Error) {
        tracing::warn!(
            path = disk.path(),
            %error,
            "io_uring is not to be had here; the disk is read one request after the other"
        );
        *self = Self::Never;
    }
}

/// Whether all of each has been read.
fn read_all(ring: &mut Ring, kept: &[Kept<'_>]) -> io::Result<Vec<bool>> {
    let pieces: Vec<Piece<'_>> = kept
        .iter()
        .flat_map(|kept| &kept.pieces)
        .map(Piece::again)
        .collect();
    let mut complete = ring.read(&pieces)?.into_iter();
    let of_each = kept.iter().map(|kept| {
        let of_one: Vec<bool> = complete.by_ref().take(kept.pieces.len()).collect();
        of_one.into_iter().all(|complete| complete)
    });
    Ok(of_each.collect())
}
