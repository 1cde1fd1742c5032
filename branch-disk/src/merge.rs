//! Sealed layers that lie one on the other become one, while the disk is in use.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    bits::Bits,
    chain::{Bottom, whole_map},
    convert::BLOCK_BYTES,
    create::{Draft, link, reference},
    disk::Disk,
    error::Error,
    header::{Header, LayerId, Parent},
    layer::Layer,
    layout::SECTOR_BYTES,
    map::{Owner, Run},
    media::{Lock, Media, sync_directory_of},
    name,
    seal::{Seal, is},
};

/// Copied at a time, in bytes.
const PIECE_BYTES: u64 = 1 << 20;
/// Written before it is synced, in bytes: who is not wanted any more ends soon.
const SYNC_BYTES: u64 = 128 << 20;

/// Sealed layers that are to become one, which takes the place of the topmost of them: it has the id and the name of that, and
/// what stands on that stands on it.
#[derive(Debug)]
pub struct Merge {
    /// The disk's head.
    path: PathBuf,
    bottom: Option<Arc<Bottom>>,
    /// Those that are to be merged, and all below them.
    layers: Vec<Arc<Layer>>,
    /// How many are below them.
    below: usize,
    /// The seals of those, and of all below them, that may not be finished: nobody does for who gave the snapshot up that they ended for.
    seals: Vec<Arc<Seal>>,
}

/// Layers that are one.
#[derive(Debug)]
pub struct Merged {
    pub(crate) layer: Arc<Layer>,
    /// What it was made of, the lowest first.
    pub(crate) parts: Vec<Arc<Layer>>,
}

impl Disk {
    /// Its sealed layers from the one with the id `lowest` up to that with the id `topmost`, to be merged without holding this disk up.
    /// `None` when its chain has no two such layers, one above the other, or not all of them is here yet.
    pub fn merge(&self, lowest: LayerId, topmost: LayerId) -> Option<Merge> {
        let below_head = &self.layers()[..self.layers().len().saturating_sub(1)];
        let at = |id| below_head.iter().position(|layer| layer.header.id == id);
        let (lowest, topmost) = (at(lowest)?, at(topmost)?);
        let parts = below_head.get(lowest..=topmost)?;
        parts
            .iter()
            .all(|layer| layer.media.is_whole())
            .then_some(())?;
        let layers = &below_head[..=topmost];
        let is_theirs = |seal: &&Arc<Seal>| {
            let id = seal.reference().id;
            layers.iter().any(|layer| layer.header.id == id)
        };
        (lowest < topmost).then(|| Merge {
            path: self.path().to_owned(),
            bottom: self.bottom.clone(),
            layers: layers.to_vec(),
            below: lowest,
            seals: self.seals.iter().filter(is_theirs).cloned().collect(),
        })
    }

    /// Uses the one layer instead of those that it was made of. Gives whether it does: they may not be its own any more.
    /// Their files stay open for as long as `merged` is there: who has begun to read from them may go on until then.
    pub fn adopt(&mut self, merged: &Merged) -> bool {
        let Some(lowest) = merged.parts.first() else {
            return false;
        };
        let begin = |layer: &Arc<Layer>| Arc::ptr_eq(layer, lowest);
        let Some(first) = self.layers.iter().position(begin) else {
            return false;
        };
        let parts = first..first + merged.parts.len();
        let theirs = self.layers.get(parts.clone());
        let same = |theirs: &[Arc<Layer>]| {
            let mut both = theirs.iter().zip(&merged.parts);
            both.all(|(one, other)| Arc::ptr_eq(one, other))
        };
        if !theirs.is_some_and(same) {
            return false;
        }
        self.layers
            .splice(parts.clone(), [Arc::clone(&merged.layer)]);
        let one = (first + 1) as Owner;
        let fewer = (merged.parts.len() - 1) as Owner;
        self.map.renumber(|owner| match usize::from(owner) {
            below if below <= first => owner,
            part if part <= parts.end => one,
            _ => owner - fewer,
        });
        true
    }
}

impl Merge {
    /// What the layers that are to be merged take on the host, in bytes, the lowest first.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn allocated_bytes(&self) -> Result<Vec<u64>, Error> {
        allocated(&self.layers[self.below..])
    }

    /// Makes the one layer, and has it take the place of the topmost. It is durable then. The disk may be in use meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error`]; of the kind [`ErrorKind::StorageFull`] where there is no room for twice what the layers take, and [`ErrorKind::Interrupted`] once `wanted` says no. The disk is as it was then, for whoever opens it.
    pub fn write(self, wanted: &dyn Fn() -> bool) -> Result<Merged, Error> {
        let Self {
            path,
            bottom,
            layers,
            below,
            seals,
        } = self;
        let (under, parts) = layers.split_at(below);
        let (Some(lowest), Some(topmost)) = (parts.first(), parts.last()) else {
            return Err(Error::damaged(&path, "it has no layers"));
        };
        let place = topmost.path().to_owned();
        for seal in seals {
            still(wanted, &place)?;
            seal.finish()?;
        }
        if !topmost.sealed()? || topmost.descriptor()?.is_none() {
            return Err(Error::NotSealed { path: place });
        }
        let header = Header {
            depth: topmost.header.depth,
            below: lowest.header.below,
            id: topmost.header.id,
            geometry: topmost.header.geometry,
            parent: parent_of(lowest, bottom.as_deref(), under.last(), &place),
        };
        // As much again is left for what the disk is written to meanwhile.
        let needed: u64 = allocated(parts)?.iter().sum();
        if topmost.media.free_bytes()? < needed.saturating_mul(2) {
            let full = Error::io("merge layers into", &place);
            return Err(full(ErrorKind::StorageFull.into()));
        }
        // Called after the head, so that what a crash leaves goes when its next is made, or here.
        let own = path.file_name();
        let own = own.ok_or_else(|| Error::Path { path: path.clone() })?;
        let own = place.with_file_name(own);
        name::sweep(&own);
        let draft = Draft::write(&place, &own, &header)?;
        draft.lock(Lock::Shared)?;
        let layer = Arc::new(Layer::open(draft.path(), true, Lock::Not)?);
        layer.media.belong_as(&topmost.media)?;
        let bits = copy(&layers, below, &layer, wanted)?;
        still(wanted, &place)?;
        let chain = [under, &[Arc::clone(&layer)]].concat();
        Seal::new(chain, layer, draft.path().to_owned(), bits).finish()?;
        // Whatever somebody has put in its place is not to be replaced.
        if !is(&place, topmost)? {
            return Err(Error::OtherLayer {
                path: place,
                expected: header.id,
            });
        }
        let media = draft.replace(&place).map_err(|(error, _)| error)?;
        keep_on(&media, &place, &own, header.id);
        sync_directory_of(&place)?;
        Ok(Merged {
            layer: Arc::new(Layer::new(media, header)),
            parts: parts.to_vec(),
        })
    }
}

