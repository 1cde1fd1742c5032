//! The files of layers that were merged: whether anything needs them still.

use std::{
    collections::{BTreeMap, BTreeSet},
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

    /// Bytes that it takes on the host.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn allocated_bytes(&self) -> Result<u64, Error> {
        self.layer.media.allocated_bytes()
    }

    /// The files of the layers that are one now, but for the topmost, in whose place that is. Its disk does not need them any
    /// more; snapshots of it may, and other disks.
    pub fn rest(&self) -> Vec<PathBuf> {
        let rest = self.merged_away().iter();
        rest.map(|layer| layer.path().to_owned()).collect()
    }

    /// Removes those of them that `removable` says may go, and that nobody stands on: no layer in their directory, and no disk
    /// elsewhere for which they have a second name, and that nobody has open.
    ///
    /// # Errors
    ///
    /// [`Error`] when a directory, or a layer in it, cannot be read; nothing is removed then.
    pub fn remove_rest(&self, removable: &dyn Fn(LayerId) -> bool) -> Result<Rest, Error> {
        let layers = self.merged_away();
        // Before it is looked who stands on them: nobody comes to from now on.
        let locked: Vec<bool> = layers.iter().map(|layer| alone(layer)).collect();
        let rest = self.remove_unneeded(&locked, removable);
        for layer in layers {
            // Whoever reads what was frozen of the disk before has them open.
            if let Err(error) = layer.media.lock(Lock::Shared) {
                tracing::debug!("a layer that was merged is not locked: {error}");
            }
        }
        rest
    }

    fn merged_away(&self) -> &[Arc<Layer>] {
        &self.parts[..self.parts.len().saturating_sub(1)]
    }

    fn remove_unneeded(
        &self,
        locked: &[bool],
        removable: &dyn Fn(LayerId) -> bool,
    ) -> Result<Rest, Error> {
        let layers = self.merged_away();
        let directories: BTreeSet<_> = layers.iter().map(|layer| layer.path().parent()).collect();
        let mut children = BTreeMap::new();
        for directory in directories.into_iter().flatten() {
            find_children(directory, self.layer.header.id, &mut children)?;
        }
        let mut rest = Rest::default();
        // From the top, for each is needed by those above it that stay.
        for (layer, locked) in layers.iter().zip(locked).rev() {
            let path = layer.path().to_owned();
            let id = layer.header.id;
            let stood_on = children.values().any(|parent| *parent == id);
            let free = *locked && !stood_on && removable(id);
            if free && layer.media.names()? == 1 && is(&path, layer)? {
                name::discard(&path);
                children.remove(&path);
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

/// Adds the layers of a directory, each with the id of its parent. `one` has the place of what was merged, and what has its id and lies
/// there under another name is that.
fn find_children(
    directory: &Path,
    one: LayerId,
    children: &mut BTreeMap<PathBuf, LayerId>,
) -> Result<(), Error> {
    let entries = std::fs::read_dir(directory).map_err(Error::io("look into", directory))?;
    for entry in entries {
        let path = entry.map_err(Error::io("look into", directory))?.path();
        if let Some(Header {
            id,
            parent: Parent::Layer { id: parent, .. },
            ..
        }) = header_of(&path)?
            && id != one
        {
            children.insert(path, parent);
        }
    }
    Ok(())
}

/// The header of the layer at `path`, if that is one. What may be one and cannot be read may stand on anything.
fn header_of(path: &Path) -> Result<Option<Header>, Error> {
    let kind = std::fs::symlink_metadata(path).map(|metadata| metadata.is_file());
    if matches!(kind, Ok(false)) {
        return Ok(None);
    }
    let layer = match Layer::open(path, false, Lock::Not) {
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(None),
        Err(Error::NotALayer { .. } | Error::NotAFile { .. }) => return Ok(None),
        layer => layer?,
    };
    Ok(Some(layer.header))
}
