//! Disks that branch, in a store: what changed goes there with a snapshot, and what is not here comes from there.

use std::{
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use branch_disk::{Disk, Error as DiskError, Frozen, Kind, LayerId, Origin, Part, Rebuild, Rule};
use snapshot::{Content, Piece, Saving, StoredDisk, Unpublished};

use crate::{arriving_disks, disks, error::Error};

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

/// A layer that a snapshot has.
pub(crate) enum Had {
    /// It is at this path.
    Here(PathBuf),
    /// It comes.
    Comes(Arc<Rebuild>),
}

/// Has the layers of a snapshot be here.
pub(crate) struct Rebuilding<'a> {
    /// The snapshot's id.
    pub(crate) of: &'a str,
    /// Where they are made: a snapshot may come from anybody, so it does not say where files are.
    pub(crate) directory: Option<&'a Path>,
    pub(crate) rule: &'a Rule<'a>,
    /// Whether they may come while their machine runs.
    pub(crate) on_demand: bool,
}

impl Rebuilding<'_> {
    /// Has the layer `id`, which was at `path`, be in the directory, unless it is there, or begins to.
    pub(crate) fn have(&self, path: &Path, id: LayerId, content: StoredDisk) -> Result<Had, Error> {
        let directory = self.directory.ok_or_else(|| Error::DiskNotHere {
            path: path.to_owned(),
        })?;
        let here = directory.join(branch_disk::rebuilt_name(path, id, self.of)?);
        if disks::is_there(&here) {
            return Ok(Had::Here(here));
        }
        let begun = Rebuild::begin(&here, id, Arc::new(Kept::new(content)), self.rule);
        let rebuild = match begun {
            Ok(rebuild) => rebuild,
            // Another machine of the snapshot was faster.
            Err(DiskError::Exists { .. }) => return Ok(Had::Here(here)),
            Err(error) => return Err(error.into()),
        };
        if self.on_demand {
            return Ok(Had::Comes(Arc::new(rebuild)));
        }
        arriving_disks::finish(&rebuild, &|| true)?;
        let (_, bytes) = rebuild.progress();
        tracing::info!(path = %here.display(), bytes, "a disk was made as the snapshot has it");
        Ok(Had::Here(here))
    }
}

/// What a store has of a disk.
struct Kept {
    disk: StoredDisk,
    /// When it was last looked at anew.
    refreshed: Mutex<Instant>,
}

/// How often that is done at most: what has been decoded is gone then, also that of memory.
const REFRESH_INTERVAL: Duration = Duration::from_millis(500);

impl Kept {
    fn new(disk: StoredDisk) -> Self {
        Self {
            disk,
            refreshed: Mutex::new(Instant::now()),
        }
    }

    /// What could not be read may be repaired, or be there again, when it is asked for once more.
    fn refresh(&self) {
        let mut refreshed = self
            .refreshed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if refreshed.elapsed() >= REFRESH_INTERVAL {
            *refreshed = Instant::now();
            self.disk.refresh();
        }
    }
}

impl Origin for Kept {
    fn bytes(&self) -> u64 {
        self.disk.bytes()
    }

    fn each_data(&self, found: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        self.disk.each_data(found)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let read = self.disk.read(offset, buffer);
        read.inspect_err(|_| self.refresh())
    }
}