/// Gives the second names that the layer at `place` had to what is in its place now: else they keep what was there before.
fn keep_on(media: &Media, place: &Path, head: &Path, id: LayerId) {
    let draft = name::draft(head, id);
    for kept in name::all_kept(place) {
        let renamed = link(media, &draft)
            .map_err(Error::errno("name", &draft))
            .and_then(|()| std::fs::rename(&draft, &kept).map_err(Error::io("name", &kept)));
        if let Err(error) = renamed {
            tracing::debug!(
                "a second name is that of what was merged: {}",
                error.with_cause()
            );
        }
        // It is there still if that failed, and if the second name was the one's already.
        let _ = std::fs::remove_file(&draft);
    }
}

fn allocated(layers: &[Arc<Layer>]) -> Result<Vec<u64>, Error> {
    let layers = layers.iter();
    layers.map(|layer| layer.media.allocated_bytes()).collect()
}

/// What `lowest` stands on, as a layer at `place` names it.
fn parent_of(
    lowest: &Layer,
    bottom: Option<&Bottom>,
    under: Option<&Arc<Layer>>,
    place: &Path,
) -> Parent {
    let mut parent = lowest.header.parent.clone();
    match (&mut parent, under, bottom) {
        (Parent::Layer { path, .. }, Some(under), _) => *path = reference(place, under.path()),
        (Parent::Raw(base), _, Some(bottom)) => base.path = reference(place, bottom.media.path()),
        _ => {}
    }
    parent
}

/// Copies what the layers from `below` on have to `to`, and gives what that owns then.
fn copy(
    layers: &[Arc<Layer>],
    below: usize,
    to: &Layer,
    wanted: &dyn Fn() -> bool,
) -> Result<Bits, Error> {
    let geometry = to.header.geometry;
    let mut bits = Bits::none(geometry);
    let mut copy = Copy {
        to,
        wanted,
        buffer: vec![0; PIECE_BYTES as usize],
        unsynced: 0,
    };
    for run in whole_map(layers)?.runs(0, geometry.sectors()) {
        let owner = usize::from(run.owner).checked_sub(1);
        let from = owner.filter(|index| *index >= below);
        if let Some(from) = from.and_then(|index| layers.get(index)) {
            bits.set(run.start, run.end);
            copy.run(from, run)?;
        }
    }
    Ok(bits)
}

/// Copying to one layer.
struct Copy<'a> {
    to: &'a Layer,
    wanted: &'a dyn Fn() -> bool,
    buffer: Vec<u8>,
    /// Bytes that were written since the last sync.
    unsynced: u64,
}

impl Copy<'_> {
    /// Copies what `from` has of `run`. Zeros are holes.
    fn run(&mut self, from: &Layer, run: Run) -> Result<(), Error> {
        let [theirs, ours] = [from, self.to].map(|layer| layer.header.geometry.data_at());
        let end = run.end * SECTOR_BYTES;
        let mut at = run.start * SECTOR_BYTES;
        while let Some(data) = from.media.next_data(theirs + at, theirs + end)? {
            still(self.wanted, self.to.path())?;
            at = (data - theirs) / SECTOR_BYTES * SECTOR_BYTES;
            let len = PIECE_BYTES.min(end - at);
            let piece = &mut self.buffer[..len as usize];
            from.media
                .fill(&mut &mut *piece, theirs + at, len)
                .map_err(Error::io("read", from.path()))?;
            for block in piece.chunks(BLOCK_BYTES) {
                if block.iter().any(|byte| *byte != 0) {
                    self.to
                        .media
                        .drain(&mut &*block, ours + at)
                        .map_err(Error::io("write to", self.to.path()))?;
                    self.unsynced += block.len() as u64;
                }
                at += block.len() as u64;
            }
            if self.unsynced >= SYNC_BYTES {
                self.to.media.sync()?;
                self.unsynced = 0;
            }
        }
        Ok(())
    }
}

/// Fails if it is not wanted any more.
fn still(wanted: &dyn Fn() -> bool, path: &Path) -> Result<(), Error> {
    match wanted() {
        true => Ok(()),
        false => Err(Error::io("merge layers into", path)(
            ErrorKind::Interrupted.into(),
        )),
    }
}
