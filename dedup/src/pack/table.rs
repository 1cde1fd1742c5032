//! A pack's table of frames and its column of identities.

use std::ops::Range;

use crate::bytes::Cursor;
use crate::config::Config;
use crate::error::Malformed;
use crate::frame;
use crate::hash::ChunkId;

/// Where the frames of a pack are, and which of their slots live.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) frames: Vec<FrameEntry>,
    /// A bitmap of slots for each frame, [`bitmap_bytes`] each.
    live: Vec<u8>,
    frame_chunks: u32,
}

/// One row of the table. A frame without slots is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FrameEntry {
    /// Offset in the file, in bytes.
    pub(crate) offset: u32,
    /// Bytes stored, with the frame's header.
    pub(crate) len: u32,
    /// Chunks in it, dead ones included.
    pub(crate) slots: u16,
    /// Live slots in the frames before.
    first_live: u32,
}

fn bitmap_bytes(frame_chunks: u32) -> usize {
    frame_chunks.div_ceil(8) as usize
}

impl Table {
    /// An empty table for this many frames.
    pub(crate) fn new(config: &Config, frames: usize) -> Self {
        let frame_chunks = config.frame_chunks();
        Table {
            frames: vec![FrameEntry::default(); frames],
            live: vec![0; frames * bitmap_bytes(frame_chunks)],
            frame_chunks,
        }
    }

    /// Bytes of a table of so many frames.
    pub(crate) fn encoded_len(config: &Config, frames: u64) -> u64 {
        frames * (10 + bitmap_bytes(config.frame_chunks()) as u64)
    }

    /// Fills in a frame; `live` tells for each of its slots whether it lives.
    pub(crate) fn set(
        &mut self,
        frame: usize,
        offset: u32,
        len: u32,
        live: impl ExactSizeIterator<Item = bool>,
    ) {
        self.frames[frame] = FrameEntry {
            offset,
            len,
            slots: live.len() as u16,
            first_live: 0,
        };
        let bitmap = &mut self.live[frame * bitmap_bytes(self.frame_chunks)..]
            [..bitmap_bytes(self.frame_chunks)];
        for (slot, live) in live.enumerate() {
            bitmap[slot / 8] |= u8::from(live) << (slot % 8);
        }
    }

    /// Leaves out the frames at the end that are not there.
    pub(crate) fn trim(&mut self) {
        let used = self
            .frames
            .iter()
            .rposition(|entry| entry.slots > 0)
            .map_or(0, |last| last + 1);
        self.frames.truncate(used);
        self.live.truncate(used * bitmap_bytes(self.frame_chunks));
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(
            self.frames
                .iter()
                .flat_map(|entry| entry.offset.to_le_bytes()),
        );
        out.extend(self.frames.iter().flat_map(|entry| entry.len.to_le_bytes()));
        out.extend(
            self.frames
                .iter()
                .flat_map(|entry| entry.slots.to_le_bytes()),
        );
        out.extend_from_slice(&self.live);
        out
    }

    /// Reads a table of `frames` frames that lie between `start` and `end` in the file.
    pub(crate) fn parse(
        bytes: &[u8],
        config: &Config,
        frames: usize,
        start: u64,
        end: u64,
    ) -> Result<Self, Malformed> {
        let mut table = Table::new(config, frames);
        let mut cursor = Cursor::new(bytes);
        for entry in &mut table.frames {
            entry.offset = cursor.u32()?;
        }
        for entry in &mut table.frames {
            entry.len = cursor.u32()?;
        }
        for entry in &mut table.frames {
            entry.slots = cursor.u16()?;
        }
        let live = cursor.take(table.live.len())?;
        table.live.copy_from_slice(live);
        cursor.end()?;
        table.check(config, start, end)?;
        Ok(table)
    }

    /// Checks every row against the others, and counts live slots.
    fn check(&mut self, config: &Config, start: u64, end: u64) -> Result<(), Malformed> {
        let mut live_before = 0;
        for frame in 0..self.frames.len() {
            let entry = self.frames[frame];
            let inside = u64::from(entry.offset) >= start
                && u64::from(entry.offset) + u64::from(entry.len) <= end;
            let longest = (frame::HEADER_BYTES + config.seal_overhead()) as u64
                + u64::from(entry.slots) * u64::from(config.chunk_size);
            let plausible = inside
                && u32::from(entry.slots) <= self.frame_chunks
                && (frame::HEADER_BYTES as u64..=longest).contains(&u64::from(entry.len));
            let absent = entry == FrameEntry::default();
            if !(absent || plausible && entry.slots > 0) {
                return Err(Malformed("the table has an impossible frame"));
            }
            self.frames[frame].first_live = live_before;
            for slot in 0..bitmap_bytes(self.frame_chunks) * 8 {
                if self.is_live(frame, slot) {
                    if slot >= usize::from(entry.slots) {
                        return Err(Malformed("the table has a live slot beyond its frame"));
                    }
                    live_before += 1;
                }
            }
        }
        Ok(())
    }

