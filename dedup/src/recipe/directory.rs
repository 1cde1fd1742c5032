//! Where the blocks of a recipe are, and which packs they count.

use super::{BLOCK_CHUNKS, MAX_STORED_BYTES};
use crate::bytes::Cursor;
use crate::config::Config;
use crate::error::Malformed;
use crate::name::FileId;

/// The head of a recipe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Directory {
    /// Packs by number. One that is no longer in use is the default id, so that blocks of a parent can be kept
    /// as they are.
    pub(crate) packs: Vec<FileId>,
    blocks: Vec<Block>,
}

/// One stored block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// Offset from the first block, in bytes.
    pub(crate) offset: u64,
    pub(crate) len: u32,
    pub(crate) digest: u64,
}

/// How many chunks an image of `size` bytes has.
pub(crate) fn chunks_of(size: u64, config: &Config) -> u64 {
    size.div_ceil(u64::from(config.chunk_size))
}

impl Directory {
    /// Makes one of the packs, and of length and digest of each block.
    pub(crate) fn new(packs: Vec<FileId>, blocks: impl IntoIterator<Item = (u32, u64)>) -> Self {
        let mut offset = 0;
        let blocks = blocks.into_iter().map(|(len, digest)| {
            let block = Block {
                offset,
                len,
                digest,
            };
            offset += u64::from(len);
            block
        });
        Directory {
            packs,
            blocks: blocks.collect(),
        }
    }

    pub(crate) fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Bytes of all blocks.
    pub(crate) fn blocks_len(&self) -> u64 {
        self.blocks
            .last()
            .map_or(0, |last| last.offset + u64::from(last.len))
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&(self.packs.len() as u32).to_le_bytes());
        out.extend_from_slice(&(self.blocks.len() as u32).to_le_bytes());
        out.extend(self.packs.iter().flat_map(|pack| pack.0));
        out.extend(self.blocks.iter().flat_map(|block| block.len.to_le_bytes()));
        out.extend(
            self.blocks
                .iter()
                .flat_map(|block| block.digest.to_le_bytes()),
        );
        out
    }

    /// Reads the directory of an image of `size` bytes.
    pub(crate) fn parse(bytes: &[u8], size: u64, config: &Config) -> Result<Self, Malformed> {
        let mut cursor = Cursor::new(bytes);
        let (packs, blocks) = (u64::from(cursor.u32()?), u64::from(cursor.u32()?));
        if blocks != chunks_of(size, config).div_ceil(BLOCK_CHUNKS as u64) {
            return Err(Malformed("a directory does not fit its image"));
        }
        // Both numbers are bounded by the bytes that are there.
        if 8 + packs * 16 + blocks * 12 != bytes.len() as u64 {
            return Err(Malformed("a directory has a wrong length"));
        }
        let ids = cursor
            .take(packs as usize * 16)?
            .as_chunks()
            .0
            .iter()
            .copied()
            .map(FileId)
            .collect();
        let lens = cursor.take(blocks as usize * 4)?.as_chunks().0;
        let digests = cursor.take(blocks as usize * 8)?.as_chunks().0;
        cursor.end()?;
        let lens = lens.iter().copied().map(u32::from_le_bytes);
        // A file can be sparse: what has the length is not there for that.
        if lens.clone().any(|len| len > MAX_STORED_BYTES) {
            return Err(Malformed("a block is longer than any that is written"));
        }
        let digests = digests.iter().copied().map(u64::from_le_bytes);
        Ok(Directory::new(ids, lens.zip(digests)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CreateOptions;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn directories_come_back(
            packs in prop::collection::vec(any::<[u8; 16]>(), 0..9),
            blocks in prop::collection::vec((0..=MAX_STORED_BYTES, any::<u64>()), 0..99),
        ) {
            let config = Config::new(&CreateOptions::default()).unwrap();
            let size = blocks.len() as u64 * BLOCK_CHUNKS as u64 * 4096;
            let directory = Directory::new(packs.into_iter().map(FileId).collect(), blocks);
            prop_assert_eq!(Directory::parse(&directory.encode(), size, &config), Ok(directory.clone()));
            prop_assert!(Directory::parse(&directory.encode(), size + 1, &config).is_err());
        }

        #[test]
        fn no_block_is_longer_than_any_that_is_written(len in MAX_STORED_BYTES + 1..) {
            let config = Config::new(&CreateOptions::default()).unwrap();
            let directory = Directory::new(Vec::new(), [(len, 0)]);
            prop_assert!(Directory::parse(&directory.encode(), 4096, &config).is_err());
        }

        #[test]
        fn any_bytes_are_no_danger(bytes in prop::collection::vec(any::<u8>(), 0..200), size: u64) {
            let config = Config::new(&CreateOptions::default()).unwrap();
            let _ = Directory::parse(&bytes, size, &config);
        }
    }
}
