//! What one thread of a save does: blocks in, recipes out, new chunks into frames.

use std::ops::Range;
use std::sync::Arc;

use super::session::{BlockAt, Run, Session};
use crate::aligned::Aligned;
use crate::error::Result;
use crate::frame::Encoder;
use crate::hash::{ChunkId, is_zero};
use crate::index::{BucketBuffer, EMPTY_BUCKET, Hint, View};
use crate::pack::{Batch, ChunkIds};
use crate::recipe::{BLOCK_CHUNKS, BlockCoder, Place};

/// Bytes that are read, hashed and looked up together: enough to fill BLAKE3's lanes, few enough to stay in the
/// core's own cache from the one to the other.
const GROUP_BYTES: usize = 256 << 10;

/// One thread's share of a save. Outlives the calls, because its last frame is filled by later ones.
pub(super) struct Worker {
    encoder: Encoder,
    pub(super) coder: BlockCoder,
    run: Option<Run>,
    frame: Frame,
    /// Frames of the run, which are written together: threads wait for each other once for all of them.
    batch: Batch,
    /// The last pack that was looked at.
    looked_at: Option<(u32, Arc<ChunkIds>)>,
    /// The slot after the last hit: images repeat in the order in which they were stored.
    expected: Option<(u32, u32)>,
    bucket: Box<BucketBuffer>,
    hints: Vec<Hint>,
    /// Room for what is read from a file.
    buffer: Aligned,
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

/// Reads bytes from an offset on, for any thread.
pub(super) type Read<'a> = dyn Fn(u64, &mut [u8]) -> Result<()> + Sync + 'a;

/// Where a block's bytes come from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    Bytes(&'a [u8]),
    /// Bytes that are read by the thread that is about to hash them.
    Read {
        read: &'a Read<'a>,
        /// The parts that are not holes, ascending.
        extents: &'a [Range<u64>],
        at: u64,
        len: usize,
    },
}

impl<'a> Source<'a> {
    pub(super) fn len(&self) -> usize {
        match self {
            Source::Bytes(bytes) => bytes.len(),
            Source::Read { len, .. } => *len,
        }
    }

    /// Some of the bytes, in `buffer` if they have to be read; `None` in a hole.
    fn read<'b>(&self, at: usize, len: usize, buffer: &'b mut Aligned) -> Result<Option<&'b [u8]>>
    where
        'a: 'b,
    {
        match *self {
            Source::Bytes(bytes) => Ok(Some(&bytes[at..at + len])),
            Source::Read {
                read,
                extents,
                at: start,
                ..
            } => {
                let (from, to) = (start + at as u64, start + (at + len) as u64);
                let next = extents.partition_point(|extent| extent.end <= from);
                if extents.get(next).is_none_or(|extent| extent.start >= to) {
                    return Ok(None);
                }
                let bytes = buffer.first(len);
                read(from, bytes)?;
                Ok(Some(bytes))
            }
        }
    }
}

/// What is known so far of a block that is being encoded.
struct BlockWork {
    places: Vec<Place>,
    new_chunks: u64,
}

/// A block to encode.
pub(super) struct Block<'a> {
    pub(super) at: BlockAt,
    /// At most [`BLOCK_CHUNKS`] chunks; the last may be short.
    pub(super) source: Source<'a>,
    /// Chunks that are as in the parent, if any are.
    pub(super) kept: Option<&'a [bool]>,
    /// Where the parent has its chunks: a guess for those that are not kept.
    pub(super) parent: Option<&'a [Place]>,
}

impl Worker {
    pub(super) fn new(level: i32) -> Result<Self> {
        Ok(Worker {
            encoder: Encoder::new(level)?,
            coder: BlockCoder::new()?,
            run: None,
            frame: Frame::default(),
            batch: Batch::default(),
            looked_at: None,
            expected: None,
            bucket: Box::new(EMPTY_BUCKET),
            hints: Vec::new(),
            buffer: Aligned::default(),
        })
    }

