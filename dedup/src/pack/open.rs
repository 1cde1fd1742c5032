//! Reading a pack.

use std::sync::Arc;

use super::{
    ChunkIds, END_MAGIC, HEADER_BYTES, TRAILER_BYTES, TRAILER_COVERED, Table, header, ids_context,
    table::FrameEntry,
};
use crate::backend::{Area, ReadAt};
use crate::bytes::Cursor;
use crate::config::Config;
use crate::error::{Error, Malformed, Result};
use crate::frame::{self, Decoder};
use crate::hash::{ChunkId, digest};
use crate::name::FileId;
use crate::seal::{Access, Sealer};
use crate::store::Shared;

/// An open pack. It stays what it was when it was opened, whatever becomes of the file's name.
pub(crate) struct Pack {
    id: FileId,
    file: Arc<dyn ReadAt>,
    table: Arc<Table>,
    table_at: u64,
    ids_at: u64,
    trailer_at: u64,
    ids_digest: [u8; 16],
    version: [u8; 16],
    chunk_size: u32,
    frame_chunks: u32,
    sealing: Access<Sealing>,
}

/// How an encrypted pack is sealed.
struct Sealing {
    sealer: Sealer,
    ids_context: Vec<u8>,
}

impl Pack {
    /// Opens a pack and checks its header, table and trailer. That takes no key.
    pub(crate) fn open(shared: &Shared, id: FileId) -> Result<Self> {
        let config = &shared.config;
        let name = id.to_string();
        let failed = || Error::file(format!("read {}", Area::Packs.path(&name)));
        let file = shared.backend.open(Area::Packs, &name).map_err(failed())?;
        let damaged = |malformed: Malformed| malformed.in_file(Area::Packs.path(&name));
        let size = file.size();
        let trailer_at = size
            .checked_sub(TRAILER_BYTES as u64)
            .filter(|&at| at >= HEADER_BYTES as u64)
            .ok_or_else(|| damaged(Malformed("too short")))?;
        let mut trailer = [0; TRAILER_BYTES];
        file.read_exact_at(&mut trailer, trailer_at)
            .map_err(failed())?;

        let layout = Layout::parse(&trailer, config, trailer_at).map_err(damaged)?;
        let mut table = vec![0; (layout.ids_at - layout.table_at) as usize];
        file.read_exact_at(&mut table, layout.table_at)
            .map_err(failed())?;
        let mut found_header = [0; HEADER_BYTES];
        file.read_exact_at(&mut found_header, 0).map_err(failed())?;
        if found_header != header(id, config) {
            return Err(damaged(Malformed("the header is of another store or pack")));
        }
        let (covered, expected) = trailer.split_at(TRAILER_COVERED);
        let mut version = [0; 16];
        version.copy_from_slice(expected);
        if digest(&[&found_header, &table, covered]) != version {
            return Err(damaged(Malformed("the table's digest does not match")));
        }
        let sealing = shared.keys.map(|keys| Sealing {
            sealer: keys.pack(id),
            ids_context: ids_context(&found_header, &table),
        });
        let table = Table::parse(
            &table,
            config,
            layout.frames,
            HEADER_BYTES as u64,
            layout.table_at,
        )
        .map_err(damaged)?;
        if table.live_count() != layout.live {
            return Err(damaged(Malformed("the number of live slots is wrong")));
        }
        Ok(Pack {
            id,
            file,
            table: Arc::new(table),
            table_at: layout.table_at,
            ids_at: layout.ids_at,
            trailer_at,
            ids_digest: layout.ids_digest,
            version,
            chunk_size: config.chunk_size,
            frame_chunks: config.frame_chunks(),
            sealing,
        })
    }

    /// The version that a pack has now, of which nothing is checked.
    pub(crate) fn version_now(shared: &Shared, id: FileId) -> Result<[u8; 16]> {
        let name = id.to_string();
        let failed = || Error::file(format!("read {}", Area::Packs.path(&name)));
        let file = shared.backend.open(Area::Packs, &name).map_err(failed())?;
        let mut version = [0; 16];
        let at = file.size().saturating_sub(version.len() as u64);
        file.read_exact_at(&mut version, at).map_err(failed())?;
        Ok(version)
    }

    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    pub(crate) fn id(&self) -> FileId {
        self.id
    }

    /// What tells this content from others that the pack has had: a digest of all but the frames.
    pub(crate) fn version(&self) -> [u8; 16] {
        self.version
    }

    /// Reads the identities of the live slots.
    pub(crate) fn ids(&self) -> Result<ChunkIds> {
        let sealing = self.sealing.get()?;
        let mut bytes = self.stored_ids()?;
        let damaged = |malformed| self.damaged(malformed);
        if let Some(sealing) = sealing {
            let mut opened = Vec::new();
            sealing
                .sealer
                .open(&sealing.ids_context, &bytes, &mut opened)
                .map_err(damaged)?;
            bytes = opened;
        }
        ChunkIds::parse(&bytes, self.table.clone()).map_err(damaged)
    }

