//! A sealed layer that is not here, made of what somebody else has kept of it.

use std::{
    io::{self, ErrorKind},
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use crate::{
    Disk, LayerId, Rule,
    arrival::{Arrival, Origin, Pass, UNIT_BYTES},
    bits::Bits,
    chain::{Chain, Mode},
    create::{Draft, absolute, name_of, new_id},
    error::Error,
    header::{Header, Parent},
    layer::Layer,
    layout::{Geometry, SECTOR_BYTES},
    media::{Lock, sync_directory_of},
    name,
    seal::{Seal, is},
};

/// Brought before it is synced, in bytes: else what the host cannot write is known only at the end.
const SYNC_BYTES: u64 = if cfg!(test) { UNIT_BYTES } else { 128 << 20 };

/// A layer whose content comes from elsewhere. It stands on nothing. Disks can stand on it from the beginning: what is read of it comes
/// first. It gets its name, by which others find it, when all of it is here and durable. Dropped before, it is gone, and what was written to
/// disks on it is of use again once the layer was made anew.
#[derive(Debug)]
pub struct Rebuild {
    path: PathBuf,
    layer: Arc<Layer>,
    arrival: Arc<Arrival>,
    /// There until it has its name. Held by who syncs it, or uses somebody else's: a failure of a sync is told once, to whoever asks first.
    work: Mutex<Option<Work>>,
    /// Bytes that have come since it was synced last.
    unsynced: AtomicU64,
    finished: AtomicBool,
}

/// What a layer is that has no name yet.
#[derive(Debug)]
struct Work {
    seal: Seal,
    draft: Draft,
    /// A sync of its directory has failed: nobody knows what names are durable, and the next need not tell.
    unsure: bool,
}

impl Rebuild {
    /// Begins to make the layer `id` at `path`.
    ///
    /// # Errors
    ///
    /// [`Error`]; [`Error::Exists`] when there is anything at `path`, and of the kind
    /// [`StorageFull`](ErrorKind::StorageFull) where there is no room for what is to come.
    pub fn begin(
        path: &Path,
        id: LayerId,
        origin: Arc<dyn Origin>,
        rule: &Rule<'_>,
    ) -> Result<Self, Error> {
        let path = absolute(path)?;
        if !rule(&path) {
            return Err(Error::NotAllowed { path });
        }
        // Of those that others are at work on, one gets the name. What a crash has left of another is nobody's.
        name::sweep(&path);
        if path.symlink_metadata().is_ok() {
            return Err(Error::Exists { path });
        }
        let bytes = origin.bytes();
        let geometry = Geometry::of(bytes).ok_or(Error::Size(bytes))?;
        let header = Header {
            id,
            geometry,
            depth: 1,
            below: 0,
            parent: Parent::Nothing,
        };
        let mut bits = Bits::none(geometry);
        let mut own = |Range { start, end }: Range<u64>| {
            let end = end.min(bytes);
            bits.set(start / SECTOR_BYTES, end.div_ceil(SECTOR_BYTES));
        };
        let told = origin.each_data(&mut own);
        told.map_err(failed(&path))?;

        let draft = Draft::of_its_own(&path, &header)?;
        draft.lock(Lock::Shared)?;
        let mut layer = Layer::open(draft.path(), true, Lock::Shared)?;
        let needed = bits.count() * SECTOR_BYTES;
        has_room(&layer, needed).map_err(failed(&path))?;
        // So that what it owns is found as of any layer.
        bits.write(&layer.media, id)?;
        let file = layer.media.file().try_clone().map_err(failed(&path))?;
        let arrival = Arc::new(Arrival::new(origin, geometry, &bits, file));
        layer.media.arrives(Arc::clone(&arrival));
        layer.rename(&path);
        let layer = Arc::new(layer);
        let layers = vec![Arc::clone(&layer)];
        let work = Work {
            seal: Seal::new(layers, Arc::clone(&layer), draft.path().to_owned(), bits),
            draft,
            unsure: false,
        };
        Ok(Self {
            path,
            layer,
            arrival,
            work: Mutex::new(Some(work)),
            unsynced: AtomicU64::new(0),
            finished: AtomicBool::new(false),
        })
    }

    /// The absolute path that it gets.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A disk that begins as this layer is, as [`Disk::branch`] makes it. The layer has to get its name before others can open it.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn branch(&self, rule: &Rule<'_>) -> Result<Disk, Error> {
        let path = name::head_on(&self.path, new_id(&self.path)?)?;
        if !rule(&path) {
            return Err(Error::NotAllowed { path });
        }
        let on = &self.layer.header;
        let header = Header {
            id: new_id(&path)?,
            geometry: on.geometry,
            depth: on.depth + 1,
            below: on.depth,
            parent: name_of(&self.layer, &path),
        };
        Draft::write(&path, &path, &header)?.publish(&path)?;
        let head = Layer::open(&path, true, Lock::Alone)?;
        let layers = vec![Arc::clone(&self.layer), Arc::new(head)];
        Ok(self.disk(layers, Mode::Write)?.fleeting())
    }

    /// A disk that is this layer, to be read.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn read(&self) -> Result<Disk, Error> {
        self.disk(vec![Arc::clone(&self.layer)], Mode::Read)
    }

    fn disk(&self, layers: Vec<Arc<Layer>>, mode: Mode) -> Result<Disk, Error> {
        let bottom = None;
        Disk::of(Chain { bottom, layers }, &self.path, mode)
    }

    /// Has all of it come, and gives it its name; or uses the same layer of somebody else who was faster. It can be called again when it
    /// fails, and by several at once. What cannot be had does not keep the rest from coming.
    ///
    /// # Errors
    ///
    /// [`Error`]; of the kind [`Interrupted`](ErrorKind::Interrupted) once `wanted` says no, or it was given up, and
    /// [`Error::Exists`] when what has its name is something else.
    pub fn finish(&self, wanted: &dyn Fn() -> bool) -> Result<(), Error> {
        let mut pass = Pass::default();
        loop {
            if self.is_finished() || self.is_made_by_another()? {
                return Ok(());
            }
            if !wanted() {
                return Err(self.interrupted());
            }
            let Some(bytes) = self
                .arrival
                .bring_next(&mut pass)
                .map_err(failed(&self.path))?
            else {
                break;
            };
            let unsynced = self.unsynced.fetch_add(bytes, Ordering::Relaxed) + bytes;
            if unsynced >= SYNC_BYTES {
                self.unsynced.store(0, Ordering::Relaxed);
                self.sync()?;
            }
        }
        self.name()
    }

    fn sync(&self) -> Result<(), Error> {
        let held = self.work();
        if held.is_none() {
            return Ok(());
        }
        let synced = self.layer.media.sync();
        synced.inspect_err(|_| self.arrival.lose())
    }

    /// Makes durable what is all here, and gives it its name.
    fn name(&self) -> Result<(), Error> {
        let mut held = self.work();
        let Some(work) = &mut *held else {
            return match self.is_finished() {
                true => Ok(()),
                false => Err(self.interrupted()),
            };
        };
        if work.unsure || self.arrival.is_lost() {
            return Err(Error::damaged(&self.path, "an earlier sync of it failed"));
        }
        let sealed = work.seal.finish();
        if work.seal.has_failed() {
            self.arrival.lose();
        }
        sealed?;
        match work.draft.link(&self.path) {
            Err(Error::Exists { .. }) => self.adopt()?,
            linked => linked?,
        }
        self.is_named(&mut held)
    }

    /// Its name, or that of somebody else's, is there, and is made durable.
    fn is_named(&self, held: &mut Option<Work>) -> Result<(), Error> {
        let synced = sync_directory_of(&self.path);
        if let Some(work) = held {
            work.unsure = synced.is_err();
        }
        synced?;
        *held = None;
        self.finished.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether somebody else has made it, which is used from now on.
    fn is_made_by_another(&self) -> Result<bool, Error> {
        if self.path.symlink_metadata().is_err() {
            return Ok(false);
        }
        let mut held = self.work();
        let Some(work) = &*held else {
            return Ok(self.is_finished());
        };
        // By an earlier try, if it is its own.
        if work.unsure || is(&self.path, &self.layer)? {
            return Ok(false);
        }
        self.adopt()?;
        self.is_named(&mut held)?;
        Ok(true)
    }

    /// Uses what has its name, which must be the same layer.
    fn adopt(&self) -> Result<(), Error> {
        let theirs = Layer::open(&self.path, false, Lock::Shared)?;
        let same = theirs.header == self.layer.header
            && theirs.sealed()?
            && theirs.descriptor()?.is_some()
            && self.owned()?.are_those_of(&theirs.bits()?);
        if !same {
            let path = self.path.clone();
            return Err(Error::Exists { path });
        }
        self.layer.media.stand_in(theirs.media);
        self.arrival.end();
        Ok(())
    }

    fn owned(&self) -> Result<Bits, Error> {
        self.layer.bits()
    }

    fn work(&self) -> MutexGuard<'_, Option<Work>> {
        // It is put in and taken out whole.
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn interrupted(&self) -> Error {
        failed(&self.path)(ErrorKind::Interrupted.into())
    }

    /// Leaves nothing of it in its directory, if it has no name yet, which it does not get any more.
    pub fn give_up(&self) {
        *self.work() = None;
    }

    /// Whether it has its name.
    pub fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    /// Bytes that have come, and that there were to come in all.
    pub fn progress(&self) -> (u64, u64) {
        self.arrival.progress()
    }
}

/// Whether there is room for so many bytes where `layer` is, as far as its file system tells.
fn has_room(layer: &Layer, needed: u64) -> io::Result<()> {
    let free = layer.media.free_bytes().unwrap_or(u64::MAX);
    if free >= needed {
        return Ok(());
    }
    let text = format!(
        "it takes {needed} bytes, and {free} are free; make room, or choose another directory"
    );
    Err(io::Error::new(ErrorKind::StorageFull, text))
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error {
    Error::io("rebuild", path)
}

/// Makes the layer `id`, sealed, at `path`, of what `origin` has of it. It is durable when it gets its name, and whole.
///
/// # Errors
///
/// As [`Rebuild::begin`] and [`Rebuild::finish`].
pub fn rebuild(
    path: &Path,
    id: LayerId,
    origin: Arc<dyn Origin>,
    rule: &Rule<'_>,
) -> Result<(), Error> {
    Rebuild::begin(path, id, origin, rule)?.finish(&|| true)
}

#[cfg(test)]
mod tests;