    /// Live slots in the whole pack.
    pub(crate) fn live_count(&self) -> u32 {
        self.live.iter().map(|byte| byte.count_ones()).sum()
    }

    /// Whether `slot` of `frame` lives.
    fn is_live(&self, frame: usize, slot: usize) -> bool {
        let bitmap = frame * bitmap_bytes(self.frame_chunks);
        self.live
            .get(bitmap + slot / 8)
            .is_some_and(|byte| byte >> (slot % 8) & 1 == 1)
    }

    /// Whether the pack's slot `slot` lives.
    pub(crate) fn has(&self, slot: u32) -> bool {
        let (frame, in_frame) = (slot / self.frame_chunks, slot % self.frame_chunks);
        (frame as usize) < self.frames.len() && self.is_live(frame as usize, in_frame as usize)
    }

    /// Which slots of a frame live.
    pub(crate) fn live_of(&self, frame: u32) -> Live {
        let bytes = bitmap_bytes(self.frame_chunks);
        let bitmap = self.live.get(frame as usize * bytes..).unwrap_or_default();
        Live(bitmap.get(..bytes).unwrap_or_default().into())
    }

    /// The place of a live slot's identity among all identities.
    fn rank(&self, slot: u32) -> Option<usize> {
        if !self.has(slot) {
            return None;
        }
        let (frame, in_frame) = (
            (slot / self.frame_chunks) as usize,
            (slot % self.frame_chunks) as usize,
        );
        let bitmap = &self.live[frame * bitmap_bytes(self.frame_chunks)..];
        let whole: u32 = bitmap[..in_frame / 8]
            .iter()
            .map(|byte| byte.count_ones())
            .sum();
        let part = (bitmap[in_frame / 8] & ((1 << (in_frame % 8)) - 1)).count_ones();
        Some((self.frames[frame].first_live + whole + part) as usize)
    }

    /// All live slots, ascending.
    pub(crate) fn live_slots(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.frames.len() as u32 * self.frame_chunks).filter(|&slot| self.has(slot))
    }
}

/// Which slots of a frame live. Only those have content: a dead one decodes to zeros.
#[derive(Clone, Debug, Default)]
pub(crate) struct Live(Box<[u8]>);

impl Live {
    /// Whether all of these do, by their number in the frame.
    pub(crate) fn has_all(&self, mut slots: Range<usize>) -> bool {
        let lives = |slot: usize| {
            let byte = self.0.get(slot / 8);
            byte.is_some_and(|byte| byte >> (slot % 8) & 1 == 1)
        };
        slots.all(lives)
    }

    /// Without those of which `lost` says so.
    pub(crate) fn without(mut self, lost: impl Fn(usize) -> bool) -> Self {
        for slot in 0..self.0.len() * 8 {
            if self.has_all(slot..slot + 1) && lost(slot) {
                self.0[slot / 8] &= !(1 << (slot % 8));
            }
        }
        self
    }
}

/// The identities of a pack's live slots.
#[derive(Debug)]
pub(crate) struct ChunkIds {
    table: std::sync::Arc<Table>,
    ids: Vec<ChunkId>,
}

impl ChunkIds {
    /// Reads the column. Its length must fit the table.
    pub(crate) fn parse(bytes: &[u8], table: std::sync::Arc<Table>) -> Result<Self, Malformed> {
        let (ids, rest) = bytes.as_chunks::<{ ChunkId::BYTES }>();
        if ids.len() != table.live_count() as usize || !rest.is_empty() {
            return Err(Malformed("the number of identities is wrong"));
        }
        Ok(ChunkIds {
            table,
            ids: ids.iter().copied().map(ChunkId).collect(),
        })
    }

    /// The identity of a slot, if it lives.
    pub(crate) fn get(&self, slot: u32) -> Option<ChunkId> {
        self.table
            .rank(slot)
            .and_then(|rank| self.ids.get(rank))
            .copied()
    }

    /// Live slots and their identities, ascending by slot.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, ChunkId)> + '_ {
        self.table.live_slots().zip(self.ids.iter().copied())
    }

    /// Bytes of memory it takes.
    pub(crate) fn memory(&self) -> u64 {
        let table = size_of_val(&*self.table.frames) + self.table.live.len();
        (self.ids.len() * ChunkId::BYTES + table) as u64
    }
}
