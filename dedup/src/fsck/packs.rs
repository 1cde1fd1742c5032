//! Checking packs: every frame decoded, every chunk hashed.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use super::{Packs, Problem};
use crate::backend::Area;
use crate::error::{Error, Malformed, Result};
use crate::frame::Decoder;
use crate::hash::is_zero;
use crate::marks::Slots;
use crate::name::FileId;
use crate::pack::Pack;
use crate::store::Shared;
use crate::threads;

/// Checks all packs, on all threads.
pub(super) fn check(shared: &Shared, problems: &mut BTreeSet<Problem>) -> Result<Packs> {
    let mut ids = Vec::new();
    let mut bytes = 0;
    for entry in shared
        .backend
        .list(Area::Packs)
        .map_err(Error::file("list the packs"))?
    {
        match FileId::parse(&entry.name) {
            Some(id) => {
                bytes += entry.size;
                ids.push((id, entry.size));
            }
            None => {
                let file = Area::Packs.path(&entry.name);
                problems.insert(Problem {
                    file,
                    what: "not a pack's name".into(),
                    snapshots: Vec::new(),
                });
            }
        }
    }
    shared.progress.begin(bytes);
    let queue = Mutex::new(ids.into_iter());
    let packs = Mutex::new(Packs::default());
    threads::on(shared.threads, || {
        let mut decoder = Decoder::new()?;
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((id, size)) = next else {
                return Ok(());
            };
            let (whole, checked) = check_one(shared, id, &mut decoder);
            shared.progress.advance(size);
            packs
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .add(id, whole, checked);
        }
    })?;
    Ok(packs.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Checks one pack; gives what is whole of it, and the first error.
pub(super) fn check_one(shared: &Shared, id: FileId, decoder: &mut Decoder) -> (Slots, Result<()>) {
    let mut whole = Slots::default();
    let checked = if shared.keys.is_locked() {
        check_digests(shared, id, &mut whole)
    } else {
        check_pack(shared, id, decoder, &mut whole)
    };
    (whole, checked)
}

impl Packs {
    /// Notes what a check of a pack found.
    pub(super) fn add(&mut self, id: FileId, whole: Slots, checked: Result<()>) {
        self.chunks += u64::from(whole.len());
        self.whole.insert(id, whole);
        if let Err(error) = checked {
            self.problems.insert(id, error.of_its_file());
        }
    }
}

/// Checks one pack, to its end even when something is wrong; gives the first error. `whole` gets the slots that are
/// live and right.
fn check_pack(shared: &Shared, id: FileId, decoder: &mut Decoder, whole: &mut Slots) -> Result<()> {
    let config = &shared.config;
    let pack = Pack::open(shared, id)?;
    let identifier = shared.identifier()?;
    let mut result = pack.check_gapless();
    let ids = match pack.ids() {
        Ok(ids) => Some(ids),
        Err(error) => {
            result = result.and(Err(error));
            None
        }
    };
    let mut plain = vec![0; pack.frame_bytes()];
    let mut stored = Vec::new();
    for (number, entry) in pack
        .table()
        .frames
        .iter()
        .enumerate()
        .filter(|(_, entry)| entry.slots > 0)
    {
        let len = match pack.read_frame(number as u32, decoder, &mut stored, &mut plain) {
            Ok(len) => len,
            Err(error) => {
                result = result.and(Err(error));
                continue;
            }
        };
        debug_assert_eq!(len, usize::from(entry.slots) * config.chunk_size as usize);
        let chunks: Vec<&[u8]> = plain[..len].chunks(config.chunk_size as usize).collect();
        let mut found = Vec::new();
        identifier.identify_all(&chunks, &mut found);
        for ((slot, chunk), found) in (number as u32 * config.frame_chunks()..)
            .zip(&chunks)
            .zip(found)
        {
            let expected = ids.as_ref().map(|ids| ids.get(slot));
            match expected {
                // Zeros are never stored. Whoever can write to the store may say that a slot lives that has died.
                _ if pack.table().has(slot) && is_zero(chunk) => {
                    result = result.and(Err(pack.damaged(Malformed("a live slot is zeros"))));
                }
                // Without the column, a digest over the frame is still a good sign.
                None if pack.table().has(slot) => whole.insert(slot),
                Some(Some(expected)) if expected == found => whole.insert(slot),
                Some(Some(_)) => {
                    result = result.and(Err(
                        pack.damaged(Malformed("a chunk is not what its identity says"))
                    ));
                }
                _ if !is_zero(chunk) => {
                    result = result.and(Err(pack.damaged(Malformed("a dead slot is not zeros"))));
                }
                _ => {}
            }
        }
    }
    result
}

/// Checks what takes no key: all digests. `whole` gets the live slots of frames whose digests match.
fn check_digests(shared: &Shared, id: FileId, whole: &mut Slots) -> Result<()> {
    let pack = Pack::open(shared, id)?;
    let mut result = pack.check_gapless().and(pack.stored_ids().map(drop));
    let mut stored = Vec::new();
    for (number, entry) in (0..).zip(&pack.table().frames) {
        if entry.slots == 0 {
            continue;
        }
        match pack.check_frame(number, &mut stored) {
            Ok(()) => {
                let first = number * shared.config.frame_chunks();
                let slots = first..first + u32::from(entry.slots);
                slots
                    .filter(|&slot| pack.table().has(slot))
                    .for_each(|slot| whole.insert(slot));
            }
            Err(error) => result = result.and(Err(error)),
        }
    }
    result
}
