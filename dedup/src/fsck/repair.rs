//! Repairing: what is whole is kept, what is not is moved away.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::{Check, Problem, snapshots};
use crate::annotation;
use crate::backend::{Area, Backend, Publish, ReadAt};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::frame::{Decoder, Encoder};
use crate::hash::ChunkId;
use crate::index::{self, BucketBuffer, EMPTY_BUCKET, View};
use crate::name::FileId;
use crate::pack::{CONFIG_AT, ChunkIds, Pack, PackBuilder, salvage};
use crate::protect;
use crate::readable::read_readable;
use crate::refs;
use crate::store::{CONFIG, read_config};

/// Bytes that a damaged file has of which a copy is kept, at most. No pack and hardly a snapshot has more, but a file can be sparse, and without an end.
const MAX_KEPT_BYTES: u64 = 1 << 30;

/// Bytes that are copied at a time.
const COPY_BYTES: u64 = 1 << 20;

/// The chunks of a pack, by frame and slot; none where a slot is dead or lost.
type Frames = BTreeMap<u32, Vec<Option<(ChunkId, Vec<u8>)>>>;

/// Restores the store's parameters from a pack when they are lost or damaged. Gives what was wrong with them, if anything: it
/// is for [`super::Report::after_config`], of the repair that can then be done.
///
/// # Errors
///
/// [`Error::NoCopyOfConfig`]; the store cannot be written.
pub fn repair_config(backend: &dyn Backend) -> Result<Option<Problem>> {
    let what = match read_config(backend) {
        Err(Error::LostConfig(_)) => "the file is missing".to_owned(),
        Err(damaged @ Error::Damaged { .. }) => damaged.of_its_file(),
        other => return other.map(|_| None),
    };
    for entry in backend
        .list(Area::Packs)
        .map_err(Error::file("list the packs"))?
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
            return Ok(Some(Problem {
                file: CONFIG.to_owned(),
                what,
                // It is whole when they are checked.
                snapshots: Vec::new(),
            }));
        }
    }
    Err(Error::NoCopyOfConfig)
}

/// Repairs what a check found; tells what was done, and what could not be.
pub(super) fn repair(check: &Check<'_>) -> Result<Vec<String>> {
    let (shared, backend) = (check.shared, &*check.shared.backend);
    let mut done = Vec::new();
    if !check.packs.problems.is_empty() {
        // It tells where else a damaged chunk is, and may itself be lost or leave something out.
        index::rebuild(shared)?;
        shared.index.refresh(backend, &shared.config)?;
    }
    for &pack in check.packs.problems.keys() {
        let repaired = repair_pack(check, pack);
        done.push(
            repaired.unwrap_or_else(|error| left(&Area::Packs.path(&pack.to_string()), &error)),
        );
    }
    sync(backend, Area::Packs)?;
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
        if !matches!(area, Area::Index | Area::Tags) && still_damaged(check, area, name) {
            done.extend(move_away(backend, area, name)?);
        }
    }
    done.extend(repair_tags(check)?);
    index::rebuild(shared)?;
    shared.index.add(backend, &shared.config, Vec::new())?;
    done.push("rebuilt the index".into());
    Ok(done)
}

/// Whether a file is what a check found it to be. It was a while ago: by now another may have its name.
fn still_damaged(check: &Check<'_>, area: Area, name: &str) -> bool {
    let shared = check.shared;
    let looked_at = match area {
        Area::Snapshots => snapshots::read_through(shared, name, |_, _| Ok(())),
        Area::Annotations => refs::names_by_id(shared)
            .and_then(|snapshots| annotation::check_file(shared, name, &snapshots)),
        Area::Condemned => protect::read_condemned(&*shared.backend, name).map(drop),
        // What else has a name here is damaged by its name.
        _ => return true,
    };
    matches!(looked_at, Err(Error::Damaged { .. } | Error::Name(_)))
}

