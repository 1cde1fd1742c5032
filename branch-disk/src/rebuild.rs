//! A sealed layer that is not here, made of what somebody else has kept of it.

use std::{
    io::{self, ErrorKind},
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    Disk, LayerId, Rule,
    arrival::{Arrival, Origin},
    bits::Bits,
    chain::{Chain, Mode},
    create::{Draft, absolute, name_of, new_id},
    error::Error,
    header::{Header, Parent},
    layer::Layer,
    layout::{Geometry, SECTOR_BYTES},
    media::{Lock, sync_directory_of},
    name,
    seal::Seal,
};

/// A layer whose content comes from elsewhere. It stands on nothing. Disks can stand on it from the beginning: what is read of it comes
/// first. It gets its name, by which others find it, when all of it is here and durable. Dropped before, it is gone, and what was written to
/// disks on it is of use again once the layer was made anew.
#[derive(Debug)]
pub struct Rebuild {
    path: PathBuf,
    layer: Arc<Layer>,
    arrival: Arc<Arrival>,
    seal: Seal,
    /// There until the layer has its name.
    draft: Mutex<Option<Draft>>,
    finished: AtomicBool,
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
        origin: Box<dyn Origin>,
        rule: &Rule<'_>,
    ) -> Result<Self, Error> {
        let path = absolute(path)?;
        if !rule(&path) {
            return Err(Error::NotAllowed { path });
        }
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
        // Of those that others are at work on, one gets the name. What a crash has left of another is nobody's.
        name::sweep(&path);
        let draft = Draft::of_its_own(&path, &header)?;
        draft.lock(Lock::Shared)?;
        let mut layer = Layer::open(draft.path(), true, Lock::Shared)?;
        let file = layer.media.file().try_clone().map_err(failed(&path))?;
        let arrival = Arc::new(Arrival::new(origin, geometry, &bits, file));
        let (_, total) = arrival.progress();
        if layer.media.free_bytes()? < total {
            return Err(failed(&path)(ErrorKind::StorageFull.into()));
        }
        // So that what it owns is found as of any layer.
        bits.write(&layer.media, id)?;
        layer.media.arrives(Arc::clone(&arrival));
        layer.rename(&path);
        let layer = Arc::new(layer);
        let layers = vec![Arc::clone(&layer)];
        Ok(Self {
            seal: Seal::new(layers, Arc::clone(&layer), draft.path().to_owned(), bits),
            path,
            layer,
            arrival,
            draft: Mutex::new(Some(draft)),
            finished: AtomicBool::new(false),
        })
    }

    /// The absolute path that it gets.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which layer it is.
    pub fn id(&self) -> LayerId {
        self.layer.header.id
    }

    /// A disk that begins as this layer is, as [`Disk::branch`] makes it. The layer has to get its name before others can open it.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn branch(&self) -> Result<Disk, Error> {
        let path = name::head_on(&self.path, new_id(&self.path)?)?;
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

    /// Has all of it come, and gives it its name. It can be called again when it fails, and by several at once.
    ///
    /// # Errors
    ///
    /// [`Error`]; of the kind [`Interrupted`](ErrorKind::Interrupted) once `wanted` says no.
    pub fn finish(&self, wanted: &dyn Fn() -> bool) -> Result<(), Error> {
        let all = self.arrival.bring_all(wanted);
        all.map_err(failed(&self.path))?;
        let mut draft = self.draft.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(whole) = &*draft else {
            return match self.is_finished() {
                true => Ok(()),
                false => Err(failed(&self.path)(ErrorKind::Interrupted.into())),
            };
        };
        self.seal.finish()?;
        match whole.link(&self.path) {
            // Somebody else was faster, with the same.
            Ok(()) | Err(Error::Exists { .. }) => {}
            Err(error) => return Err(error),
        }
        sync_directory_of(&self.path)?;
        *draft = None;
        self.finished.store(true, Ordering::Release);
        Ok(())
    }

    /// Leaves nothing of it in its directory, if it has no name yet, which it does not get any more.
    pub fn give_up(&self) {
        *self.draft.lock().unwrap_or_else(PoisonError::into_inner) = None;
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
    origin: Box<dyn Origin>,
    rule: &Rule<'_>,
) -> Result<(), Error> {
    Rebuild::begin(path, id, origin, rule)?.finish(&|| true)
}

#[cfg(test)]
mod tests;
