//! A machine's disks, from the outside: opened for it, and cut when it is saved.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use branch_disk::{Cut, Disk, LayerId, LayerRef, Mode, Next};
use control::{Confinement, DiskConfig, DiskFormat};
use devices::virtio::block::SharedDisk;

use crate::{error::Error, state::DiskState};

/// A disk of a machine.
#[derive(Clone)]
pub(crate) struct AttachedDisk {
    pub(crate) config: DiskConfig,
    /// There if it branches; a raw image is opened by its device.
    pub(crate) branch: Option<SharedDisk>,
}

/// What ended of each disk at a cut, in their order; nothing of those that do not branch.
pub(crate) struct Cuts(Vec<Option<Cut>>);

/// The next heads of disks, made before the machine is held.
pub(crate) struct Prepared(Vec<Option<Next>>);

/// Opens the disks of a machine that boots.
pub(crate) fn attach(
    configs: &[DiskConfig],
    confinement: Option<&Confinement>,
) -> Result<Vec<AttachedDisk>, Error> {
    let attach = |config: &DiskConfig| {
        let branch = match config.format {
            DiskFormat::Raw => None,
            DiskFormat::Branch => Some(open(config, confinement)?),
        };
        Ok(AttachedDisk {
            config: config.clone(),
            branch,
        })
    };
    configs.iter().map(attach).collect()
}

/// Opens the disks of a machine that goes on. What branches goes on in a head of its own, so that any number of machines can
/// go on from one snapshot.
pub(crate) fn reattach(
    states: &[DiskState],
    confinement: Option<&Confinement>,
) -> Result<Vec<AttachedDisk>, Error> {
    states
        .iter()
        .map(|state| {
            let impossible = || Error::DiskState {
                path: state.path.clone(),
            };
            let mut config = state.config().ok_or_else(impossible)?;
            let layer = state.layer().map_err(|()| impossible())?;
            // One that is not there is refused when it is opened.
            if DiskState::of(&config).is_ok_and(|now| state.changed_since(&now)) {
                return Err(Error::DiskChanged {
                    path: state.path.clone(),
                });
            }
            let branch = match layer {
                None => None,
                Some(id) if config.read_only => {
                    let disk = open(&config, confinement)?;
                    if lock(&disk).id() != Some(id) {
                        return Err(Error::DiskChanged {
                            path: state.path.clone(),
                        });
                    }
                    Some(disk)
                }
                Some(id) => {
                    let rule = |path: &Path| allows(confinement, path);
                    let disk = Disk::branch(&config.path, Some(id), &rule)?;
                    config.path = disk.path().to_owned();
                    Some(Arc::new(Mutex::new(disk)))
                }
            };
            Ok(AttachedDisk { config, branch })
        })
        .collect()
}

fn open(config: &DiskConfig, confinement: Option<&Confinement>) -> Result<SharedDisk, Error> {
    let mode = if config.read_only {
        Mode::Read
    } else {
        Mode::Write
    };
    let rule = |path: &Path| allows(confinement, path);
    let disk = Disk::open(&config.path, mode, &rule)?;
    Ok(Arc::new(Mutex::new(disk)))
}

/// Whether a machine may have the file at this canonical path as a part of a disk.
pub(crate) fn allows(confinement: Option<&Confinement>, path: &Path) -> bool {
    confinement.is_none_or(|confinement| {
        let mut allowed = confinement.disks.iter();
        allowed.any(|allowed| path.starts_with(allowed))
    })
}

/// Makes the next heads of those that branch. This syncs files, so that a cut need not.
pub(crate) fn prepare(disks: &[AttachedDisk]) -> Result<Prepared, Error> {
    let prepare = |disk: &AttachedDisk| {
        let branch = disk.branch.as_ref().filter(|_| !disk.config.read_only);
        let plan = branch.map(|branch| lock(branch).plan());
        plan.map(|plan| plan.prepare()).transpose()
    };
    let prepared = disks.iter().map(prepare).collect::<Result<_, _>>();
    Ok(Prepared(prepared?))
}

impl Prepared {
    /// Ends the heads of `disks`, the same as were prepared; the machine is held. When this fails, some may have ended, which
    /// does no harm.
    pub(crate) fn cut(self, disks: &[AttachedDisk]) -> Result<Cuts, Error> {
        let both = self.0.into_iter().zip(disks);
        let cuts = both.map(|(next, disk)| match (next, &disk.branch) {
            (Some(next), Some(branch)) => lock(branch).cut(next).map(Some),
            _ => Ok(None),
        });
        Ok(Cuts(cuts.collect::<Result<_, _>>()?))
    }
}

impl Cuts {
    /// What ended of the disk at `index`.
    pub(crate) fn layer(&self, index: usize) -> Option<&LayerRef> {
        self.0.get(index)?.as_ref().map(Cut::layer)
    }

    /// Makes durable what ended; the machine may run meanwhile.
    pub(crate) fn finish(self) -> Result<(), Error> {
        for cut in self.0.into_iter().flatten() {
            cut.finish()?;
        }
        Ok(())
    }
}

/// The raw images that are written to.
pub(crate) fn writable_images(disks: &[AttachedDisk]) -> Vec<PathBuf> {
    let images = disks.iter().filter(|disk| disk.branch.is_none());
    images
        .filter(|disk| !disk.config.read_only)
        .map(|disk| disk.config.path.clone())
        .collect()
}

/// The layer of a disk that branches and is only read.
pub(crate) fn read_layer(disk: &AttachedDisk) -> Option<LayerId> {
    let branch = disk.branch.as_ref().filter(|_| disk.config.read_only);
    branch.and_then(|branch| lock(branch).id())
}

/// Brings what a guest wrote to raw images to the host's disks.
pub(crate) fn sync(images: &[PathBuf]) -> Result<(), Error> {
    for image in images {
        File::open(image)
            .and_then(|file| file.sync_all())
            .map_err(|source| Error::DiskSync {
                path: image.display().to_string(),
                source,
            })?;
    }
    Ok(())
}

fn lock(disk: &SharedDisk) -> MutexGuard<'_, Disk> {
    // A disk whose code panicked answers as well as it can.
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}
