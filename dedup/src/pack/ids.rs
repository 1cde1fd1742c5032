//! Bounded caches of packs' identities.

use std::hash::Hash;
use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::ChunkIds;

/// Memory that the identities in one cache may take.
const MEMORY: u64 = 64 << 20;

/// Packs whose identities fit, if they are full.
const PACKS: usize = 256;

/// Identities of packs, which are told apart by `K`.
pub(crate) type IdsCache<K> = Cache<K, Arc<ChunkIds>, ByMemory>;

/// An empty cache.
pub(crate) fn ids_cache<K: Eq + Hash>() -> IdsCache<K> {
    Cache::with_weighter(PACKS, MEMORY, ByMemory)
}

#[derive(Clone)]
pub(crate) struct ByMemory;

impl<K> Weighter<K, Arc<ChunkIds>> for ByMemory {
    fn weight(&self, _pack: &K, ids: &Arc<ChunkIds>) -> u64 {
        ids.memory().max(1)
    }
}
