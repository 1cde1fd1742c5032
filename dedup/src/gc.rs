//! Collecting garbage, beside writers and readers. `docs/store-format.md` argues why nothing in use is lost.

use std::collections::HashMap;
use std::time::Duration;

use crate::annotation;
use crate::backend::{Area, Backend, Entry, Lock, Publish};
use crate::config::DEFAULT_LEVEL;
use crate::error::{Error, Result};
use crate::frame::{Decoder, Encoder};
use crate::marks::{Marks, Slots};
use crate::name::FileId;
use crate::pack::{Pack, PackBuilder};
use crate::protect::{MAX_CONDEMNED, condemn};
use crate::store::{Shared, Store};

/// How to collect.
#[derive(Clone, Debug, Default)]
pub struct GcOptions {
    /// How long it may take until other hosts see a file that was published: nothing on a local file system, more than
    /// the attribute cache's time on NFS.
    pub grace: Duration,
}

/// What a collection did.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Collected {
    /// Drafts and leases of dead processes that were removed.
    pub leftovers: u64,
    /// Annotations of no snapshot that were removed.
    pub annotations_removed: u64,
    /// Packs that were looked at.
    pub packs: u64,
    /// Packs removed.
    pub packs_removed: u64,
    /// Packs that lost their dead chunks.
    pub packs_shrunk: u64,
    /// Bytes of packs freed.
    pub bytes_freed: u64,
}

/// Packs of which less than this share is needed are shrunk: 3 of 4.
const NEEDED: (u32, u32) = (3, 4);

/// What became of a pack.
enum Fate {
    Removed,
    /// With the slots that it kept.
    Shrunk(Slots),
}

impl Store {
    /// Removes chunks that no snapshot refers to. Other processes may save, load and remove at the same time. Without
    /// the key of an encrypted store, whole packs go and no single chunks.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] when another collection or a repair runs; a snapshot or lease that cannot be read;
    /// [`Error::CollectedInPart`] when some packs could not be removed or shrunk. What is needed is never removed, and
    /// what was removed before an error was not needed.
    pub fn gc(&self, options: &GcOptions) -> Result<Collected> {
        let (shared, backend) = (&*self.shared, &*self.shared.backend);
        let lock = backend
            .try_lock(Lock::Gc)
            .map_err(Error::io("lock the store for a collection"))?;
        let _lock = lock.ok_or(Error::Busy("a collection, check or repair"))?;
        let mut collected = Collected {
            leftovers: backend
                .clear_dead()
                .map_err(Error::io("remove what dead processes left"))?,
            ..Collected::default()
        };
        // Nobody else holds the lock, so these are of collections that died.
        for list in backend
            .list(Area::Condemned)
            .map_err(Error::file("list what is condemned"))?
        {
            remove(backend, Area::Condemned, &list.name)?;
        }

        // Before marking: what is published later is not looked at.
        let packs = backend
            .list(Area::Packs)
            .map_err(Error::file("list the packs"))?;
        collected.packs = packs.iter().filter_map(pack_id).count() as u64;
        let mut marks = Marks::default();
        marks.add_all(shared)?;
        collected.annotations_removed = annotation::remove_orphans(shared)?;
        // What is beyond is for the next collection.
        let candidates: Vec<(FileId, u64)> = packs
            .iter()
            .filter_map(|entry| candidate(shared, &marks, entry))
            .take(MAX_CONDEMNED)
            .collect();
        if candidates.is_empty() {
            return Ok(collected);
        }
        let ids: Vec<FileId> = candidates.iter().map(|(id, _)| *id).collect();
        let list = condemn(backend, &ids)?;
        std::thread::sleep(options.grace);
        let mut swept = Swept::default();
        let marked = marks
            .add_all(shared)
            // A removed snapshot must not come back after a power cut when its chunks are gone.
            .and_then(|()| {
                backend
                    .sync(Area::Snapshots)
                    .map_err(Error::io("sync snapshots"))
            })
            .map(|()| swept.sweep(shared, &marks, &candidates, &mut collected));
        // The next collection removes it else.
        swept.note(remove(backend, Area::Condemned, &list));
        marked?;
        let compacted = shared
            .index
            .compact(backend, &shared.config, |pack, slot| swept.has(pack, slot));
        match swept.failed {
            Some(source) => Err(Error::CollectedInPart {
                bytes: collected.bytes_freed,
                source: Box::new(source),
            }),
            None => compacted.map(|()| collected),
        }
    }
}

/// The id of a pack; none for a file that is called otherwise, which is for `fsck`.
fn pack_id(entry: &Entry) -> Option<FileId> {
    FileId::parse(&entry.name)
}

/// Whether a pack has enough garbage; then its id and size.
fn candidate(shared: &Shared, marks: &Marks, entry: &Entry) -> Option<(FileId, u64)> {
    let id = pack_id(entry)?;
    if marks.is_whole(id) {
        return None;
    }
    let Some(needed) = marks.slots(id) else {
        return Some((id, entry.size));
    };
    // A pack that cannot be read is for `fsck`.
    let pack = Pack::open(shared, id).ok()?;
    let live = pack.table().live_count();
    (needed.len() * NEEDED.1 < live * NEEDED.0).then_some((id, entry.size))
}

