//! The index: where a chunk may already be. Advice only, bounded in memory, rebuilt from packs at will.

mod bucket;
mod merge;
mod segment;

use std::sync::{Arc, PoisonError, RwLock};

use bucket::BUCKET_BYTES;
pub(crate) use merge::rebuild;
pub(crate) use segment::{Entry, Segment, SegmentWriter};

use crate::backend::{Area, Backend, Lock};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::hash::ChunkId;
use crate::name::FileId;

/// Segments that differ in size by less than this factor are merged.
const LIKE_SIZE: u64 = 2;

/// How often the segments are listed, at most, when some of them went meanwhile.
const REFRESHES: usize = 4;

/// Where a chunk may be. To be believed only after a look at the pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hint {
    pub(crate) pack: FileId,
    pub(crate) slot: u32,
}

/// The segments that this process knows, shared by its writers.
pub(crate) struct Index {
    /// Bytes of segments to hold in memory.
    memory: u64,
    segments: RwLock<Arc<Vec<Arc<Segment>>>>,
}

impl Index {
    pub(crate) fn new(memory: u64) -> Self {
        Index {
            memory,
            segments: RwLock::default(),
        }
    }

    /// What is known now. Later changes do not change it.
    pub(crate) fn view(&self) -> View {
        View {
            segments: self
                .segments
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        }
    }

    /// Looks for segments that came or went. A segment that cannot be read is left out: `fsck` tells of it.
    pub(crate) fn refresh(&self, backend: &dyn Backend, config: &Config) -> Result<()> {
        // Who merges removes segments when the one that has all of theirs is there: it is in the next list.
        for _ in 0..REFRESHES {
            if self.look(backend, config)? {
                break;
            }
        }
        Ok(())
    }

    /// Opens the segments that are listed; whether all of them were still there.
    fn look(&self, backend: &dyn Backend, config: &Config) -> Result<bool> {
        let mut listed = backend
            .list(Area::Index)
            .map_err(Error::file("list the index"))?;
        listed.sort_by_key(|entry| entry.size);
        let known = self.view();
        let mut budget = self.memory;
        let mut segments = Vec::new();
        let mut all = true;
        for entry in listed {
            let in_memory = entry.size <= budget;
            budget = budget.saturating_sub(if in_memory { entry.size } else { 0 });
            let same = |segment: &&Arc<Segment>| {
                segment.name() == entry.name && segment.in_memory() == in_memory
            };
            match known.segments.iter().find(same) {
                Some(segment) => segments.push(segment.clone()),
                None => match Segment::open(backend, config, &entry.name, in_memory) {
                    Ok(segment) => segments.push(Arc::new(segment)),
                    Err(error) => all &= !error.is_not_found(),
                },
            }
        }
        *self
            .segments
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Arc::new(segments);
        Ok(all)
    }

    /// Adds the chunks of new packs, and merges segments of like size.
    pub(crate) fn add(
        &self,
        backend: &dyn Backend,
        config: &Config,
        entries: Vec<Entry>,
    ) -> Result<()> {
        if !entries.is_empty() {
            segment::of(backend, config, &entries)?.publish()?;
            self.refresh(backend, config)?;
        }
        self.merge_like_sizes(backend, config)
    }

    fn merge_like_sizes(&self, backend: &dyn Backend, config: &Config) -> Result<()> {
        let lock = if self.view().group_of_like_size().is_empty() {
            None
        } else {
            backend
                .try_lock(Lock::Index)
                .map_err(Error::io("lock the index"))?
        };
        // Somebody else merges: they, or whoever writes next, will come to these segments too.
        if lock.is_none() {
            return Ok(());
        }
        self.refresh(backend, config)?;
        let view = self.view();
        let group = view.group_of_like_size();
        if !group.is_empty() {
            merge::merge(backend, config, group, |_, _| true)?;
        }
        self.refresh(backend, config)
    }

    /// Merges all segments into one, with only what `keep` lets pass.
    pub(crate) fn compact(
        &self,
        backend: &dyn Backend,
        config: &Config,
        keep: impl Fn(FileId, u32) -> bool,
    ) -> Result<()> {
        let lock = backend
            .try_lock(Lock::Index)
            .map_err(Error::io("lock the index"))?;
        if lock.is_some() {
            self.refresh(backend, config)?;
            merge::merge(backend, config, &self.view().segments, keep)?;
            self.refresh(backend, config)?;
        }
        Ok(())
    }
}

/// The segments at some moment.
#[derive(Clone)]
pub(crate) struct View {
    segments: Arc<Vec<Arc<Segment>>>,
}

impl View {
    /// All places where a chunk may be, in `hints`; what cannot be read is not found.
    pub(crate) fn find(&self, id: &ChunkId, bucket: &mut BucketBuffer, hints: &mut Vec<Hint>) {
        hints.clear();
        for segment in self.segments.iter() {
            segment.find(id.prefix(), bucket, hints);
        }
    }

    /// The smallest segments, up to the largest that is not much larger than all before it together. Without those,
    /// each segment is: there are as many as the index's size has digits.
    fn group_of_like_size(&self) -> &[Arc<Segment>] {
        let mut total = 0;
        let mut group = 0;
        for (number, segment) in self.segments.iter().enumerate() {
            if segment.size() < LIKE_SIZE * total {
                group = number + 1;
            }
            total += segment.size();
        }
        &self.segments[..group]
    }
}

/// Room for one bucket.
pub(crate) type BucketBuffer = [u8; BUCKET_BYTES];

/// An empty [`BucketBuffer`].
pub(crate) const EMPTY_BUCKET: BucketBuffer = [0; BUCKET_BYTES];

#[cfg(test)]
mod tests;
