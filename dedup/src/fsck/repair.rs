//! Repairing: what is whole is kept, what is not is moved away.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use super::Check;
use crate::backend::{Area, Backend, Publish, ReadAt};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::frame::{Decoder, Encoder};
use crate::hash::ChunkId;
use crate::index::{self, BucketBuffer, EMPTY_BUCKET, View};
use crate::name::FileId;
use crate::pack::{CONFIG_AT, ChunkIds, Pack, PackBuilder, salvage};
use crate::refs;
use crate::store::{CONFIG, read_config};

/// The chunks of a pack, by frame and slot; none where a slot is dead or lost.
type Frames = BTreeMap<u32, Vec<Option<(ChunkId, Vec<u8>)>>>;

/// Restores the store's parameters from a pack when they are lost or damaged. Gives whether that was needed.
///
/// # Errors
///
/// No pack has them either; the store cannot be written.
pub fn repair_config(backend: &dyn Backend) -> Result<bool> {
    match read_config(backend) {
        Err(Error::NoStore | Error::Damaged { .. }) => {}
        other => return other.map(|_| false),
    }
    for entry in backend
        .list(Area::Packs)
        .map_err(Error::io("list the packs"))?
    {
        let mut bytes = [0; Config::BYTES];
        let read = backend
            .open(Area::Packs, &entry.name)
            .and_then(|pack| pack.read_exact_at(&mut bytes, CONFIG_AT));
        if read.is_ok() && Config::parse(&bytes, CONFIG).is_ok() {
            if let Ok(damaged) = backend.open(Area::Root, CONFIG) {
                keep_copy(backend, &*damaged, CONFIG)?;
            }
            publish(backend, Area::Root, CONFIG, &bytes)?;
            return Ok(true);
        }
    }
    Err(Error::NoStore)
}

/// Repairs what a check found; tells what was done.
pub(super) fn repair(check: &Check<'_>) -> Result<Vec<String>> {
    let (shared, backend) = (check.shared, &*check.shared.backend);
    let mut done = Vec::new();
    shared.index.refresh(backend, &shared.config)?;
    for &pack in check.packs.problems.keys() {
        done.push(repair_pack(check, pack)?);
    }
    for problem in &check.problems {
        if check.unreadable.contains(&problem.file) {
            done.push(format!("left {} as it is: {}", problem.file, problem.what));
            continue;
        }
        let Some((area, name)) = Area::ALL.iter().find_map(|&area| {
            let name = problem.file.strip_prefix(area.dir())?.strip_prefix('/')?;
            (area != Area::Root).then_some((area, name))
        }) else {
            continue;
        };
        // The index is made anew below, and tags are looked at when it is known which snapshots stay.
        if !matches!(area, Area::Index | Area::Tags) {
            done.push(move_away(backend, area, name)?);
        }
    }
    for tag in backend
        .list(Area::Tags)
        .map_err(Error::io("list the tags"))?
    {
        if !matches!(refs::resolve_tag(shared, &tag.name), Ok(Some(_))) {
            done.push(move_away(backend, Area::Tags, &tag.name)?);
        }
    }
    index::rebuild(shared)?;
    shared.index.add(backend, &shared.config, Vec::new())?;
    done.push("rebuilt the index".into());
    Ok(done)
}

/// Takes a file out of service; tells so.
fn move_away(backend: &dyn Backend, area: Area, name: &str) -> Result<String> {
    let path = area.path(name);
    let file = backend
        .open(area, name)
        .map_err(Error::io(format!("read {path}")))?;
    keep_copy(backend, &*file, &format!("{}-{name}", area.dir()))?;
    backend
        .remove(area, name)
        .map_err(Error::io(format!("remove {path}")))?;
    backend
        .sync(area)
        .map_err(Error::io(format!("sync {}", area.dir())))?;
    Ok(format!("moved {path} into damaged/"))
}

/// What a scan found. Within a frame that is damaged it may come upon what a guest, or an image of another store, has
/// for a frame: where there are two of a number, nobody knows which is the pack's own, unless the column of identities
/// has let only one of them through.
#[derive(Default)]
struct Salvaged {
    frames: Frames,
    ambiguous: BTreeSet<u32>,
}

impl Salvaged {
    fn add(&mut self, number: u32, slots: Vec<Option<(ChunkId, Vec<u8>)>>) {
        if slots.iter().all(Option::is_none) {
            return;
        }
        match self.frames.entry(number) {
            Entry::Vacant(entry) => drop(entry.insert(slots)),
            Entry::Occupied(entry) if *entry.get() == slots => {}
            Entry::Occupied(_) => drop(self.ambiguous.insert(number)),
        }
    }

    fn into_frames(mut self) -> Frames {
        for number in &self.ambiguous {
            self.frames.remove(number);
        }
        self.frames
    }
}

