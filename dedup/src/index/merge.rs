//! Merging segments, and making them anew from packs.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use super::{Entry, Hint, Segment, SegmentWriter, segment};
use crate::backend::{Area, Backend};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::name::FileId;
use crate::pack::Pack;
use crate::store::Shared;

/// Entries gathered in memory before a rebuild writes a segment: 40 MiB.
const REBUILD_ENTRIES: usize = 1 << 20;

/// The entries of one segment, in order. What cannot be read is left out.
struct Stream {
    segment: Arc<Segment>,
    next_bucket: u64,
    /// The current bucket, in reverse.
    rest: Vec<(u64, Hint)>,
}

impl Iterator for Stream {
    type Item = (u64, Hint);

    fn next(&mut self) -> Option<Self::Item> {
        while self.rest.is_empty() && self.next_bucket < self.segment.buckets() {
            self.rest = self
                .segment
                .checked_bucket(self.next_bucket)
                .unwrap_or_default();
            self.rest.reverse();
            self.next_bucket += 1;
        }
        self.rest.pop()
    }
}

/// Replaces segments by one that has what `keep` lets pass of all of them. Takes memory for a bucket of each.
pub(super) fn merge(
    backend: &dyn Backend,
    config: &Config,
    segments: &[Arc<Segment>],
    keep: impl Fn(FileId, u32) -> bool,
) -> Result<()> {
    let expected = segments.iter().map(|segment| segment.entries()).sum();
    let mut writer = SegmentWriter::new(backend, config, expected)?;
    let mut streams: Vec<Stream> = segments
        .iter()
        .map(|segment| Stream {
            segment: segment.clone(),
            next_bucket: 0,
            rest: Vec::new(),
        })
        .collect();
    let mut heads = BinaryHeap::new();
    for (number, stream) in streams.iter_mut().enumerate() {
        heads.extend(
            stream
                .next()
                .map(|(key, hint)| Reverse((key, hint.pack, hint.slot, number))),
        );
    }
    while let Some(Reverse((key, pack, slot, number))) = heads.pop() {
        if keep(pack, slot) {
            writer.push(key, Hint { pack, slot })?;
        }
        heads.extend(
            streams[number]
                .next()
                .map(|(key, hint)| Reverse((key, hint.pack, hint.slot, number))),
        );
    }
    writer.publish_synced()?;
    let merged = segments.iter().map(|segment| segment.name());
    replace(backend, merged)
}

/// Removes segments in whose place others were published. Those are durable first: what they replace was, mostly, long ago.
fn replace<'a>(backend: &dyn Backend, mut old: impl Iterator<Item = &'a str>) -> Result<()> {
    backend
        .sync(Area::Index)
        .map_err(Error::io("sync the index"))?;
    old.try_for_each(|name| remove(backend, name))
}

fn remove(backend: &dyn Backend, name: &str) -> Result<()> {
    match backend.remove(Area::Index, name) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(format!(
            "remove {}",
            Area::Index.path(name)
        ))(error)),
        _ => Ok(()),
    }
}

/// Makes the index anew from all packs that can be read.
pub(crate) fn rebuild(shared: &Shared) -> Result<()> {
    let (backend, config) = (&*shared.backend, &shared.config);
    let old = backend
        .list(Area::Index)
        .map_err(Error::file("list the index"))?;
    let mut entries = Vec::new();
    for file in backend
        .list(Area::Packs)
        .map_err(Error::file("list the packs"))?
    {
        let Some(id) = FileId::parse(&file.name) else {
            continue;
        };
        let Ok(ids) = Pack::open(shared, id).and_then(|pack| pack.ids()) else {
            continue;
        };
        entries.extend(ids.iter().map(|(slot, chunk)| Entry {
            id: chunk,
            pack: id,
            slot,
        }));
        if entries.len() >= REBUILD_ENTRIES {
            segment::of(backend, config, &entries)?.publish_synced()?;
            entries.clear();
        }
    }
    if !entries.is_empty() {
        segment::of(backend, config, &entries)?.publish_synced()?;
    }
    replace(backend, old.iter().map(|file| file.name.as_str()))
}
