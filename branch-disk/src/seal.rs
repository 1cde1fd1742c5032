//! The end of one head and the beginning of the next.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::io::Errno;

use crate::{
    bits::Bits,
    chain::whole_map,
    create::{Draft, has_room_above, link, new_id, reference},
    error::Error,
    header::{Header, LayerId, Parent},
    layer::Layer,
    layout::Geometry,
    media::{Directory, Lock, sync_directory_of},
    name, stored_map,
};

/// A sealed layer: where it is, and which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerRef {
    /// Absolute path.
    pub path: PathBuf,
    /// Its id.
    pub id: LayerId,
}

/// A head, from which the next can be made while it is in use.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) path: PathBuf,
    pub(crate) layers: Vec<Arc<Layer>>,
    /// Of the next head.
    pub(crate) geometry: Geometry,
}

/// The next head, ready and durable, but without its name. Dropped, it is removed.
#[derive(Debug)]
pub struct Next {
    pub(crate) draft: Option<Draft>,
    pub(crate) header: Header,
    /// What stays below it.
    pub(crate) layers: Vec<Arc<Layer>>,
    /// The name that the present head has been given besides its own.
    pub(crate) sealed: PathBuf,
}

impl Plan {
    /// The same with a disk of `bytes` from the next head on. What is new of it reads as zeros.
    ///
    /// # Errors
    ///
    /// [`Error::Smaller`], [`Error::Size`].
    pub fn grown_to(self, bytes: u64) -> Result<Self, Error> {
        let geometry = Geometry::of(bytes).ok_or(Error::Size(bytes))?;
        let now = self.geometry.bytes();
        if bytes < now {
            let path = self.path;
            return Err(Error::Smaller { path, bytes, now });
        }
        Ok(Self { geometry, ..self })
    }

    /// Makes the next head. This syncs files; the disk may be in use meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error`]; nothing has changed then.
    pub fn prepare(self) -> Result<Next, Error> {
        let Self {
            path,
            layers,
            geometry,
        } = self;
        let Some(head) = layers.last() else {
            return Err(Error::damaged(&path, "it has no layers"));
        };
        has_room_above(&layers, &path)?;
        name::sweep(&path);
        let sealed = name::sealed(&path, head.header.id)?;
        match link(&head.media, &sealed) {
            Ok(()) => {}
            // From a seal that did not come about.
            Err(Errno::EXIST) if is(&sealed, head)? => {}
            Err(Errno::EXIST) => return Err(Error::Exists { path: sealed }),
            Err(errno) => return Err(Error::errno("name", &sealed)(errno)),
        }
        let parent = Parent::Layer {
            path: sealed.file_name().unwrap_or_default().into(),
            id: head.header.id,
            bytes: head.header.geometry.bytes(),
        };
        let mut next = Next {
            draft: None,
            header: Header {
                id: new_id(&path)?,
                depth: head.header.depth + 1,
                below: head.header.depth,
                geometry,
                parent,
            },
            layers,
            sealed,
        };
        let head = next.layers.last().map(|head| &head.media);
        next.draft = Some(match head {
            Some(head) => Draft::after(head, &path, &next.header)?,
            None => Draft::write(&path, &path, &next.header)?,
        });
        sync_directory_of(&path)?;
        Ok(next)
    }
}

impl Next {
    /// The layer that ends, as the parent of a layer at `path`, and its depth.
    pub(crate) fn as_parent_of(&self, path: &Path) -> (Parent, u32) {
        let mut parent = self.header.parent.clone();
        if let Parent::Layer { path: named, .. } = &mut parent {
            *named = reference(path, &self.sealed);
        }
        (parent, self.header.below)
    }
}

impl Drop for Next {
    fn drop(&mut self) {
        if self.draft.is_some() {
            name::discard(&self.sealed);
        }
    }
}

/// Whether what is at `path` is the file of `layer`.
pub(crate) fn is(path: &Path, layer: &Layer) -> Result<bool, Error> {
    let found = std::fs::symlink_metadata(path).map_err(Error::io("look at", path))?;
    Ok((found.dev(), found.ino()) == layer.media.identity()?)
}

/// A layer that is being sealed.
#[derive(Debug)]
pub(crate) struct Seal {
    /// The sealed layer, the last, and what is below it. It can be written to.
    layers: Vec<Arc<Layer>>,
    sealed: Arc<Layer>,
    path: PathBuf,
    /// What it owns; `None` when it cannot be told any more what of it is durable.
    bits: Mutex<Option<Bits>>,
    durable: AtomicBool,
    finished: AtomicBool,
    /// Held by who finishes it.
    finishing: Mutex<()>,
}