    /// Reads the column of identities as it is stored, and checks its digest.
    pub(crate) fn stored_ids(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; (self.trailer_at - self.ids_at) as usize];
        self.file
            .read_exact_at(&mut bytes, self.ids_at)
            .map_err(self.failed())?;
        if digest(&[&bytes]) != self.ids_digest {
            return Err(self.damaged(Malformed("the digest of the identities does not match")));
        }
        Ok(bytes)
    }

    pub(crate) fn damaged(&self, malformed: Malformed) -> Error {
        malformed.in_file(Area::Packs.path(&self.id.to_string()))
    }

    fn failed(&self) -> impl FnOnce(std::io::Error) -> Error {
        Error::file(format!("read {}", Area::Packs.path(&self.id.to_string())))
    }

    /// Decodes the frame `number` to the beginning of `plain`; gives the number of bytes. `stored` is a buffer.
    pub(crate) fn read_frame(
        &self,
        number: u32,
        decoder: &mut Decoder,
        stored: &mut Vec<u8>,
        plain: &mut [u8],
    ) -> Result<usize> {
        let sealer = self.sealing.get()?.map(|sealing| &sealing.sealer);
        let entry = self.read_stored(number, stored)?;
        let header = decoder
            .decode(stored, self.chunk_size, sealer, plain)
            .map_err(|malformed| self.damaged(malformed))?;
        self.check_header(&header, number, entry)?;
        Ok(usize::from(header.slots) * self.chunk_size as usize)
    }

    /// Checks the digest and the header of the frame `number`, which takes no key. `stored` is a buffer.
    pub(crate) fn check_frame(&self, number: u32, stored: &mut Vec<u8>) -> Result<()> {
        let entry = self.read_stored(number, stored)?;
        let header = frame::check(stored).map_err(|malformed| self.damaged(malformed))?;
        self.check_header(&header, number, entry)
    }

    /// Reads a frame as it is stored; gives its row of the table.
    fn read_stored(&self, number: u32, stored: &mut Vec<u8>) -> Result<FrameEntry> {
        let entry = self
            .table
            .frames
            .get(number as usize)
            .filter(|entry| entry.slots > 0);
        let entry = entry
            .ok_or_else(|| self.damaged(Malformed("a frame that is referred to is not there")))?;
        stored.resize(entry.len as usize, 0);
        self.file
            .read_exact_at(stored, u64::from(entry.offset))
            .map_err(self.failed())?;
        Ok(*entry)
    }

    fn check_header(&self, header: &frame::Header, number: u32, entry: FrameEntry) -> Result<()> {
        if header.number == number && header.slots == entry.slots {
            Ok(())
        } else {
            Err(self.damaged(Malformed("a frame is not the one its table says")))
        }
    }

    /// Bytes of a full frame's chunks.
    pub(crate) fn frame_bytes(&self) -> usize {
        self.frame_chunks as usize * self.chunk_size as usize
    }

    /// Checks that the frames follow each other without gaps, from the header to the table.
    pub(crate) fn check_gapless(&self) -> Result<()> {
        let mut spans: Vec<(u32, u32)> = self
            .table
            .frames
            .iter()
            .filter(|entry| entry.slots > 0)
            .map(|entry| (entry.offset, entry.len))
            .collect();
        spans.sort_unstable();
        let end = spans
            .iter()
            .try_fold(HEADER_BYTES as u64, |at, &(offset, len)| {
                (at == u64::from(offset)).then(|| at + u64::from(len))
            });
        if end == Some(self.table_at) {
            Ok(())
        } else {
            Err(self.damaged(Malformed("there are bytes in no frame")))
        }
    }
}

/// What the trailer says.
struct Layout {
    table_at: u64,
    ids_at: u64,
    frames: usize,
    live: u32,
    ids_digest: [u8; 16],
}

impl Layout {
    /// Reads the trailer. All sizes are checked against the file's before anything is allocated.
    fn parse(trailer: &[u8], config: &Config, trailer_at: u64) -> Result<Self, Malformed> {
        let mut cursor = Cursor::new(trailer);
        cursor.expect(END_MAGIC, "the end is missing")?;
        let (table_at, frames, live, ids_digest) =
            (cursor.u64()?, cursor.u32()?, cursor.u32()?, cursor.array()?);
        if frames > config.pack_frames() || live > config.pack_slots() {
            return Err(Malformed("more frames or slots than fit"));
        }
        let ids_at = table_at.checked_add(Table::encoded_len(config, u64::from(frames)));
        let ids_at = ids_at.ok_or(Malformed("the table is outside of the file"))?;
        let ids_len = u64::from(live) * ChunkId::BYTES as u64 + config.seal_overhead() as u64;
        if table_at < HEADER_BYTES as u64 || ids_at.checked_add(ids_len) != Some(trailer_at) {
            return Err(Malformed("the parts do not fill the file"));
        }
        Ok(Layout {
            table_at,
            ids_at,
            frames: frames as usize,
            live,
            ids_digest,
        })
    }
}

/// The largest stored frame.
pub(super) fn longest_frame(config: &Config) -> usize {
    frame::HEADER_BYTES
        + config.seal_overhead()
        + (config.frame_chunks() * config.chunk_size) as usize
}
