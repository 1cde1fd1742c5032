//! The chunks that a session has written and the index does not know yet.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::hash::ChunkId;
use crate::recipe::Place;

/// Enough that threads seldom meet.
const SHARDS: usize = 64;

/// A map from identity to place, for many threads.
pub(super) struct Known {
    shards: Vec<Mutex<Shard>>,
}

type Shard = HashMap<ChunkId, Place, BuildHasherDefault<Leading>>;

impl Known {
    pub(super) fn new() -> Self {
        Known {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
        }
    }

    fn shard(&self, id: &ChunkId) -> MutexGuard<'_, Shard> {
        // Not a byte that the shard's own map hashes by.
        let shard = usize::from(id.0[ChunkId::BYTES - 1]) % SHARDS;
        self.shards[shard]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, id: &ChunkId) -> Option<Place> {
        self.shard(id).get(id).copied()
    }

    /// The place of a chunk, which is what `place` gives if nobody came before; and whether it was that.
    pub(super) fn get_or_insert(
        &self,
        id: ChunkId,
        place: impl FnOnce() -> Place,
    ) -> (Place, bool) {
        match self.shard(&id).entry(id) {
            Entry::Occupied(entry) => (*entry.get(), false),
            Entry::Vacant(entry) => (*entry.insert(place()), true),
        }
    }

    pub(super) fn remove(&self, id: &ChunkId) {
        self.shard(id).remove(id);
    }
}

/// Identities are hashes already: takes eight of their bytes. In an unkeyed store a guest that grinds identities
/// can slow its own save down, as it can by other means.
#[derive(Default)]
struct Leading(u64);

impl Hasher for Leading {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(leading) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*leading);
        }
    }

    /// The length, which a slice or array writes before its bytes and which is always the same.
    fn write_usize(&mut self, _length: usize) {}
}