impl Seal {
    /// Of the last of `layers`, which now has the name `path` and owns `bits`.
    pub(crate) fn new(
        layers: Vec<Arc<Layer>>,
        sealed: Arc<Layer>,
        path: PathBuf,
        bits: Bits,
    ) -> Self {
        Self {
            layers,
            sealed,
            path,
            bits: Mutex::new(Some(bits)),
            durable: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            finishing: Mutex::new(()),
        }
    }

    /// Of a layer that a crash left without a seal, or without a map.
    pub(crate) fn resume(layers: &[Arc<Layer>]) -> Result<Self, Error> {
        let Some(layer) = layers.last() else {
            return Err(Error::damaged(Path::new("/"), "it has no layers"));
        };
        // The locks are held already.
        let writable = Layer::open(layer.path(), true, Lock::Not)?;
        let bits = writable.bits()?;
        let sealed = Arc::new(writable);
        let path = layer.path().to_owned();
        Ok(Self::new(layers.to_vec(), sealed, path, bits))
    }

    pub(crate) fn reference(&self) -> LayerRef {
        LayerRef {
            path: self.path.clone(),
            id: self.sealed.header.id,
        }
    }

    pub(crate) fn is_durable(&self) -> bool {
        self.durable.load(Ordering::Acquire)
    }

    /// Waits for nobody, as a guest may be waiting for this.
    pub(crate) fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    /// Whether a sync of it has failed.
    pub(crate) fn has_failed(&self) -> bool {
        lock(&self.bits).is_none()
    }

    /// Makes everything that the layer owns durable, and that it is sealed. It can be tried again, unless a sync failed.
    pub(crate) fn make_durable(&self) -> Result<(), Error> {
        if self.is_durable() {
            return Ok(());
        }
        let mut held = lock(&self.bits);
        if self.is_durable() {
            return Ok(());
        }
        let Some(bits) = &mut *held else {
            return Err(Error::damaged(&self.path, "an earlier sync of it failed"));
        };
        let media = &self.sealed.media;
        let directory = Directory::of(&self.path)?;
        // The next head's name, before this one's seal.
        let mut synced = media.sync().and_then(|()| directory.sync());
        bits.mend();
        if synced.is_ok() && bits.is_dirty() {
            bits.write(media, self.sealed.header.id)?;
            // A seal says that the bitmap is whole: a page that is torn under one is damage, and else what a crash has left.
            synced = media.sync();
        }
        if synced.is_ok() {
            self.sealed.write_seal(media)?;
            synced = media.sync();
        }
        if synced.is_ok() {
            self.durable.store(true, Ordering::Release);
        } else {
            // Nobody knows what is durable, and the next sync need not tell.
            *held = None;
        }
        synced
    }

    /// As [`Seal::make_durable`]; then gives the layer its map, so that others can stand on it.
    pub(crate) fn finish(&self) -> Result<(), Error> {
        self.make_durable()?;
        let _finishing = lock(&self.finishing);
        if !self.is_finished() {
            let media = &self.sealed.media;
            let map = whole_map(&self.layers)?;
            let descriptor = stored_map::write(&self.layers, media, &map)?;
            media.sync()?;
            self.sealed.write_descriptor(media, descriptor)?;
            media.sync()?;
            media.lock(Lock::Shared)?;
            self.finished.store(true, Ordering::Release);
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What it guards is either whole or gone.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An instant of a disk, at which a layer ended. Others can stand on that layer once this is finished.
#[derive(Debug)]
#[must_use = "the layer is of use once this is finished"]
pub struct Cut {
    pub(crate) layer: LayerRef,
    /// Its seal, after those before it that are not finished.
    pub(crate) seals: Vec<Arc<Seal>>,
}

impl Cut {
    /// The layer that ended; not to be used before [`Cut::finish`] has returned.
    pub fn layer(&self) -> &LayerRef {
        &self.layer
    }

    /// Makes the layer durable and writes its map. The disk may be in use meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error`]; the disk goes on, but nobody should stand on the layer. It can be tried again.
    pub fn finish(self) -> Result<LayerRef, Error> {
        for seal in &self.seals {
            seal.finish()?;
        }
        Ok(self.layer)
    }
}
