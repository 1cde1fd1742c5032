//! Images that are read part by part, while somebody works with what has been read already.

use std::ops::Range;
use std::sync::Arc;

use super::frames::Frame;
use super::load::Loader;
use super::{ImageReader, not_there};
use crate::error::{Error, Result};
use crate::recipe::{BLOCK_CHUNKS, Place};

/// What is at some place of an image, and what is around it that costs nothing more.
#[derive(Clone, Debug)]
pub enum Around {
    /// Zeros, in all of this range.
    Zeros(Range<u64>),
    /// Content of a frame.
    Data(Decoded),
}

/// Bytes of an image, verified.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// Where in the image they begin.
    pub offset: u64,
    frame: Arc<Frame>,
    within: Range<usize>,
}

impl Decoded {
    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.frame.plain[self.within.clone()]
    }
}

impl ImageReader {
    /// Bytes of a chunk. What is told of an image is in whole chunks, but for its end.
    pub fn chunk_bytes(&self) -> u64 {
        self.shared.config.chunk_size.into()
    }

    /// Bytes of a part, of which all but the last are of one size.
    pub fn part_bytes(&self) -> u64 {
        BLOCK_CHUNKS as u64 * self.chunk_bytes()
    }

    /// The parts in which there can be other than zeros, by number, ascending. That is known without reading anything.
    pub fn parts(&self) -> impl Iterator<Item = u64> + '_ {
        let blocks = self.recipe.directory.blocks();
        let parts = (0..).zip(blocks).filter(|(_, block)| block.len > 0);
        parts.map(|(number, _)| number)
    }

    /// Where a part is in the image.
    pub fn part(&self, number: u64) -> Range<u64> {
        let bytes = self.part_bytes();
        let at = |number: u64| number.saturating_mul(bytes).min(self.size());
        at(number)..at(number.saturating_add(1))
    }

    /// The runs of chunks of a part that are not zeros, ascending. That is known without reading a frame.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`] when there is no such part; as [`ImageReader::read_at`].
    pub fn data_in(&self, part: u64) -> Result<Vec<Range<u64>>> {
        let at = self.part(part);
        if at.is_empty() {
            return Err(self.no_part(&at));
        }
        let block = part as usize;
        let places = self.places(block)?;
        let mut runs: Vec<Range<u64>> = Vec::new();
        for chunk in (0..places.len()).filter(|chunk| !places[*chunk].is_zero()) {
            let Range { start, end } = self.bytes_of(block, &(chunk..chunk + 1));
            match runs.last_mut() {
                Some(run) if run.end == start => run.end = end,
                _ => runs.push(start..end),
            }
        }
        Ok(runs)
    }

    fn no_part(&self, at: &Range<u64>) -> Error {
        Error::OutOfRange {
            offset: at.start,
            len: 1,
            size: self.size(),
        }
    }

    /// What is at `offset`, with all of its frame, or of its run of zeros, that lies around it in the image and in the same
    /// part. Finds a frame decoded that was decoded before, as [`ImageReader::read_at`] does.
    ///
    /// # Errors
    ///
    /// As [`ImageReader::read_at`].
    pub fn around(&self, offset: u64) -> Result<Around> {
        let piece = self.piece_at(offset)?;
        let Some(within) = piece.within else {
            return Ok(Around::Zeros(piece.range));
        };
        let id = self.recipe.directory.packs[within.pack as usize];
        let frame = self.shared.frames.get(&self.shared, id, within.frame)?;
        let bytes = piece.bytes_in_frame(within.from);
        if frame.get(&self.shared.config, &bytes).is_none() {
            return Err(not_there(id));
        }
        Ok(Around::Data(Decoded {
            offset: piece.range.start,
            frame,
            within: bytes,
        }))
    }

    /// Something to read parts with, one after the other.
    ///
    /// # Errors
    ///
    /// When memory is short.
    pub fn part_reader(&self) -> Result<PartReader<'_>> {
        Ok(PartReader {
            loader: Loader::new(self)?,
        })
    }

    /// Forgets what it has open and decoded: files may have been repaired, or be there again.
    pub fn refresh(&self) {
        self.shared.frames.clear();
    }

    pub(super) fn bytes_of(&self, block: usize, chunks: &Range<usize>) -> Range<u64> {
        let first = block as u64 * BLOCK_CHUNKS as u64;
        let at = |chunk: usize| ((first + chunk as u64) * self.chunk_bytes()).min(self.size());
        at(chunks.start)..at(chunks.end)
    }
}

/// The largest run of places around `here` in which each belongs `together` with the next; `here` does.
pub(super) fn extend(
    places: &[Place],
    here: usize,
    together: impl Fn(Place, Place) -> bool,
) -> Range<usize> {
    let mut run = here..here + 1;
    while run.start > 0 && together(places[run.start - 1], places[run.start]) {
        run.start -= 1;
    }
    while run.end < places.len() && together(places[run.end - 1], places[run.end]) {
        run.end += 1;
    }
    run
}

/// Reads parts or pieces of an image, and keeps nothing of them but what it decoded last.
pub struct PartReader<'r> {
    pub(super) loader: Loader<'r>,
}

impl PartReader<'_> {
    /// Reads what is not zero of a part, each frame once. `wanted` is asked of each run of bytes; `put` gets the offset and the
    /// bytes of those that are, verified, in no order.
    ///
    /// # Errors
    ///
    /// As [`ImageReader::read_at`]; what `put` fails with.
    pub fn read<E: From<Error>>(
        &mut self,
        part: u64,
        wanted: impl Fn(&Range<u64>) -> bool,
        mut put: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let image = self.loader.image();
        let at = image.part(part);
        if at.is_empty() {
            return Err(image.no_part(&at).into());
        }
        let block = part as usize;
        let config = &image.shared.config;
        let places = image.places(block)?;
        let mut chunks: Vec<(Place, usize)> = places.iter().copied().zip(0..).collect();
        chunks.retain(|(place, chunk)| {
            !place.is_zero() && wanted(&image.bytes_of(block, &(*chunk..chunk + 1)))
        });
        chunks.sort_unstable();
        let frame_of = |place: Place| {
            let at = place.get(config.pack_slots());
            at.map(|(pack, slot)| (pack, slot / config.frame_chunks()))
        };
        for of_frame in chunks.chunk_by(|(a, _), (b, _)| frame_of(*a) == frame_of(*b)) {
            let Some((pack, frame)) = frame_of(of_frame[0].0) else {
                continue;
            };
            self.loader.decode(pack, frame)?;
            let runs = of_frame.chunk_by(|(a, at), (b, next)| b.follows(*a) && *next == at + 1);
            for run in runs {
                let (place, chunk) = run[0];
                let slot = place.get(config.pack_slots()).map_or(0, |(_, slot)| slot);
                let from = (slot % config.frame_chunks()) as usize * config.chunk_size as usize;
                let at = image.bytes_of(block, &(chunk..chunk + run.len()));
                let to = from + (at.end - at.start) as usize;
                put(at.start, self.loader.bytes(from..to)?)?;
            }
        }
        Ok(())
    }
}
