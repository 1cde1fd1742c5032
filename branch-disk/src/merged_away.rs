//! The files of layers that were merged: whether anything needs them still.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    error::Error,
    header::{Header, LayerId, Parent},
    layer::Layer,
    media::Lock,
    merge::Merged,
    name,
    seal::is,
};

/// What became of the files of merged layers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rest {
    /// Those that were removed.
    pub removed: Vec<PathBuf>,
    /// Those that something stands on or has open, or that have a second name.
    pub kept: Vec<PathBuf>,
}

impl Merged {
    /// The layer.
    pub fn path(&self) -> &Path {
        self.layer.path()
    }

    /// The files of the layers that are one now, but for the topmost, in whose place that is. Its disk does not need them any
    /// more; snapshots of it may, and other disks.
    pub fn rest(&self) -> Vec<PathBuf> {
        let rest = self.merged_away().iter();
        rest.map(|layer| layer.path().to_owned()).collect()
    }

    /// Removes those of them that lie beside the one layer, and that nobody stands on: no layer in that directory, and no disk
    /// elsewhere, for which they have a second name; and that nobody has open.
    ///
    /// # Errors
    ///
    /// [`Error`] when the directory, or a layer in it, cannot be read; nothing is removed then.
    pub fn remove_rest(&self) -> Result<Rest, Error> {
        let layers = self.merged_away();
        let Some(directory) = self.path().parent() else {
            return Ok(Rest::default());
        };
        let mut children = Children::default();
        children.find(directory, self)?;
        // Nobody comes to stand on them from here on, so that this is not for long: only new names are looked at.
        let locked: Vec<bool> = layers.iter().map(|layer| alone(layer)).collect();
        let found = children.find(directory, self);
        let rest = found.and_then(|()| self.remove_unneeded(children, &locked));
        for layer in layers {
            // Whoever reads what was frozen of the disk before has them open.
            if let Err(error) = layer.media.lock(Lock::Shared) {
                tracing::debug!(
                    "a layer that was merged is not locked: {}",
                    error.with_cause()
                );
            }
        }
        rest
    }

    fn merged_away(&self) -> &[Arc<Layer>] {
        &self.parts[..self.parts.len().saturating_sub(1)]
    }

    fn remove_unneeded(&self, mut children: Children, locked: &[bool]) -> Result<Rest, Error> {
        // Somebody else may have merged the same, and stand on what is to be removed.
        let in_place = is(self.path(), &self.layer)?;
        let mut rest = Rest::default();
        // From the top, for each is needed by those above it that stay.
        for (layer, locked) in self.merged_away().iter().zip(locked).rev() {
            let path = layer.path().to_owned();
            let stays = children.stand_on(layer.header.id) || children.keep(&path);
            let free = *locked && in_place && !stays;
            let beside = path.parent() == self.path().parent();
            if free && beside && layer.media.names()? == 1 && is(&path, layer)? {
                name::discard(&path);
                children.forget(&path);
                rest.removed.push(path);
            } else {
                rest.kept.push(path);
            }
        }
        Ok(rest)
    }
}

/// Whether nobody else has it open; it is locked then.
fn alone(layer: &Layer) -> bool {
    layer.media.lock(Lock::Alone).is_ok()
}

/// The files of a directory, each with the id of the layer that it stands on.
#[derive(Default)]
struct Children(BTreeMap<PathBuf, Option<LayerId>>);

impl Children {
    /// Adds those of a directory that are not known yet. In the place of the topmost layer is what was merged; a second name of it may
    /// have what was there before.
    fn find(&mut self, directory: &Path, merged: &Merged) -> Result<(), Error> {
        let entries = std::fs::read_dir(directory).map_err(Error::io("look into", directory))?;
        for entry in entries {
            let path = entry.map_err(Error::io("look into", directory))?.path();
            if self.0.contains_key(&path) {
                continue;
            }
            let header = header_of(&path)?;
            let header = header.filter(|_| !name::is_kept(&path, merged.path()));
            let parent = header.and_then(|header| match header.parent {
                Parent::Layer { id, .. } => Some(id),
                Parent::Nothing | Parent::Raw(_) => None,
            });
            self.0.insert(path, parent);
        }
        Ok(())
    }

    fn stand_on(&self, id: LayerId) -> bool {
        self.0.values().any(|parent| *parent == Some(id))
    }

    /// Whether a disk elsewhere has had the layer at `path` stay. Its second name may be another file's by now.
    fn keep(&self, path: &Path) -> bool {
        self.0.keys().any(|name| name::is_kept(name, path))
    }

    fn forget(&mut self, path: &Path) {
        self.0.remove(path);
    }
}

/// The header of the layer at `path`, if that is one. What may be one and cannot be read may stand on anything.
fn header_of(path: &Path) -> Result<Option<Header>, Error> {
    let kind = std::fs::symlink_metadata(path).map(|metadata| metadata.is_file());
    if matches!(kind, Ok(false)) {
        return Ok(None);
    }
    match Layer::open(path, false, Lock::Not) {
        Ok(layer) => Ok(Some(layer.header)),
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        Err(Error::NotALayer { .. } | Error::NotAFile { .. }) => Ok(None),
        // The guest of a raw image can write anything into it.
        Err(Error::Damaged { .. }) if !name::is_of_a_layer(path) => Ok(None),
        Err(error) => Err(error),
    }
}
