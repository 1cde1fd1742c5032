//! Open packs and decoded frames, shared by all readers of a store.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::config::Config;
use crate::error::Result;
use crate::frame::Decoder;
use crate::hash::is_zero;
use crate::name::FileId;
use crate::pack::{Live, Pack};
use crate::recipe::BlockCoder;
use crate::store::Shared;

/// Packs that are kept open; each takes a file descriptor and 70 KiB.
const OPEN_PACKS: usize = 256;

/// Caches for reading.
pub(crate) struct Frames {
    packs: Cache<FileId, Arc<Pack>>,
    frames: Cache<(FileId, u32), Arc<Frame>, ByBytes>,
    decoders: Mutex<Vec<FrameReader>>,
    /// To set one up takes as long as to decode many blocks.
    coders: Mutex<Vec<BlockCoder>>,
}

#[derive(Clone)]
struct ByBytes;

impl Weighter<(FileId, u32), Arc<Frame>> for ByBytes {
    fn weight(&self, _frame: &(FileId, u32), frame: &Arc<Frame>) -> u64 {
        frame.plain.len().max(1) as u64
    }
}

/// A decoded frame.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) plain: Vec<u8>,
    /// What it has, as it was when it was read: a collection or a repair may have written the pack anew since.
    live: Live,
}

impl Frame {
    /// `bytes` of the frame; `None` unless all chunks that they are in are there.
    pub(super) fn get(&self, config: &Config, bytes: &Range<usize>) -> Option<&[u8]> {
        let live = self.live.has_all(slots_of(config, bytes));
        live.then(|| self.plain.get(bytes.clone())).flatten()
    }
}

/// The slots that `bytes` of a frame are in, by their number in it.
pub(super) fn slots_of(config: &Config, bytes: &Range<usize>) -> Range<usize> {
    let chunk_size = config.chunk_size as usize;
    bytes.start / chunk_size..bytes.end.div_ceil(chunk_size)
}

/// What it takes to decode a frame.
pub(super) struct FrameReader {
    pub(super) decoder: Decoder,
    pub(super) stored: Vec<u8>,
}

impl FrameReader {
    pub(super) fn new() -> Result<Self> {
        Ok(FrameReader {
            decoder: Decoder::new()?,
            stored: Vec::new(),
        })
    }
}

impl Frames {
    /// Caches that hold up to `memory` bytes of decoded frames.
    pub(crate) fn new(memory: u64) -> Self {
        let estimated_frames = (memory >> 14).max(1) as usize;
        Frames {
            packs: Cache::new(OPEN_PACKS),
            frames: Cache::with_weighter(estimated_frames, memory, ByBytes),
            decoders: Mutex::default(),
            coders: Mutex::default(),
        }
    }

    /// An open pack. It may have been replaced since by one without its dead chunks: to read what lives, either
    /// will do.
    pub(crate) fn pack(&self, shared: &Shared, id: FileId) -> Result<Arc<Pack>> {
        self.packs
            .get_or_insert_with(&id, || Pack::open(shared, id).map(Arc::new))
    }

    /// Something to decode blocks with, to be returned.
    pub(super) fn take_coder(&self) -> Result<BlockCoder> {
        let mut idle = self.coders.lock().unwrap_or_else(PoisonError::into_inner);
        let coder = idle.pop();
        drop(idle);
        coder.map_or_else(BlockCoder::new, Ok)
    }

    pub(super) fn return_coder(&self, coder: BlockCoder) {
        self.coders
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(coder);
    }

    /// Forgets what was read, because files were repaired.
    pub(crate) fn clear(&self) {
        self.packs.clear();
        self.frames.clear();
    }

    /// A decoded frame. Threads that want the same one wait for the first.
    pub(super) fn get(&self, shared: &Shared, pack: FileId, frame: u32) -> Result<Arc<Frame>> {
        self.frames.get_or_insert_with(&(pack, frame), || {
            let pack = self.pack(shared, pack)?;
            let idle = self
                .decoders
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop();
            let mut reader = idle.map_or_else(FrameReader::new, Ok)?;
            let mut plain = vec![0; pack.frame_bytes()];
            let len =
                pack.read_frame(frame, &mut reader.decoder, &mut reader.stored, &mut plain)?;
            plain.truncate(len);
            self.decoders
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(reader);
            let live = pack.table().live_of(frame);
            let chunks = plain.chunks(shared.config.chunk_size as usize);
            let live = live.without(|slot| chunks.clone().nth(slot).is_none_or(is_zero));
            Ok(Arc::new(Frame { plain, live }))
        })
    }
}
