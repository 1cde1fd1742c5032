//! What the threads of one save share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::known::Known;
use super::publisher::{INDEX_AFTER, Publisher, Written};
use crate::error::{Error, Result};
use crate::name::FileId;
use crate::pack::{Batch, ChunkIds, IdsCache, Pack, PackBuilder, ids_cache};
use crate::protect::{Claim, condemned};
use crate::recipe::Place;
use crate::seal::{Sealer, SnapshotKeys};
use crate::store::Shared;

/// Frames that a thread reserves at a time, so that what it stores one after the other lies together.
pub(super) const RUN_FRAMES: u64 = 64;

/// One save: its lease, its packs, what it knows.
pub(super) struct Session {
    pub(super) shared: Arc<Shared>,
    claim: Claim,
    pub(super) known: Arc<Known>,
    packs: Mutex<Packs>,
    ids: IdsCache<u32>,
    /// Of each pack in which chunks were found: the version in which they were.
    versions: Mutex<HashMap<FileId, [u8; 16]>>,
    next_frame: AtomicU64,
    open: Mutex<HashMap<u64, OpenPack>>,
    publisher: Publisher,
    /// What seals the snapshot in work, in an encrypted store.
    pub(super) snapshot_keys: Option<SnapshotKeys>,
}

/// The packs that the session's recipes may count.
#[derive(Default)]
struct Packs {
    /// By number. The default id is a number that is not in use.
    ids: Vec<FileId>,
    standings: HashMap<FileId, Standing>,
}

#[derive(Clone, Copy)]
enum Standing {
    /// Protected; may be referred to.
    Usable(u32),
    /// Condemned, gone, or damaged: a hit there is a miss.
    Refused,
}

/// A pack that frames are still being written to.
#[derive(Clone)]
struct OpenPack {
    number: u32,
    /// Seals its frames, in an encrypted store.
    sealer: Option<Arc<Sealer>>,
    /// Taken out when the pack is complete.
    builder: Arc<Mutex<Option<PackBuilder>>>,
}

/// Which block of the snapshot in work.
#[derive(Clone, Copy)]
pub(super) struct BlockAt {
    /// The image's position in the snapshot.
    pub(super) image: u32,
    /// The block's in the image.
    pub(super) block: u64,
}

/// Frames reserved by a thread.
pub(super) struct Run {
    ordinal: u64,
    pack: OpenPack,
    /// Numbers in the pack.
    pub(super) frames: std::ops::Range<u32>,
}

impl Run {
    /// The session's number for the pack.
    pub(super) fn pack(&self) -> u32 {
        self.pack.number
    }

    /// What seals the pack's frames, in an encrypted store.
    pub(super) fn sealer(&self) -> Option<&Sealer> {
        self.pack.sealer.as_deref()
    }
}

impl Session {
    pub(super) fn new(shared: Arc<Shared>) -> Result<Self> {
        let snapshot_keys = match shared.keys.get()? {
            Some(keys) => Some(keys.snapshot(FileId::random()?)),
            None => None,
        };
        shared.index.refresh(&*shared.backend, &shared.config)?;
        let known = Arc::new(Known::new());
        Ok(Session {
            claim: Claim::new(&*shared.backend)?,
            packs: Mutex::default(),
            ids: ids_cache(),
            versions: Mutex::default(),
            next_frame: AtomicU64::new(0),
            open: Mutex::default(),
            publisher: Publisher::start(shared.clone(), known.clone(), INDEX_AFTER)?,
            known,
            snapshot_keys,
            shared,
        })
    }

    fn packs(&self) -> MutexGuard<'_, Packs> {
        self.packs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over a parent's numbers, so that its blocks can be kept as they are.
    pub(super) fn inherit(&self, table: &[FileId]) -> Result<()> {
        let mut packs = self.packs();
        let real: Vec<FileId> = table
            .iter()
            .copied()
            .filter(|id| *id != FileId::default())
            .collect();
        self.claim.add(&real)?;
        // A list that cannot be read may hold any pack.
        let condemned = condemned(&*self.shared.backend).ok();
        for (number, &id) in table.iter().enumerate() {
            if packs.ids.len() <= number {
                packs.ids.push(FileId::default());
            }
            let free = packs.ids[number] == FileId::default() && !packs.standings.contains_key(&id);
            if id != FileId::default() && free {
                packs.ids[number] = id;
                let spared = condemned
                    .as_ref()
                    .is_some_and(|condemned| !condemned.contains(&id));
                let standing = if spared {
                    Standing::Usable(number as u32)
                } else {
                    Standing::Refused
                };
                packs.standings.insert(id, standing);
            }
        }
        Ok(())
    }

    /// The number of a pack that may be referred to; `None` if it may not.
    ///
    /// The first time, the pack goes into the lease; only then is it looked at, so that nobody changes it after.
    pub(super) fn number_of(&self, id: FileId) -> Result<Option<u32>> {
        let mut packs = self.packs();
        let standing = match packs.standings.get(&id) {
            Some(&standing) => standing,
            None => {
                self.claim.add(&[id])?;
                // Not to use a pack costs only space.
                let spared = condemned(&*self.shared.backend)
                    .is_ok_and(|condemned| !condemned.contains(&id));
                let usable = spared.then(|| self.load_ids(id)).flatten();
                let standing = match usable {
                    Some(ids) => {
                        let number = packs.give_number(id);
                        self.ids.insert(number, ids);
                        Standing::Usable(number)
                    }
                    None => Standing::Refused,
                };
                packs.standings.insert(id, standing);
                standing
            }
        };
        Ok(match standing {
            Standing::Usable(number) => Some(number),
            Standing::Refused => None,
        })
    }

