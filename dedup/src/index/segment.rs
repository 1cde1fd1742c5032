//! Segments: immutable files of buckets.

use std::collections::HashMap;
use std::sync::Arc;

use super::bucket::{
    BUCKET_BYTES, Bucket, CAPACITY, MEAN_FILL, VALUE_LIMIT, bucket_of, depth_of, encode,
};
use super::{BucketBuffer, EMPTY_BUCKET, Hint};
use crate::backend::{Area, Backend, Draft, Publish, ReadAt};
use crate::bytes::Cursor;
use crate::config::Config;
use crate::error::{Error, Malformed, Result};
use crate::hash::{ChunkId, digest};
use crate::name::FileId;

const MAGIC: &[u8; 8] = b"DEDUPIDX";
const VERSION: u32 = 1;
const TRAILER_BYTES: usize = 72;

/// Packs that a segment counts, at most: 256 TiB of chunks.
const MAX_PACKS: u32 = 1 << 22;

/// A chunk and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) id: ChunkId,
    pub(crate) pack: FileId,
    pub(crate) slot: u32,
}

/// An open segment.
pub(crate) struct Segment {
    name: String,
    size: u64,
    buckets: u64,
    entries: u64,
    pub(super) packs: Vec<FileId>,
    pack_slots: u32,
    content: Content,
}

enum Content {
    Memory(Vec<u8>),
    File(Arc<dyn ReadAt>),
}

