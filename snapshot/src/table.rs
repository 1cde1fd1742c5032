//! What follows the memory image in a memory file: a digest for each granule, and a footer.
//!
//! `docs/memory-format.md` specifies the bytes. The digests (XXH64) find accidents: they are nearly
//! as fast as memory, with vector units or without, and no defence against somebody who forges a file, whom a digest in the same
//! file could not stop either.

use std::ops::Range;

use saved_state::SnapshotId;
use xxhash_rust::xxh64::xxh64;

use crate::FORGED;

/// Bytes of guest memory under one digest. The last granule of an image may be shorter.
pub(crate) const GRANULE_BYTES: u64 = 64 << 10;

/// Bytes of the footer, which is the last thing in the file.
pub(crate) const FOOTER_BYTES: usize = 128;

const MAGIC: [u8; 8] = *b"FERMATAM";
pub(crate) const VERSION: u32 = 1;
const CHECKSUM_BYTES: usize = 32;
/// A granule of zeros is a hole: it has no digest.
pub(crate) const HOLE: u64 = 0;

/// The digest of a granule's `content`, [`HOLE`] if it is all zero.
pub(crate) fn digest(content: &[u8]) -> u64 {
    if is_zero(content) {
        return HOLE;
    }
    // Once in 2^64 granules a digest has to make way for the mark of a hole.
    xxh64(content, 0).max(1)
}

/// Whether all of `bytes` are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<64>();
    blocks
        .iter()
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// The digests of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) digests: Vec<u64>,
}

/// What the footer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Footer {
    pub(crate) id: SnapshotId,
    pub(crate) memory_bytes: u64,
    table_checksum: [u8; CHECKSUM_BYTES],
}

impl Table {
    /// The ranges of the image that are not holes, ascending and apart.
    pub(crate) fn data(&self, memory_bytes: u64) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (granule, digest) in (0..).zip(&self.digests) {
            if *digest == HOLE {
                continue;
            }
            let start = granule * GRANULE_BYTES;
            let end = (start + GRANULE_BYTES).min(memory_bytes);
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }

    pub(crate) fn is_hole(&self, granule: usize) -> bool {
        self.digests
            .get(granule)
            .is_none_or(|digest| *digest == HOLE)
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.digests
            .iter()
            .flat_map(|digest| digest.to_le_bytes())
            .collect()
    }

    /// Reads the table that `footer` belongs to.
    pub(crate) fn from_bytes(bytes: &[u8], footer: &Footer) -> Option<Self> {
        if !FORGED && *blake3::hash(bytes).as_bytes() != footer.table_checksum {
            return None;
        }
        let (digests, _) = bytes.as_chunks::<8>();
        Some(Self {
            digests: digests
                .iter()
                .map(|digest| u64::from_le_bytes(*digest))
                .collect(),
        })
    }
}

impl Footer {
    pub(crate) fn new(id: SnapshotId, memory_bytes: u64, table: &[u8]) -> Self {
        Self {
            id,
            memory_bytes,
            table_checksum: *blake3::hash(table).as_bytes(),
        }
    }

    /// Granules in an image of `memory_bytes`.
    pub(crate) fn granules(memory_bytes: u64) -> u64 {
        memory_bytes.div_ceil(GRANULE_BYTES)
    }

    /// Bytes of a memory file with an image of `memory_bytes`.
    pub(crate) fn file_bytes(memory_bytes: u64) -> u64 {
        memory_bytes + Self::granules(memory_bytes) * 8 + FOOTER_BYTES as u64
    }

    pub(crate) fn to_bytes(self) -> [u8; FOOTER_BYTES] {
        let Self {
            id,
            memory_bytes,
            table_checksum,
        } = self;
        let mut out = Vec::with_capacity(FOOTER_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(GRANULE_BYTES as u32).to_le_bytes());
        out.extend_from_slice(&memory_bytes.to_le_bytes());
        out.extend_from_slice(&id.0);
        out.extend_from_slice(&table_checksum);
        out.resize(FOOTER_BYTES - CHECKSUM_BYTES, 0);
        let checksum = blake3::hash(&out);
        let mut footer = [0; FOOTER_BYTES];
        let (fields, end) = footer.split_at_mut(FOOTER_BYTES - CHECKSUM_BYTES);
        fields.copy_from_slice(&out);
        end.copy_from_slice(checksum.as_bytes());
        footer
    }

