//! Writing a pack.

use std::sync::Arc;

use super::{END_MAGIC, TRAILER_COVERED, Table, header, ids_context};
use crate::backend::{Area, Draft, Publish};
use crate::error::{Error, Result};
use crate::frame::Encoded;
use crate::hash::{ChunkId, digest};
use crate::name::FileId;
use crate::seal::Sealer;
use crate::store::Shared;

/// A pack in work. Nobody sees it until [`PackBuilder::publish`].
pub(crate) struct PackBuilder {
    id: FileId,
    header: Vec<u8>,
    draft: Box<dyn Draft>,
    /// Bytes written.
    len: u64,
    frames_written: u32,
    table: Table,
    /// The identity of each slot that lives.
    ids: Vec<Option<ChunkId>>,
    frame_chunks: usize,
    sealer: Option<Arc<Sealer>>,
}

impl PackBuilder {
    /// Begins the pack `id`.
    ///
    /// # Errors
    ///
    /// [`Error::Key`]; the store cannot be written.
    pub(crate) fn new(shared: &Shared, id: FileId) -> Result<Self> {
        let config = &shared.config;
        let sealer = shared.keys.get()?.map(|keys| Arc::new(keys.pack(id)));
        let header = header(id, config).to_vec();
        let mut draft = shared.backend.draft().map_err(Error::io("begin a pack"))?;
        draft.append(&header).map_err(Error::io("write a pack"))?;
        let frames = config.pack_frames();
        Ok(PackBuilder {
            id,
            len: header.len() as u64,
            header,
            draft,
            frames_written: 0,
            table: Table::new(config, frames as usize),
            ids: vec![None; config.pack_slots() as usize],
            frame_chunks: config.frame_chunks() as usize,
            sealer,
        })
    }

    /// What seals its frames, in an encrypted store.
    pub(crate) fn sealer(&self) -> Option<Arc<Sealer>> {
        self.sealer.clone()
    }

    /// Frames appended so far.
    pub(crate) fn frames_written(&self) -> u32 {
        self.frames_written
    }

    /// Appends an encoded frame. `ids` has an entry for each of its slots, none for dead ones.
    pub(crate) fn append(
        &mut self,
        number: u32,
        stored: &[u8],
        ids: &[Option<ChunkId>],
    ) -> Result<()> {
        self.write(stored)?;
        self.note(number, stored.len(), ids);
        Ok(())
    }

    /// Appends frames that were gathered, in one piece.
    pub(crate) fn append_batch(&mut self, batch: &Batch) -> Result<()> {
        self.write(&batch.bytes)?;
        for frame in &batch.frames {
            self.note(frame.number, frame.len, &frame.ids);
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.draft.append(bytes).map_err(Error::io("write a pack"))
    }

    /// Notes a frame that was written behind those noted before.
    fn note(&mut self, number: u32, len: usize, ids: &[Option<ChunkId>]) {
        // A pack holds 64 MiB of chunks, and no frame is stored larger than raw: 32 bits are plenty.
        self.table.set(
            number as usize,
            self.len as u32,
            len as u32,
            ids.iter().map(Option::is_some),
        );
        self.ids[number as usize * self.frame_chunks..][..ids.len()].copy_from_slice(ids);
        self.len += len as u64;
        self.frames_written += 1;
    }

    /// Completes the file, makes its bytes durable and gives it its name (which is durable only after
    /// the area is synced). Gives its size and the live slots with their identities.
    pub(crate) fn publish(mut self, how: Publish) -> Result<Published> {
        self.table.trim();
        let table = self.table.encode();
        let ids: Vec<u8> = self.ids.iter().flatten().flat_map(|id| id.0).collect();
        let live = (ids.len() / ChunkId::BYTES) as u32;
        let ids = match &self.sealer {
            Some(sealer) => sealer.seal(&ids_context(&self.header, &table), &ids)?,
            None => ids,
        };
        let mut trailer = Vec::new();
        trailer.extend_from_slice(END_MAGIC);
        trailer.extend_from_slice(&self.len.to_le_bytes());
        trailer.extend_from_slice(&(self.table.frames.len() as u32).to_le_bytes());
        trailer.extend_from_slice(&live.to_le_bytes());
        trailer.extend_from_slice(&digest(&[&ids]));
        debug_assert_eq!(trailer.len(), TRAILER_COVERED);
        trailer.extend_from_slice(&digest(&[&self.header, &table, &trailer]));
        let tail = [table, ids, trailer].concat();
        let size = self.len + tail.len() as u64;
        let failed = || Error::io(format!("write {}", Area::Packs.path(&self.id.to_string())));
        self.draft.append(&tail).map_err(failed())?;
        self.draft.sync().map_err(failed())?;
        self.draft
            .publish(Area::Packs, &self.id.to_string(), how)
            .map_err(failed())?;
        let slots = self
            .ids
            .iter()
            .enumerate()
            .filter_map(|(slot, id)| id.map(|id| (slot as u32, id)))
            .collect();
        Ok(Published {
            id: self.id,
            size,
            slots,
        })
    }
}

/// Encoded frames that go into the same pack one behind the other.
#[derive(Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    frames: Vec<BatchFrame>,
}

struct BatchFrame {
    number: u32,
    /// Bytes as stored.
    len: usize,
    /// The identity of each slot.
    ids: Vec<Option<ChunkId>>,
}

impl Batch {
    /// Adds a frame.
    pub(crate) fn push(&mut self, number: u32, encoded: &Encoded<'_>, ids: Vec<Option<ChunkId>>) {
        encoded.append_to(&mut self.bytes);
        self.frames.push(BatchFrame {
            number,
            len: encoded.len(),
            ids,
        });
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Takes all frames out, and keeps the room.
    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.frames.clear();
    }
}

/// What became of a pack in work.
pub(crate) struct Published {
    pub(crate) id: FileId,
    /// Bytes of the file.
    pub(crate) size: u64,
    /// Live slots and their identities.
    pub(crate) slots: Vec<(u32, ChunkId)>,
}