    /// Finds or stores the chunks of a block.
    pub(super) fn encode(&mut self, session: &Session, block: &Block<'_>) -> Result<EncodedBlock> {
        let chunk_size = session.shared.config.chunk_size as usize;
        let group_bytes = GROUP_BYTES.max(chunk_size);
        let count = block.source.len().div_ceil(chunk_size);
        debug_assert!(count <= BLOCK_CHUNKS);
        let mut work = BlockWork {
            places: vec![Place::ZERO; count],
            new_chunks: 0,
        };
        let mut buffer = std::mem::take(&mut self.buffer);
        for at in (0..block.source.len()).step_by(group_bytes) {
            let len = group_bytes.min(block.source.len() - at);
            let Some(bytes) = block.source.read(at, len, &mut buffer)? else {
                continue;
            };
            let (whole, short) = bytes.split_at(len / chunk_size * chunk_size);
            let first = at / chunk_size;
            self.encode_group(session, block, first, whole, &mut work)?;
            if !short.is_empty() {
                // The last chunk of an image is filled up with zeros.
                let mut filled_up = short.to_vec();
                filled_up.resize(chunk_size, 0);
                let last = first + whole.len() / chunk_size;
                self.encode_group(session, block, last, &filled_up, &mut work)?;
            }
        }
        self.buffer = buffer;
        let BlockWork { places, new_chunks } = work;
        Ok(EncodedBlock {
            packs: packs_of(&places, session.shared.config.pack_slots()),
            zero_chunks: places.iter().filter(|place| place.is_zero()).count() as u64,
            new_chunks,
            stored: session.seal_block(block.at, self.coder.encode(&places)?)?,
        })
    }

    /// Finds or stores some chunks of a block, the first of which is the block's chunk `first`.
    fn encode_group(
        &mut self,
        session: &Session,
        block: &Block<'_>,
        first: usize,
        bytes: &[u8],
        work: &mut BlockWork,
    ) -> Result<()> {
        let chunk_size = session.shared.config.chunk_size as usize;
        let (mut numbers, mut chunks, mut ids) = (Vec::new(), Vec::new(), Vec::new());
        for (number, chunk) in (first..).zip(bytes.chunks_exact(chunk_size)) {
            if block.kept.is_some_and(|kept| kept[number]) {
                work.places[number] = block.parent.map_or(Place::ZERO, |parent| parent[number]);
            } else if !is_zero(chunk) {
                numbers.push(number);
                chunks.push(chunk);
            }
        }
        session.shared.identifier()?.identify_all(&chunks, &mut ids);
        let view = session.shared.index.view();
        for ((&number, &chunk), &id) in numbers.iter().zip(&chunks).zip(&ids) {
            let guess = block.parent.and_then(|parent| parent.get(number).copied());
            let (place, new) = self.place(session, &view, id, chunk, guess)?;
            work.places[number] = place;
            work.new_chunks += u64::from(new);
        }
        Ok(())
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
                self.close_frame(session)?;
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

    /// Stores what there is, full or not.
    pub(super) fn flush(&mut self, session: &Session) -> Result<()> {
        self.close_frame(session)?;
        self.write_batch(session)
    }

    /// Encodes the frame, full or not. The last of a run has all of the run written.
    fn close_frame(&mut self, session: &Session) -> Result<()> {
        if let Some(run) = &mut self.run
            && !self.frame.ids.is_empty()
        {
            let Frame { number, ids, plain } = &mut self.frame;
            let encoded = self
                .encoder
                .encode(*number, ids.len() as u16, plain, run.sealer())?;
            self.batch.push(*number, &encoded, std::mem::take(ids));
            plain.clear();
            run.frames = Range {
                start: *number + 1,
                end: run.frames.end,
            };
            if run.frames.is_empty() {
                self.write_batch(session)?;
            }
        }
        Ok(())
    }

    fn write_batch(&mut self, session: &Session) -> Result<()> {
        if let Some(run) = &self.run
            && !self.batch.is_empty()
        {
            session.append(run, &self.batch)?;
            self.batch.clear();
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