    /// Reads a footer.
    ///
    /// # Errors
    ///
    /// What is wrong with it, to follow the name of the file.
    pub(crate) fn from_bytes(bytes: &[u8; FOOTER_BYTES]) -> Result<Self, String> {
        let (fields, checksum) = bytes.split_at(FOOTER_BYTES - CHECKSUM_BYTES);
        let (magic, rest) = fields.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err("is not a fermata memory file, or was cut; check the path".to_owned());
        }
        if !FORGED && blake3::hash(fields).as_bytes() != checksum {
            return Err(
                "is damaged in its footer (checksum mismatch); take another copy".to_owned(),
            );
        }
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| rest[at + i]));
        let version = word(0);
        if version > VERSION {
            return Err(format!(
                "has format version {version}, this release reads {VERSION}; use a newer release"
            ));
        }
        let zeros = &rest[32 + CHECKSUM_BYTES..];
        if version == 0 || u64::from(word(4)) != GRANULE_BYTES || zeros.iter().any(|&b| b != 0) {
            return Err("has a footer as fermata writes none; take another copy".to_owned());
        }
        Ok(Self {
            memory_bytes: u64::from_le_bytes(std::array::from_fn(|i| rest[8 + i])),
            id: SnapshotId(std::array::from_fn(|i| rest[16 + i])),
            table_checksum: std::array::from_fn(|i| rest[32 + i]),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn data_is_what_is_no_hole() {
        let table = Table {
            digests: vec![0, 5, 6, 0, 7],
        };
        let end = 4 * GRANULE_BYTES + 4096;
        assert_eq!(
            table.data(end),
            [GRANULE_BYTES..3 * GRANULE_BYTES, 4 * GRANULE_BYTES..end]
        );
    }

    #[test]
    fn every_flipped_bit_of_a_footer_is_found() {
        let footer = Footer::new(SnapshotId([3; 16]), 1 << 28, b"table");
        let bytes = footer.to_bytes();
        assert_eq!(Footer::from_bytes(&bytes), Ok(footer));
        for at in 0..FOOTER_BYTES * 8 {
            let mut damaged = bytes;
            damaged[at / 8] ^= 1 << (at % 8);
            assert!(Footer::from_bytes(&damaged).is_err(), "bit {at}");
        }
    }

    #[test]
    fn a_footer_that_fermata_does_not_write_is_refused() {
        for (at, value) in [(8, 0), (14, 2), (72, 1), (95, 1)] {
            let mut bytes = Footer::new(SnapshotId([3; 16]), 1 << 28, b"table").to_bytes();
            bytes[at] = value;
            let (fields, end) = bytes.split_at_mut(FOOTER_BYTES - CHECKSUM_BYTES);
            end.copy_from_slice(blake3::hash(fields).as_bytes());
            let refused = Footer::from_bytes(&bytes).unwrap_err();
            assert!(refused.contains("writes none"), "byte {at}: {refused}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_footers_never_panic(bytes: [u8; 32]) {
            let mut footer = [0; FOOTER_BYTES];
            footer[..8].copy_from_slice(&MAGIC);
            footer[8..40].copy_from_slice(&bytes);
            let checksum = blake3::hash(&footer[..FOOTER_BYTES - CHECKSUM_BYTES]);
            footer[FOOTER_BYTES - CHECKSUM_BYTES..].copy_from_slice(checksum.as_bytes());
            let _ = Footer::from_bytes(&footer);
        }

        #[test]
        fn only_zeros_are_zero(len in 0usize..300, at in 0usize..300) {
            let mut bytes = vec![0u8; len];
            prop_assert!(is_zero(&bytes));
            if at < len {
                bytes[at] = 1;
                prop_assert!(!is_zero(&bytes));
            }
        }
    }
}