    fn load_ids(&self, id: FileId) -> Option<Arc<ChunkIds>> {
        let pack = Pack::open(&self.shared, id).ok()?;
        let ids = self.shared.ids_of(&pack).ok()?;
        // The first one: in it there may have been more than there is now.
        self.versions().entry(id).or_insert(pack.version());
        Some(ids)
    }

    fn versions(&self) -> MutexGuard<'_, HashMap<FileId, [u8; 16]>> {
        self.versions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails when a pack in which chunks were found is no longer what it was. A collection leaves it, for it is in the lease; but a
    /// repair writes it anew without what is damaged.
    pub(super) fn check_unchanged(&self) -> Result<()> {
        for (&id, version) in &*self.versions() {
            if Pack::version_now(&self.shared, id)? != *version {
                return Err(Error::Repaired);
            }
        }
        Ok(())
    }

    /// The pack with this number, if it may be referred to.
    pub(super) fn pack(&self, number: u32) -> Option<FileId> {
        let packs = self.packs();
        let id = *packs.ids.get(number as usize)?;
        matches!(packs.standings.get(&id), Some(Standing::Usable(_))).then_some(id)
    }

    /// The identities of a pack's chunks, if it can be read: not for packs that the session is writing.
    pub(super) fn ids(&self, number: u32) -> Option<Arc<ChunkIds>> {
        if let Some(ids) = self.ids.get(&number) {
            return Some(ids);
        }
        let ids = self.pack(number).and_then(|id| self.load_ids(id))?;
        self.ids.insert(number, ids.clone());
        Some(ids)
    }

    /// Reserves frames.
    pub(super) fn reserve(&self) -> Result<Run> {
        let per_pack = u64::from(self.shared.config.pack_frames());
        // Runs divide packs evenly.
        let run = RUN_FRAMES.min(per_pack);
        let first = self.next_frame.fetch_add(run, Ordering::Relaxed);
        let (ordinal, in_pack) = (first / per_pack, (first % per_pack) as u32);
        let pack = self.open_pack(ordinal)?;
        Ok(Run {
            ordinal,
            pack,
            frames: in_pack..in_pack + run as u32,
        })
    }

    fn open_pack(&self, ordinal: u64) -> Result<OpenPack> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pack) = open.get(&ordinal) {
            return Ok(pack.clone());
        }
        let id = FileId::random()?;
        // Before anybody can see the pack.
        self.claim.add(&[id])?;
        let builder = PackBuilder::new(&self.shared, id)?;
        let mut packs = self.packs();
        let number = packs.give_number(id);
        packs.standings.insert(id, Standing::Usable(number));
        let pack = OpenPack {
            number,
            sealer: builder.sealer(),
            builder: Arc::new(Mutex::new(Some(builder))),
        };
        open.insert(ordinal, pack.clone());
        Ok(pack)
    }

    /// Stores encoded frames of a reserved run.
    pub(super) fn append(&self, run: &Run, batch: &Batch) -> Result<()> {
        let mut builder = run
            .pack
            .builder
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(pack) = builder.as_mut() else {
            unreachable!("a pack is complete only with its last frame, and this one is reserved")
        };
        pack.append_batch(batch)?;
        if pack.frames_written() == self.shared.config.pack_frames() {
            let complete = builder.take();
            drop(builder);
            self.open
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&run.ordinal);
            complete.map_or(Ok(()), |pack| self.publisher.publish(pack))?;
        }
        Ok(())
    }

    /// Completes and publishes all packs, durably but for the area's sync.
    pub(super) fn finish_packs(&self) -> Result<Written> {
        let open = std::mem::take(&mut *self.open.lock().unwrap_or_else(PoisonError::into_inner));
        for pack in open.into_values() {
            let pack = pack
                .builder
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            if let Some(pack) = pack.filter(|pack| pack.frames_written() > 0) {
                self.publisher.publish(pack)?;
            }
        }
        self.publisher.finish()
    }

    /// The table of packs for a recipe that uses these numbers.
    pub(super) fn table(&self, used: &std::collections::BTreeSet<u32>) -> Vec<FileId> {
        let packs = self.packs();
        let len = used.last().map_or(0, |&last| last as usize + 1);
        (0..len)
            .map(|number| {
                if used.contains(&(number as u32)) {
                    packs.ids[number]
                } else {
                    FileId::default()
                }
            })
            .collect()
    }

    /// The stored form of a block of the recipe in work.
    pub(super) fn seal_block(&self, at: BlockAt, form: Vec<u8>) -> Result<Vec<u8>> {
        match &self.snapshot_keys {
            Some(keys) => keys.seal_block(at.image, at.block, &form),
            None => Ok(form),
        }
    }

    /// A place in the session's numbers.
    pub(super) fn place(&self, pack: u32, slot: u32) -> Place {
        Place::new(pack, slot, self.shared.config.pack_slots())
    }
}

impl Packs {
    fn give_number(&mut self, id: FileId) -> u32 {
        self.ids.push(id);
        self.ids.len() as u32 - 1
    }
}
