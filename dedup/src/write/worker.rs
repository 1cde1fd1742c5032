//! What one thread of a save does: blocks in, recipes out, new chunks into frames.

use std::ops::Range;
use std::sync::Arc;

use super::session::{BlockAt, Run, Session};
use crate::error::Result;
use crate::frame::Encoder;
use crate::hash::{ChunkId, is_zero};
use crate::index::{BucketBuffer, EMPTY_BUCKET, Hint, View};
use crate::pack::ChunkIds;
use crate::recipe::{BLOCK_CHUNKS, BlockCoder, Place};

/// Chunks that are looked at together: enough to fill BLAKE3's lanes, few enough to stay in the cache.
const GROUP: usize = 64;

/// One thread's share of a save. Outlives the calls, because its last frame is filled by later ones.
pub(super) struct Worker {
    encoder: Encoder,
    pub(super) coder: BlockCoder,
    run: Option<Run>,
    frame: Frame,
    /// The last pack that was looked at.
    looked_at: Option<(u32, Arc<ChunkIds>)>,
    /// The slot after the last hit: images repeat in the order in which they were stored.
    expected: Option<(u32, u32)>,
    bucket: Box<BucketBuffer>,
    hints: Vec<Hint>,
    /// Room for a block that is read from a file.
    pub(super) buffer: Vec<u8>,
}

/// A frame that is being filled.
#[derive(Default)]
struct Frame {
    number: u32,
    ids: Vec<Option<ChunkId>>,
    plain: Vec<u8>,
}

/// What became of a block.
pub(super) struct EncodedBlock {
    pub(super) stored: Vec<u8>,
    /// Numbers of the packs it refers to.
    pub(super) packs: Vec<u32>,
    pub(super) zero_chunks: u64,
    pub(super) new_chunks: u64,
}

/// A block to encode.
pub(super) struct Block<'a> {
    pub(super) at: BlockAt,
    /// At most [`BLOCK_CHUNKS`] chunks; the last may be short.
    pub(super) bytes: &'a [u8],
    /// Chunks that are as in the parent, if any are.
    pub(super) kept: Option<&'a [bool]>,
    /// Where the parent has its chunks: a guess for those that are not kept.
    pub(super) parent: Option<&'a [Place]>,
}

impl Worker {
    pub(super) fn new() -> Result<Self> {
        Ok(Worker {
            encoder: Encoder::new()?,
            coder: BlockCoder::new()?,
            run: None,
            frame: Frame::default(),
            looked_at: None,
            expected: None,
            bucket: Box::new(EMPTY_BUCKET),
            hints: Vec::new(),
            buffer: Vec::new(),
        })
    }

    /// Finds or stores the chunks of a block.
    pub(super) fn encode(&mut self, session: &Session, block: &Block<'_>) -> Result<EncodedBlock> {
        let chunk_size = session.shared.config.chunk_size as usize;
        let count = block.bytes.len().div_ceil(chunk_size);
        debug_assert!(count <= BLOCK_CHUNKS);
        // The last chunk of an image is filled up with zeros.
        let (whole, short) = block
            .bytes
            .split_at(block.bytes.len() / chunk_size * chunk_size);
        let mut filled_up = short.to_vec();
        filled_up.resize(if short.is_empty() { 0 } else { chunk_size }, 0);
        let chunk = |number: usize| {
            whole
                .chunks_exact(chunk_size)
                .nth(number)
                .unwrap_or(&filled_up)
        };
        let kept = |number: usize| block.kept.is_some_and(|kept| kept[number]);

        let mut places = vec![Place::ZERO; count];
        let (mut positions, mut chunks, mut ids) = (Vec::new(), Vec::new(), Vec::new());
        let mut new_chunks = 0;
        let view = session.shared.index.view();
        let identifier = session.shared.identifier()?;
        for group in (0..count).step_by(GROUP) {
            positions.clear();
            chunks.clear();
            ids.clear();
            for number in group..(group + GROUP).min(count) {
                if kept(number) {
                    places[number] = block.parent.map_or(Place::ZERO, |parent| parent[number]);
                } else if !is_zero(chunk(number)) {
                    positions.push(number);
                    chunks.push(chunk(number));
                }
            }
            identifier.identify_all(&chunks, &mut ids);
            for ((&number, &chunk), &id) in positions.iter().zip(&chunks).zip(&ids) {
                let guess = block.parent.and_then(|parent| parent.get(number).copied());
                let (place, new) = self.place(session, &view, id, chunk, guess)?;
                places[number] = place;
                new_chunks += u64::from(new);
            }
        }
        Ok(EncodedBlock {
            packs: packs_of(&places, session.shared.config.pack_slots()),
            zero_chunks: places.iter().filter(|place| place.is_zero()).count() as u64,
            new_chunks,
            stored: session.seal_block(block.at, self.coder.encode(&places)?)?,
        })
    }

