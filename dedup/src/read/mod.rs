//! Reading images.

mod frames;
mod load;
mod parts;
mod pieces;

use std::sync::Arc;

use quick_cache::sync::Cache;

pub(crate) use frames::Frames;
pub use load::Zeros;
pub use parts::{Around, Decoded, PartReader};
pub use pieces::Piece;

use crate::error::{Error, Result};
use crate::name::FileId;
use crate::protect::Claim;
use crate::recipe::{BLOCK_CHUNKS, Place};
use crate::snapshot::{Recipe, Snapshot};
use crate::store::Shared;

/// Decoded recipe blocks that a reader keeps: 4 GiB of image in 8 MiB of memory.
const CACHED_BLOCKS: usize = 1024;

/// An image of a snapshot, open for reading by any number of threads.
///
/// While it is open, `gc` leaves the image's chunks alone, even when the snapshot is removed. Where nothing can be
/// written, because the store is read-only or the disk is full, there is no such protection.
pub struct ImageReader {
    shared: Arc<Shared>,
    recipe: Recipe,
    blocks: Cache<usize, Arc<Vec<Place>>>,
    _claim: Option<Claim>,
}

impl ImageReader {
    pub(crate) fn open(shared: Arc<Shared>, snapshot: &Snapshot, image: &str) -> Result<Self> {
        shared.keys.get()?;
        let recipe = snapshot.recipe_of(&shared.config, image)?;
        let packs = recipe
            .directory
            .packs
            .iter()
            .copied()
            .filter(|id| *id != FileId::default());
        let claim = Claim::new(&*shared.backend)
            .and_then(|claim| claim.add(&packs.collect::<Vec<_>>()).map(|()| claim));
        let claim = match claim {
            // Reading must go on where nothing can be written; it is only not protected then.
            Err(Error::ReadOnly(_) | Error::NoSpace(_)) => None,
            other => Some(other?),
        };
        // A collection that had read the leases before has then seen the snapshot, if it is still there now.
        snapshot.is_there(&shared)?;
        Ok(ImageReader {
            shared,
            recipe,
            blocks: Cache::new(CACHED_BLOCKS),
            _claim: claim,
        })
    }

    pub(crate) fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// Bytes of the image.
    pub fn size(&self) -> u64 {
        self.recipe.size
    }

    /// Fills `buf` with the bytes from `offset` on. Decodes the frames that it needs and finds them decoded
    /// the next time, as long as the store's cache has room.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`] beyond the image's end; [`Error::Damaged`], and nothing of a damaged frame is given
    /// out.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        if offset
            .checked_add(len)
            .is_none_or(|end| end > self.recipe.size)
        {
            return Err(Error::OutOfRange {
                offset,
                len,
                size: self.recipe.size,
            });
        }
        let config = &self.shared.config;
        let chunk_size = u64::from(config.chunk_size);
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let (chunk, in_chunk) = (at / chunk_size, (at % chunk_size) as usize);
            let len = (chunk_size as usize - in_chunk).min(rest.len());
            let (part, after) = rest.split_at_mut(len);
            let place = self.places(chunk as usize / BLOCK_CHUNKS)?[chunk as usize % BLOCK_CHUNKS];
            match place.get(config.pack_slots()) {
                None => part.fill(0),
                Some((pack, slot)) => {
                    let (frame, in_frame) =
                        (slot / config.frame_chunks(), slot % config.frame_chunks());
                    let pack = self.recipe.directory.packs[pack as usize];
                    let decoded = self.shared.frames.get(&self.shared, pack, frame)?;
                    let from = in_frame as usize * chunk_size as usize + in_chunk;
                    let bytes = decoded.get(config, &(from..from + len));
                    part.copy_from_slice(bytes.ok_or_else(|| not_there(pack))?);
                }
            }
            at += len as u64;
            rest = after;
        }
        Ok(())
    }

    /// The places of a block's chunks.
    fn places(&self, block: usize) -> Result<Arc<Vec<Place>>> {
        self.blocks.get_or_insert_with(&block, || {
            let mut coder = self.shared.frames.take_coder()?;
            let places = self.recipe.places(block, &mut coder).map(Arc::new);
            self.shared.frames.return_coder(coder);
            places
        })
    }
}

/// The error for a place that its frame does not have.
fn not_there(pack: FileId) -> Error {
    Error::Damaged {
        file: crate::backend::Area::Packs.path(&pack.to_string()),
        what: "a chunk that is referred to is not there",
    }
}
