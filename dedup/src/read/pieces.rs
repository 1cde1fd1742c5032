//! Places all over an image that are read together: each frame is decoded once, in the order in which frames lie in their packs.

use std::ops::Range;

use super::ImageReader;
use super::parts::{PartReader, extend};
use crate::error::{Error, Result};
use crate::recipe::{BLOCK_CHUNKS, Place};

/// A range of an image that is zero, or that comes out of a frame as a whole. Pieces are ordered by where they are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it is in the image, in bytes.
    pub range: Range<u64>,
    /// None of zeros.
    pub(super) within: Option<Within>,
}

/// Where a piece is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Within {
    /// By the directory's count.
    pub(super) pack: u32,
    pub(super) frame: u32,
    /// Bytes of the frame before it.
    pub(super) from: usize,
}

impl Piece {
    /// Where its bytes are in the frame, of which so many come before it.
    pub(super) fn bytes_in_frame(&self, from: usize) -> Range<usize> {
        from..from + (self.range.end - self.range.start) as usize
    }
}

impl Ord for Piece {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let key = |piece: &Self| (piece.within, piece.range.start, piece.range.end);
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for Piece {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl ImageReader {
    /// What has to be read for each of `offsets`, with what lies around it and costs nothing more ([`ImageReader::around`]), in
    /// their order; nothing for those that are in a piece already. No frame is read for that.
    ///
    /// # Errors
    ///
    /// As [`ImageReader::read_at`].
    pub fn pieces(&self, offsets: &[u64]) -> Result<Vec<Piece>> {
        let mut by_place: Vec<(u64, usize)> = offsets.iter().copied().zip(0..).collect();
        // So each block of the recipe is decoded once, whatever the cache has room for.
        by_place.sort_unstable();
        let mut pieces: Vec<(usize, Piece)> = Vec::new();
        for (offset, turn) in by_place {
            match pieces.last_mut() {
                Some((first, piece)) if piece.range.contains(&offset) => *first = turn.min(*first),
                _ => pieces.push((turn, self.piece_at(offset)?)),
            }
        }
        pieces.sort_unstable_by_key(|(turn, _)| *turn);
        Ok(pieces.into_iter().map(|(_, piece)| piece).collect())
    }

    /// The piece that has `offset`.
    pub(super) fn piece_at(&self, offset: u64) -> Result<Piece> {
        if offset >= self.size() {
            return Err(Error::OutOfRange {
                offset,
                len: 1,
                size: self.size(),
            });
        }
        let config = &self.shared.config;
        let chunk = (offset / self.chunk_bytes()) as usize;
        let (block, here) = (chunk / BLOCK_CHUNKS, chunk % BLOCK_CHUNKS);
        let places = self.places(block)?;
        let Some((pack, slot)) = places[here].get(config.pack_slots()) else {
            let run = extend(&places, here, |a, b| a.is_zero() && b.is_zero());
            return Ok(Piece {
                range: self.bytes_of(block, &run),
                within: None,
            });
        };
        let frame_of = |place: Place| {
            place
                .get(config.pack_slots())
                .map(|(_, s)| s / config.frame_chunks())
        };
        let run = extend(&places, here, |place, next| {
            next.follows(place) && frame_of(place) == frame_of(next)
        });
        let first = (slot % config.frame_chunks()) as usize - (here - run.start);
        Ok(Piece {
            range: self.bytes_of(block, &run),
            within: Some(Within {
                pack,
                frame: slot / config.frame_chunks(),
                from: first * config.chunk_size as usize,
            }),
        })
    }
}

impl PartReader<'_> {
    /// The bytes of a piece of this image, verified; `None` of zeros. A frame that was decoded for the piece before is not
    /// decoded again.
    ///
    /// # Errors
    ///
    /// As [`ImageReader::read_at`].
    pub fn read_piece(&mut self, piece: &Piece) -> Result<Option<&[u8]>> {
        let Some(Within { pack, frame, from }) = piece.within else {
            return Ok(None);
        };
        self.loader.decode_once(pack, frame)?;
        self.loader.bytes(piece.bytes_in_frame(from)).map(Some)
    }
}