    /// Where a chunk is: where it is expected, or known to be, or where it is put now; and whether it was that.
    fn place(
        &mut self,
        session: &Session,
        view: &View,
        id: ChunkId,
        chunk: &[u8],
        guess: Option<Place>,
    ) -> Result<(Place, bool)> {
        let guess = guess.and_then(|place| place.get(session.shared.config.pack_slots()));
        for (pack, slot) in [guess, self.expected].into_iter().flatten() {
            if self.holds(session, pack, slot, &id) {
                return Ok((self.hit(session, pack, slot), false));
            }
        }
        if let Some(place) = session.known.get(&id) {
            return Ok((place, false));
        }
        view.find(&id, &mut self.bucket, &mut self.hints);
        for Hint { pack, slot } in std::mem::take(&mut self.hints) {
            if let Some(pack) = session.number_of(pack)?
                && self.holds(session, pack, slot, &id)
            {
                return Ok((self.hit(session, pack, slot), false));
            }
        }
        self.store(session, id, chunk)
    }

    fn hit(&mut self, session: &Session, pack: u32, slot: u32) -> Place {
        self.expected = Some((pack, slot + 1));
        session.place(pack, slot)
    }

    /// Whether a slot holds this chunk.
    fn holds(&mut self, session: &Session, pack: u32, slot: u32, id: &ChunkId) -> bool {
        if self
            .looked_at
            .as_ref()
            .is_none_or(|(number, _)| *number != pack)
        {
            let Some(ids) = session.ids(pack) else {
                return false;
            };
            self.looked_at = Some((pack, ids));
        }
        self.looked_at
            .as_ref()
            .is_some_and(|(_, ids)| ids.get(slot).as_ref() == Some(id))
    }

    /// Puts a chunk into the frame, unless another thread has stored it meanwhile.
    fn store(&mut self, session: &Session, id: ChunkId, chunk: &[u8]) -> Result<(Place, bool)> {
        let (pack, frame_chunks) = (self.reserve(session)?, session.shared.config.frame_chunks());
        let slot = self.frame.number * frame_chunks + self.frame.ids.len() as u32;
        let place = session.place(pack, slot);
        let (place, new) = session.known.get_or_insert(id, || place);
        if new {
            self.frame.ids.push(Some(id));
            self.frame.plain.extend_from_slice(chunk);
            if self.frame.ids.len() == frame_chunks as usize {
                self.flush(session)?;
            }
        }
        Ok((place, new))
    }

    /// Sees to it that there is a frame to fill; gives the number of its pack.
    fn reserve(&mut self, session: &Session) -> Result<u32> {
        if self.frame.ids.is_empty() && self.run.as_ref().is_none_or(|run| run.frames.is_empty()) {
            self.run = Some(session.reserve()?);
        }
        let Some(run) = &mut self.run else {
            unreachable!("reserved above")
        };
        if self.frame.ids.is_empty() {
            self.frame.number = run.frames.start;
        }
        Ok(run.pack())
    }

    /// Stores the frame, full or not.
    pub(super) fn flush(&mut self, session: &Session) -> Result<()> {
        if let Some(run) = &mut self.run
            && !self.frame.ids.is_empty()
        {
            let Frame { number, ids, plain } = &self.frame;
            let stored = self
                .encoder
                .encode(*number, ids.len() as u16, plain, run.sealer())?;
            session.append(run, *number, stored, ids)?;
            run.frames = Range {
                start: number + 1,
                end: run.frames.end,
            };
            self.frame.ids.clear();
            self.frame.plain.clear();
        }
        Ok(())
    }
}

/// The packs that places are in, each once.
pub(super) fn packs_of(places: &[Place], pack_slots: u32) -> Vec<u32> {
    let mut packs: Vec<u32> = Vec::new();
    for (pack, _) in places.iter().filter_map(|place| place.get(pack_slots)) {
        if packs.last() != Some(&pack) {
            packs.push(pack);
        }
    }
    packs.sort_unstable();
    packs.dedup();
    packs
}