impl Segment {
    /// Opens a segment; `in_memory` reads all its buckets.
    pub(crate) fn open(
        backend: &dyn Backend,
        config: &Config,
        name: &str,
        in_memory: bool,
    ) -> Result<Self> {
        let failed = || Error::file(format!("read {}", Area::Index.path(name)));
        let damaged = |malformed: Malformed| malformed.in_file(Area::Index.path(name));
        let file = backend.open(Area::Index, name).map_err(failed())?;
        let size = file.size();
        let trailer_at = size
            .checked_sub(TRAILER_BYTES as u64)
            .ok_or_else(|| damaged(Malformed("too short")))?;
        let mut trailer = [0; TRAILER_BYTES];
        file.read_exact_at(&mut trailer, trailer_at)
            .map_err(failed())?;
        let (buckets, entries, packs) =
            parse_trailer(&trailer, config, trailer_at).map_err(damaged)?;
        // A file can be sparse.
        if packs > MAX_PACKS {
            return Err(damaged(Malformed("more packs than any store has")));
        }
        let mut ids = vec![0; packs as usize * 16];
        file.read_exact_at(&mut ids, buckets * BUCKET_BYTES as u64)
            .map_err(failed())?;
        if digest(&[&ids, &trailer[..56]]) != trailer[56..] {
            return Err(damaged(Malformed("the digest does not match")));
        }
        let content = if in_memory {
            let mut content = vec![0; buckets as usize * BUCKET_BYTES];
            file.read_exact_at(&mut content, 0).map_err(failed())?;
            Content::Memory(content)
        } else {
            Content::File(file)
        };
        Ok(Segment {
            name: name.to_owned(),
            size,
            buckets,
            entries,
            packs: ids.as_chunks().0.iter().copied().map(FileId).collect(),
            pack_slots: config.pack_slots(),
            content,
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of the file.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Entries in it.
    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// Buckets in it.
    pub(crate) fn buckets(&self) -> u64 {
        self.buckets
    }

    pub(super) fn in_memory(&self) -> bool {
        matches!(self.content, Content::Memory(_))
    }

    /// The bytes of a bucket, read to `buffer` if they are not in memory.
    fn bucket<'a>(&'a self, number: u64, buffer: &'a mut BucketBuffer) -> Result<Bucket<'a>> {
        match &self.content {
            Content::Memory(content) => {
                // The segment has this many whole buckets, and the number is below that.
                Ok(Bucket(
                    content
                        .as_chunks()
                        .0
                        .get(number as usize)
                        .unwrap_or(&EMPTY_BUCKET),
                ))
            }
            Content::File(file) => {
                file.read_exact_at(buffer, number * BUCKET_BYTES as u64)
                    .map_err(Error::file(format!(
                        "read {}",
                        Area::Index.path(&self.name)
                    )))?;
                Ok(Bucket(buffer))
            }
        }
    }

    /// Adds to `hints` what is known under a key. The digest is not checked: a wrong hint is found out anyway.
    pub(super) fn find(&self, key: u64, buffer: &mut BucketBuffer, hints: &mut Vec<Hint>) {
        if let Ok(bucket) = self.bucket(bucket_of(key, self.buckets), buffer) {
            let found = bucket.find(key, depth_of(key, self.buckets));
            hints.extend(found.filter_map(|value| self.hint(value)));
        }
    }

    fn hint(&self, value: u64) -> Option<Hint> {
        let (pack, slot) = (
            value / u64::from(self.pack_slots),
            value % u64::from(self.pack_slots),
        );
        self.packs.get(pack as usize).map(|&pack| Hint {
            pack,
            slot: slot as u32,
        })
    }

    /// The entries of a bucket, ascending by key, with its digest checked.
    pub(crate) fn checked_bucket(&self, number: u64) -> Result<Vec<(u64, Hint)>> {
        let mut buffer = EMPTY_BUCKET;
        let bucket = self.bucket(number, &mut buffer)?;
        let damaged = |malformed: Malformed| malformed.in_file(Area::Index.path(&self.name));
        bucket.check().map_err(damaged)?;
        let hints = bucket
            .iter()
            .map(|(key, value)| self.hint(value).map(|hint| (key, hint)));
        hints
            .collect::<Option<_>>()
            .ok_or_else(|| damaged(Malformed("an entry is in no pack")))
    }
}

/// Checks the trailer against the file's size: buckets, entries, packs.
fn parse_trailer(
    trailer: &[u8],
    config: &Config,
    trailer_at: u64,
) -> Result<(u64, u64, u32), Malformed> {
    let mut cursor = Cursor::new(trailer);
    cursor.expect(MAGIC, "not a segment of the index")?;
    let (version, pack_slots, store_id) = (cursor.u32()?, cursor.u32()?, cursor.array()?);
    if version != VERSION
        || pack_slots != config.pack_slots()
        || FileId(store_id) != config.store_id
    {
        return Err(Malformed("of another version or store"));
    }
    let (buckets, entries, packs, zero) =
        (cursor.u64()?, cursor.u64()?, cursor.u32()?, cursor.u32()?);
    let len = buckets
        .checked_mul(BUCKET_BYTES as u64)
        .and_then(|len| len.checked_add(u64::from(packs) * 16));
    if len != Some(trailer_at) || buckets == 0 || zero != 0 {
        return Err(Malformed("the parts do not fill the file"));
    }
    // A merge makes room for this many, whatever the buckets hold.
    if entries > buckets.saturating_mul(CAPACITY as u64) {
        return Err(Malformed("more entries than fit"));
    }
    Ok((buckets, entries, packs))
}

/// Writes a segment from entries that come in ascending order of their keys.
pub(crate) struct SegmentWriter {
    draft: Box<dyn Draft>,
    store_id: FileId,
    pack_slots: u32,
    buckets: u64,
    /// Buckets written.
    written: u64,
    entries: u64,
    /// Entries of the next bucket.
    pending: Vec<(u64, u64)>,
    packs: Vec<FileId>,
    pack_numbers: HashMap<FileId, u32>,
    /// Encoded buckets on their way to the draft.
    out: Vec<u8>,
}

/// Buckets are handed to the backend in pieces of this many bytes.
const WRITE_BYTES: usize = 1 << 20;

impl SegmentWriter {
    /// Begins a segment for about `expected` entries.
    pub(crate) fn new(backend: &dyn Backend, config: &Config, expected: u64) -> Result<Self> {
        Ok(SegmentWriter {
            draft: backend
                .draft()
                .map_err(Error::io("begin a segment of the index"))?,
            store_id: config.store_id,
            pack_slots: config.pack_slots(),
            buckets: expected.div_ceil(MEAN_FILL).max(1),
            written: 0,
            entries: 0,
            pending: Vec::new(),
            packs: Vec::new(),
            pack_numbers: HashMap::new(),
            out: Vec::new(),
        })
    }

    /// Adds an entry. Its key is not less than the one before.
    pub(crate) fn push(&mut self, key: u64, hint: Hint) -> Result<()> {
        let pack = self.number_of(hint.pack);
        self.put(key, self.value(pack, hint.slot))
    }

    /// The segment's number for a pack.
    fn number_of(&mut self, pack: FileId) -> u32 {
        let next = self.packs.len() as u32;
        *self.pack_numbers.entry(pack).or_insert_with(|| {
            self.packs.push(pack);
            next
        })
    }

    fn value(&self, pack: u32, slot: u32) -> u64 {
        u64::from(pack) * u64::from(self.pack_slots) + u64::from(slot)
    }

    fn put(&mut self, key: u64, value: u64) -> Result<()> {
        let bucket = bucket_of(key, self.buckets);
        while self.written < bucket {
            self.end_bucket()?;
        }
        if value < VALUE_LIMIT && self.pending.last() != Some(&(key, value)) {
            self.pending.push((key, value));
        }
        Ok(())
    }

    fn end_bucket(&mut self) -> Result<()> {
        let mut bucket = EMPTY_BUCKET;
        self.entries += encode(&self.pending, &mut bucket) as u64;
        self.pending.clear();
        self.written += 1;
        self.out.extend_from_slice(&bucket);
        if self.out.len() >= WRITE_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.draft
            .append(&self.out)
            .map_err(Error::io("write the index"))?;
        self.out.clear();
        Ok(())
    }

    /// Completes the segment and publishes it, without making it durable.
    pub(crate) fn publish(mut self) -> Result<()> {
        self.complete()?;
        self.give_name()
    }

    /// As [`SegmentWriter::publish`], and durably, but for the area's sync.
    pub(crate) fn publish_synced(mut self) -> Result<()> {
        self.complete()?;
        self.draft.sync().map_err(Error::io("write the index"))?;
        self.give_name()
    }

    /// Writes what is left.
    fn complete(&mut self) -> Result<()> {
        while self.written < self.buckets {
            self.end_bucket()?;
        }
        let ids: Vec<u8> = self.packs.iter().flat_map(|pack| pack.0).collect();
        let mut trailer = Vec::new();
        trailer.extend_from_slice(MAGIC);
        trailer.extend_from_slice(&VERSION.to_le_bytes());
        trailer.extend_from_slice(&self.pack_slots.to_le_bytes());
        trailer.extend_from_slice(&self.store_id.0);
        trailer.extend_from_slice(&self.buckets.to_le_bytes());
        trailer.extend_from_slice(&self.entries.to_le_bytes());
        trailer.extend_from_slice(&(self.packs.len() as u32).to_le_bytes());
        trailer.extend_from_slice(&[0; 4]);
        let digest = digest(&[&ids, &trailer]);
        self.out.extend_from_slice(&ids);
        self.out.extend_from_slice(&trailer);
        self.out.extend_from_slice(&digest);
        self.flush()
    }

    fn give_name(self) -> Result<()> {
        let name = FileId::random()?.to_string();
        self.draft
            .publish(Area::Index, &name, Publish::Replace)
            .map_err(Error::io("write the index"))
    }
}

/// A segment of these entries, to be published.
pub(super) fn of(
    backend: &dyn Backend,
    config: &Config,
    entries: &[Entry],
) -> Result<SegmentWriter> {
    let mut writer = SegmentWriter::new(backend, config, entries.len() as u64)?;
    // Whoever saves waits for this. So what is sorted is small, and packs, which come one after the other, are looked up once.
    let mut sorted = Vec::with_capacity(entries.len());
    for of_pack in entries.chunk_by(|one, next| one.pack == next.pack) {
        let pack = writer.number_of(of_pack[0].pack);
        let values = of_pack.iter();
        sorted.extend(values.map(|entry| (entry.id.prefix(), writer.value(pack, entry.slot))));
    }
    sorted.sort_unstable_by_key(|(key, _)| *key);
    for (key, value) in sorted {
        writer.put(key, value)?;
    }
    Ok(writer)
}
