//! Comparing snapshots without reading their chunks.

use std::ops::Range;
use std::sync::Arc;

use quick_cache::sync::Cache;

use crate::error::{Error, Result};
use crate::hash::ChunkId;
use crate::name::FileId;
use crate::pack::{ChunkIds, Pack};
use crate::recipe::{BLOCK_CHUNKS, BlockCoder, Place};
use crate::snapshot::Recipe;
use crate::store::{Shared, Store};

/// Packs whose identities are kept while comparing; each takes 384 KiB.
const CACHED_PACKS: usize = 128;

/// How an image differs between two snapshots.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ImageDiff {
    /// The image's name.
    pub name: String,
    /// Bytes of the image in the first snapshot, if it is there.
    pub old_size: Option<u64>,
    /// Bytes of the image in the second snapshot, if it is there.
    pub new_size: Option<u64>,
    /// Where they differ, in whole chunks, ascending; for an image that is in both only.
    pub changed: Vec<Range<u64>>,
}

impl ImageDiff {
    /// Bytes in changed chunks.
    pub fn changed_bytes(&self) -> u64 {
        self.changed
            .iter()
            .map(|range| range.end - range.start)
            .sum()
    }
}

impl Store {
    /// Compares two snapshots (by name, tag or id), image by image. Reads recipes, and identities where the
    /// same chunk may be in two places, but no chunk.
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshot`]; [`Error::Damaged`].
    pub fn diff(&self, old: &str, new: &str) -> Result<Vec<ImageDiff>> {
        let (old, new) = (self.resolve(old)?, self.resolve(new)?);
        let mut diffs = Vec::new();
        for (position, facts) in old.facts.images.iter().enumerate() {
            let mut diff = ImageDiff {
                name: facts.name.clone(),
                old_size: Some(facts.size),
                new_size: None,
                changed: Vec::new(),
            };
            if let Some(other) = new
                .facts
                .images
                .iter()
                .position(|image| image.name == facts.name)
            {
                let config = &self.shared.config;
                let (old, new) = (old.recipe(config, position)?, new.recipe(config, other)?);
                diff.new_size = Some(new.size);
                diff.changed = Comparison::new(&self.shared, &old, &new)?.run()?;
            }
            diffs.push(diff);
        }
        for facts in new.facts.images {
            if old
                .facts
                .images
                .iter()
                .all(|image| image.name != facts.name)
            {
                let (name, new_size) = (facts.name, Some(facts.size));
                diffs.push(ImageDiff {
                    name,
                    old_size: None,
                    new_size,
                    changed: Vec::new(),
                });
            }
        }
        Ok(diffs)
    }
}

struct Comparison<'a> {
    shared: &'a Shared,
    old: &'a Recipe,
    new: &'a Recipe,
    coder: BlockCoder,
    ids: Cache<FileId, Arc<ChunkIds>>,
}

impl<'a> Comparison<'a> {
    fn new(shared: &'a Shared, old: &'a Recipe, new: &'a Recipe) -> Result<Self> {
        Ok(Comparison {
            shared,
            old,
            new,
            coder: BlockCoder::new()?,
            ids: Cache::new(CACHED_PACKS),
        })
    }

    /// The ranges of bytes that differ. What only one image has differs.
    fn run(mut self) -> Result<Vec<Range<u64>>> {
        let mut changed: Vec<Range<u64>> = Vec::new();
        let chunk_size = u64::from(self.shared.config.chunk_size);
        let blocks = self
            .old
            .directory
            .blocks()
            .len()
            .max(self.new.directory.blocks().len());
        let end = self.old.size.max(self.new.size);
        for block in 0..blocks {
            let mut equal = self.equal_chunks(block)?;
            // What an image's last chunk is filled up with is not the image's.
            let shorter = self.old.size.min(self.new.size);
            let last = shorter / chunk_size;
            if self.old.size != self.new.size
                && !shorter.is_multiple_of(chunk_size)
                && last / BLOCK_CHUNKS as u64 == block as u64
                && let Some(last) = equal.get_mut(last as usize % BLOCK_CHUNKS)
            {
                *last = false;
            }
            let count = self
                .old
                .block_chunks(block)
                .max(self.new.block_chunks(block));
            for chunk in (0..count).filter(|&chunk| equal.get(chunk) != Some(&true)) {
                let at = (block * BLOCK_CHUNKS + chunk) as u64 * chunk_size;
                let range = at..(at + chunk_size).min(end);
                match changed.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    _ => changed.push(range),
                }
            }
        }
        Ok(changed)
    }

    /// For each chunk of a block that both images have, whether it is the same.
    fn equal_chunks(&mut self, block: usize) -> Result<Vec<bool>> {
        let (Some(old), Some(new)) = (
            self.old.directory.blocks().get(block),
            self.new.directory.blocks().get(block),
        ) else {
            return Ok(Vec::new());
        };
        let same_bytes = (old.len, old.digest) == (new.len, new.digest);
        let old = self.old.places(block, &mut self.coder)?;
        if same_bytes && self.same_packs(&old) {
            let in_both = old.len().min(self.new.block_chunks(block));
            return Ok(vec![true; in_both]);
        }
        let new = self.new.places(block, &mut self.coder)?;
        old.into_iter()
            .zip(new)
            .map(|(old, new)| self.equal(old, new))
            .collect()
    }

    /// Whether all packs that places are in have the same number in both tables.
    fn same_packs(&self, places: &[Place]) -> bool {
        let pack_slots = self.shared.config.pack_slots();
        let (old, new) = (&self.old.directory.packs, &self.new.directory.packs);
        places
            .iter()
            .filter_map(|place| place.pack(pack_slots))
            .all(|pack| old.get(pack as usize) == new.get(pack as usize))
    }

    fn equal(&self, old: Place, new: Place) -> Result<bool> {
        let pack_slots = self.shared.config.pack_slots();
        let in_pack = |recipe: &Recipe, place: Place| {
            place
                .get(pack_slots)
                .map(|(pack, slot)| (recipe.directory.packs[pack as usize], slot))
        };
        match (in_pack(self.old, old), in_pack(self.new, new)) {
            (None, None) => Ok(true),
            (Some(old), Some(new)) if old == new => Ok(true),
            (Some(old), Some(new)) => Ok(self.id(old)? == self.id(new)?),
            _ => Ok(false),
        }
    }

    fn id(&self, (pack, slot): (FileId, u32)) -> Result<ChunkId> {
        let ids = self
            .ids
            .get_or_insert_with(&pack, || Pack::open(self.shared, pack)?.ids().map(Arc::new))?;
        ids.get(slot).ok_or_else(|| Error::Damaged {
            file: crate::backend::Area::Packs.path(&pack.to_string()),
            what: "a chunk that is referred to is not there",
        })
    }
}
