//! What a discard or zeroes are for: `struct virtio_blk_discard_write_zeroes` (virtio 1.3, 5.2.6).

use std::io;

use super::SECTOR_BYTES;
use crate::virtio::buffers::Run;

const BYTES: u64 = 16;
/// The most ranges in a request: with one, the most sectors of a range are those of a request.
pub(super) const MAX_RANGES: u32 = 1;

/// The range of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    pub(super) sector: u64,
    sectors: u32,
    pub(super) flags: u32,
}

impl Range {
    /// Reads the one range that `output` is, of no more sectors than `most`.
    pub(super) fn of(output: &Run<'_>, most: u32) -> io::Result<Self> {
        let mut output = output.clone();
        if output.len() != BYTES * u64::from(MAX_RANGES) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes: [u8; BYTES as usize] = output.take_front().ok_or(io::ErrorKind::InvalidInput)?;
        let word = u128::from_le_bytes(bytes);
        let range = Self {
            sector: word as u64,
            sectors: (word >> 64) as u32,
            flags: (word >> 96) as u32,
        };
        if range.sectors > most {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(range)
    }

    /// The range, unless it has other flags than `known`.
    pub(super) fn known(self, known: u32) -> Option<Self> {
        (self.flags & !known == 0).then_some(self)
    }

    /// Bytes of the range.
    pub(super) fn len(self) -> u64 {
        u64::from(self.sectors) * SECTOR_BYTES
    }
}