/// Writes a pack anew from what is whole in it, and from other packs that hold the same chunks.
fn repair_pack(check: &Check<'_>, id: FileId) -> Result<String> {
    let shared = check.shared;
    let (backend, config) = (&*shared.backend, &shared.config);
    let file = backend
        .open(Area::Packs, &id.to_string())
        .map_err(Error::io(format!("read packs/{id}")))?;
    keep_copy(backend, &*file, &format!("packs-{id}"))?;

    let identifier = shared.identifier()?;
    let column = Pack::open(shared, id).and_then(|pack| pack.ids()).ok();
    let mut salvaged = Salvaged::default();
    salvage(shared, &*file, id, |number, chunks, live| {
        let first = number * config.frame_chunks();
        let chunks = chunks.chunks(config.chunk_size as usize).zip(live);
        let slots = (first..).zip(chunks).map(|(slot, (chunk, live))| {
            let found = live.then(|| (identifier.identify(chunk), chunk.to_vec()));
            found.filter(|(id, _)| {
                column
                    .as_ref()
                    .is_none_or(|column| column.get(slot).as_ref() == Some(id))
            })
        });
        salvaged.add(number, slots.collect());
        Ok(())
    })?;
    let mut frames = salvaged.into_frames();
    let whole: usize = frames.values().flatten().flatten().count();
    // Where the column of identities is whole, it tells what is missing.
    let mut elsewhere = Elsewhere::new(check)?;
    let mut healed = 0;
    if let Some(ids) = &column {
        for (slot, chunk) in missing(ids, &frames, config.frame_chunks()) {
            if let Some(bytes) = elsewhere.find(&chunk, id)? {
                let slots = frames.entry(slot / config.frame_chunks()).or_default();
                let at = (slot % config.frame_chunks()) as usize;
                slots.resize(slots.len().max(at + 1), None);
                slots[at] = Some((chunk, bytes));
                healed += 1;
            }
        }
    }
    let mut repaired = PackBuilder::new(shared, id)?;
    let sealer = repaired.sealer();
    let mut encoder = Encoder::new(config.level)?;
    for (&number, slots) in frames
        .iter()
        .filter(|(_, slots)| slots.iter().any(Option::is_some))
    {
        let zeros = vec![0; config.chunk_size as usize];
        let plain: Vec<u8> = slots
            .iter()
            .flat_map(|slot| slot.as_ref().map_or(&zeros, |(_, bytes)| bytes))
            .copied()
            .collect();
        let ids: Vec<Option<ChunkId>> = slots
            .iter()
            .map(|slot| slot.as_ref().map(|(id, _)| *id))
            .collect();
        let encoded = encoder.encode(number, slots.len() as u16, &plain, sealer.as_deref())?;
        repaired.append(number, &encoded.to_vec(), &ids)?;
    }
    repaired.publish(Publish::Replace)?;
    backend.sync(Area::Packs).map_err(Error::io("sync packs"))?;
    Ok(format!(
        "rewrote packs/{id} with {whole} whole chunks and {healed} from other packs"
    ))
}

/// Slots that should live and were not found whole.
fn missing(ids: &ChunkIds, frames: &Frames, frame_chunks: u32) -> Vec<(u32, ChunkId)> {
    let found = |slot: u32| {
        let frame = frames.get(&(slot / frame_chunks));
        frame
            .and_then(|slots| slots.get((slot % frame_chunks) as usize))
            .is_some_and(Option::is_some)
    };
    ids.iter().filter(|(slot, _)| !found(*slot)).collect()
}

/// Finds chunks in other packs.
struct Elsewhere<'a> {
    check: &'a Check<'a>,
    view: View,
    bucket: Box<BucketBuffer>,
    decoder: Decoder,
}

impl<'a> Elsewhere<'a> {
    fn new(check: &'a Check<'a>) -> Result<Self> {
        let view = check.shared.index.view();
        Ok(Elsewhere {
            check,
            view,
            bucket: Box::new(EMPTY_BUCKET),
            decoder: Decoder::new()?,
        })
    }

    /// The bytes of a chunk, from another pack than `damaged`.
    fn find(&mut self, id: &ChunkId, damaged: FileId) -> Result<Option<Vec<u8>>> {
        let shared = self.check.shared;
        let (config, identifier) = (&shared.config, shared.identifier()?);
        let mut hints = Vec::new();
        self.view.find(id, &mut self.bucket, &mut hints);
        let is_whole = |pack: &FileId, slot| {
            self.check
                .packs
                .whole
                .get(pack)
                .is_some_and(|slots| slots.contains(slot))
        };
        for hint in hints
            .iter()
            .filter(|hint| hint.pack != damaged && is_whole(&hint.pack, hint.slot))
        {
            let pack = Pack::open(shared, hint.pack)?;
            let mut plain = vec![0; pack.frame_bytes()];
            let frame = hint.slot / config.frame_chunks();
            let len = pack.read_frame(frame, &mut self.decoder, &mut Vec::new(), &mut plain)?;
            let at = (hint.slot % config.frame_chunks()) as usize * config.chunk_size as usize;
            let chunk = plain[..len].get(at..at + config.chunk_size as usize);
            if let Some(chunk) = chunk.filter(|chunk| identifier.identify(chunk) == *id) {
                return Ok(Some(chunk.to_vec()));
            }
        }
        Ok(None)
    }
}

/// Copies a damaged file to where somebody may look at it later.
fn keep_copy(backend: &dyn Backend, file: &dyn ReadAt, name: &str) -> Result<()> {
    let mut bytes = vec![0; file.size() as usize];
    file.read_exact_at(&mut bytes, 0)
        .map_err(Error::io(format!("read {name}")))?;
    publish(backend, Area::Damaged, name, &bytes)
}

fn publish(backend: &dyn Backend, area: Area, name: &str, bytes: &[u8]) -> Result<()> {
    let failed = || Error::io(format!("write {}", area.path(name)));
    let mut draft = backend.draft().map_err(failed())?;
    draft.append(bytes).map_err(failed())?;
    draft.sync().map_err(failed())?;
    draft
        .publish(area, name, Publish::Replace)
        .map_err(failed())?;
    backend.sync(area).map_err(failed())
}
