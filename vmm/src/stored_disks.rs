//! Disks that branch, in a store: what changed goes there with a snapshot, and what is not here comes from there.

use std::{
    io,
    path::{Path, PathBuf},
};

use branch_disk::{Disk, Error as DiskError, Frozen, Kind, LayerId, Part, Rule};
use snapshot::{Content, Piece, Saving, StoredDisk, Unpublished};

use crate::error::Error;

/// What a machine was last in a store.
#[derive(Clone, Debug)]
pub(crate) struct StoredAs {
    /// The snapshot's id there.
    pub(crate) id: String,
    /// By disk, the layer that it was, if it branches.
    pub(crate) layers: Vec<Option<LayerId>>,
}

/// A disk at a cut, and the layer that the machine's last snapshot has of it.
struct AtCut {
    disk: Disk,
    before: Option<LayerId>,
}

impl Content for AtCut {
    fn pieces(&self, parent: Option<u64>, unit: u64) -> io::Result<Vec<Piece>> {
        // Else it is another layer's that the parent has.
        let is_parents = |id: &LayerId| parent.is_some() && self.disk.bytes_at(*id) == parent;
        let before = self.before.filter(is_parents);
        let piece = |Part { len, kind }| match kind {
            Kind::Same => Piece::Kept(len),
            Kind::Zeros => Piece::Zeros(len),
            Kind::Data => Piece::Data(len),
        };
        Ok(self
            .disk
            .parts(before, unit)
            .into_iter()
            .map(piece)
            .collect())
    }

    fn read(&self, offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        // The last piece of a disk need not be whole chunks, but it is whole sectors.
        self.disk.read(offset, &mut buffer)
    }
}

/// Saves what the machine's disks were at a cut with the snapshot, if that has a place for them. Gives the layers that they were.
pub(crate) fn save(
    into: &mut Unpublished,
    disks: Vec<Option<Frozen>>,
    last: Option<&StoredAs>,
    saving: &Saving,
) -> Result<Vec<Option<LayerId>>, Error> {
    if !into.keeps_disks() {
        return Ok(Vec::new());
    }
    let mut layers = Vec::with_capacity(disks.len());
    for (number, frozen) in disks.into_iter().enumerate() {
        let Some(frozen) = frozen else {
            layers.push(None);
            continue;
        };
        let disk = frozen.open()?;
        layers.push(disk.id());
        let before = last.and_then(|last| *last.layers.get(number)?);
        into.write_disk(number, &AtCut { disk, before }, saving)?;
    }
    Ok(layers)
}

/// Makes the layer `id`, which was at `path`, in `directory`, of what the snapshot `of` has of it, unless it is there. Gives its path there.
///
/// A snapshot may come from anybody, so it does not say where files are made.
pub(crate) fn rebuild(
    path: &Path,
    id: LayerId,
    of: &str,
    content: &StoredDisk,
    directory: Option<&Path>,
    rule: &Rule<'_>,
) -> Result<PathBuf, Error> {
    let directory = directory.ok_or_else(|| Error::DiskNotHere {
        path: path.to_owned(),
    })?;
    let here = directory.join(branch_disk::rebuilt_name(path, id, of)?);
    if !crate::disks::is_there(&here) {
        let read = |offset, buffer: &mut [u8]| content.read(offset, buffer);
        match branch_disk::rebuild(&here, id, content.bytes(), read, rule) {
            Ok(copied) => tracing::info!(
                path = %here.display(),
                bytes = copied.data_bytes,
                "a disk was made as the snapshot has it"
            ),
            // Another machine of the snapshot was faster.
            Err(DiskError::Exists { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(here)
}