/// What became of the candidates.
#[derive(Default)]
struct Swept {
    fates: HashMap<FileId, Fate>,
    /// The first error. What it hit is as it was.
    failed: Option<Error>,
}

impl Swept {
    /// Removes and shrinks the candidates that are still not needed. One that cannot be stays, and keeps no other.
    fn sweep(
        &mut self,
        shared: &Shared,
        marks: &Marks,
        candidates: &[(FileId, u64)],
        collected: &mut Collected,
    ) {
        shared
            .progress
            .begin(candidates.iter().map(|(_, size)| size).sum());
        let (spared, unclaimed): (Vec<_>, Vec<_>) = candidates
            .iter()
            .copied()
            .partition(|(id, _)| marks.is_whole(*id));
        shared
            .progress
            .advance(spared.iter().map(|(_, size)| size).sum());
        let (hardly_needed, dead): (Vec<_>, Vec<_>) = unclaimed
            .into_iter()
            .partition(|(id, _)| marks.slots(*id).is_some());
        // First, and for good: to shrink a pack takes space, and there may be none but what these have.
        for (id, size) in dead {
            let removed = remove(&*shared.backend, Area::Packs, &id.to_string());
            if self.note(removed).is_some() {
                collected.packs_removed += 1;
                collected.bytes_freed += size;
                self.fates.insert(id, Fate::Removed);
            }
            shared.progress.advance(size);
        }
        self.sync(shared);
        for (id, size) in hardly_needed {
            let needed = marks.slots(id).cloned().unwrap_or_default();
            let shrunk = shrink(shared, id, &needed);
            if let Some(new_size) = self.note(shrunk) {
                collected.packs_shrunk += 1;
                collected.bytes_freed += size.saturating_sub(new_size);
                self.fates.insert(id, Fate::Shrunk(needed));
            }
            shared.progress.advance(size);
        }
        self.sync(shared);
    }

    fn sync(&mut self, shared: &Shared) {
        let synced = shared.backend.sync(Area::Packs);
        self.note(synced.map_err(Error::io("sync packs")));
    }

    /// What was done; of errors, the first is kept.
    fn note<T>(&mut self, outcome: Result<T>) -> Option<T> {
        match outcome {
            Ok(done) => Some(done),
            Err(error) => {
                self.failed.get_or_insert(error);
                None
            }
        }
    }

    /// Whether a slot that was there is there yet.
    fn has(&self, pack: FileId, slot: u32) -> bool {
        match self.fates.get(&pack) {
            None => true,
            Some(Fate::Removed) => false,
            Some(Fate::Shrunk(kept)) => kept.contains(slot),
        }
    }
}

/// How frames are compressed that keep room for dead slots, in a store that compresses none: raw, the room would cost as much as
/// what was there.
const GAPS_LEVEL: i32 = DEFAULT_LEVEL;

/// Replaces a pack by one with only the needed slots, each under its number. Gives the new size in bytes.
fn shrink(shared: &Shared, id: FileId, needed: &Slots) -> Result<u64> {
    let config = &shared.config;
    let pack = Pack::open(shared, id)?;
    let old_ids = pack.ids()?;
    let mut shrunk = PackBuilder::new(shared, id)?;
    let sealer = shrunk.sealer();
    let level = match config.level {
        0 => GAPS_LEVEL,
        level => level,
    };
    let (mut encoder, mut decoder) = (Encoder::new(level)?, Decoder::new()?);
    let mut plain = vec![0; pack.frame_bytes()];
    let mut stored = Vec::new();
    for (number, entry) in pack.table().frames.iter().enumerate() {
        let number = number as u32;
        let slots = (0..u32::from(entry.slots)).map(|slot| number * config.frame_chunks() + slot);
        let before: Vec<_> = slots.clone().map(|slot| old_ids.get(slot)).collect();
        let after: Vec<_> = slots
            .zip(&before)
            .map(|(slot, id)| id.filter(|_| needed.contains(slot)))
            .collect();
        if after.iter().all(Option::is_none) {
            continue;
        }
        let len = pack.read_frame(number, &mut decoder, &mut stored, &mut plain)?;
        if after == before {
            shrunk.append(number, &stored, &after)?;
            continue;
        }
        let chunks = plain[..len].chunks_mut(config.chunk_size as usize);
        chunks
            .zip(&after)
            .filter(|(_, id)| id.is_none())
            .for_each(|(chunk, _)| chunk.fill(0));
        let encoded = encoder.encode(number, entry.slots, &plain[..len], sealer.as_deref())?;
        shrunk.append(number, &encoded.to_vec(), &after)?;
    }
    Ok(shrunk.publish(Publish::Replace)?.size)
}

fn remove(backend: &dyn Backend, area: Area, name: &str) -> Result<()> {
    match backend.remove(area, name) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("remove {}", area.path(name)))(error))
        }
        _ => Ok(()),
    }
}