/// Moves tags away that name no snapshot.
fn repair_tags(check: &Check<'_>) -> Result<Vec<String>> {
    let (shared, backend) = (check.shared, &*check.shared.backend);
    let mut done = Vec::new();
    // Before the snapshots: who sets one has found its snapshot.
    let tags = refs::read_tags(backend)?;
    let mut snapshots = HashMap::new();
    for (name, opened) in refs::open_all(shared)? {
        match opened {
            Ok(snapshot) => drop(snapshots.insert(snapshot.id, name)),
            // It is whole as far as anybody knows, and any tag may be its own.
            Err(_) => return Ok(done),
        }
    }
    for (tag, named) in tags {
        let is_nobodys = match &named {
            Ok(named) => named.is_some_and(|id| !snapshots.contains_key(&id)),
            Err(error) => matches!(error, Error::Damaged { .. }),
        };
        // It may have been set anew meanwhile.
        let is_as_it_was = || refs::read_tag(backend, &tag).ok() == named.ok();
        if is_nobodys && is_as_it_was() {
            done.extend(move_away(backend, Area::Tags, &tag)?);
        }
    }
    Ok(done)
}

/// Takes a file out of service; tells so, unless it is gone. One of which no copy can be kept is left.
fn move_away(backend: &dyn Backend, area: Area, name: &str) -> Result<Option<String>> {
    let path = area.path(name);
    match move_file(backend, area, name) {
        Ok(()) => {
            sync(backend, area)?;
            Ok(Some(format!("moved {path} into damaged/")))
        }
        Err(gone) if gone.is_not_found() => Ok(None),
        Err(error) => Ok(Some(left(&path, &error))),
    }
}

fn move_file(backend: &dyn Backend, area: Area, name: &str) -> Result<()> {
    let file = backend
        .open(area, name)
        .map_err(Error::file(format!("read {}", area.path(name))))?;
    keep_copy(backend, &*file, &format!("{}-{name}", area.dir()))?;
    refs::remove_file(backend, area, name).map(drop)
}

fn sync(backend: &dyn Backend, area: Area) -> Result<()> {
    backend
        .sync(area)
        .map_err(Error::io(format!("sync {}", area.dir())))
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

/// Writes a pack anew from what is whole in it, and from other packs that hold the same chunks. It is durable when the area is synced.
fn repair_pack(check: &Check<'_>, id: FileId) -> Result<String> {
    let shared = check.shared;
    let (backend, config) = (&*shared.backend, &shared.config);
    let file = backend
        .open(Area::Packs, &id.to_string())
        .map_err(Error::file(format!("read packs/{id}")))?;
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

/// What is said of a file with which nothing was done.
fn left(path: &str, why: &Error) -> String {
    format!("left {path} as it is: {}", why.in_full())
}

/// Copies a damaged file to where somebody may look at it later. What was kept of it before stays; what the disk has lost is zeros.
///
/// # Errors
///
/// It has more than [`MAX_KEPT_BYTES`], or nothing of it can be read; the store cannot be written.
fn keep_copy(backend: &dyn Backend, file: &dyn ReadAt, name: &str) -> Result<()> {
    if file.size() > MAX_KEPT_BYTES {
        let what = format!("{name} is longer than anything of a store: move it away by hand");
        return Err(Error::Parameter(what));
    }
    let failed = || Error::io(format!("write {}", Area::Damaged.path(name)));
    let mut draft = backend.draft().map_err(failed())?;
    let (mut at, mut readable, mut piece) = (0, 0, vec![0; COPY_BYTES as usize]);
    while at < file.size() {
        let piece = &mut piece[..COPY_BYTES.min(file.size() - at) as usize];
        readable += read_readable(file, piece, at).map_err(Error::file(format!("read {name}")))?;
        draft.append(piece).map_err(failed())?;
        at += piece.len() as u64;
    }
    // Then it is rather the disk that is not there, and may be again.
    if readable == 0 && file.size() > 0 {
        let what = format!("nothing of {name} can be read: see to the disk, and repair again");
        return Err(Error::Parameter(what));
    }
    draft.sync().map_err(failed())?;
    let kept: HashSet<_> = backend
        .list(Area::Damaged)
        .map_err(Error::file("list what is damaged"))?
        .into_iter()
        .map(|entry| entry.name)
        .collect();
    let mut free = (1..).map(|number| format!("{name}.{number}"));
    let mut free = std::iter::once(name.to_owned())
        .chain(&mut free)
        .filter(|name| !kept.contains(name));
    let name = free.next().unwrap_or_else(|| name.to_owned());
    draft
        .publish(Area::Damaged, &name, Publish::New)
        .map_err(failed())?;
    backend.sync(Area::Damaged).map_err(failed())
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
