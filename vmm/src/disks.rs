//! A machine's disks, from the outside: opened for it, and cut when it is saved.

use std::{
    fs::File,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use branch_disk::{Cut, Disk, Frozen, LayerId, LayerRef, Mode, Next, Rebuild, Rule};
use control::{Confinement, DiskConfig, DiskFormat, DiskLimits, DiskStatus};
use devices::{
    RateLimit,
    virtio::block::{DiskControl, SharedDisk},
};
use saved_state::{Container, SavedState};
use snapshot::{Snapshot, StoredDisk};

use crate::{
    error::Error,
    state::{DiskState, MachineState},
    stored_disks::{Had, Rebuilding},
};

/// A disk of a machine.
#[derive(Clone)]
pub(crate) struct AttachedDisk {
    pub(crate) config: DiskConfig,
    /// There if it branches; a raw image is opened by its device.
    pub(crate) branch: Option<SharedDisk>,
    /// The sealed layer that its first head was made on, of a machine that goes on and writes to it.
    pub(crate) began_on: Option<LayerRef>,
    /// There if it stands on a layer that comes while the machine runs, or is such a layer.
    pub(crate) comes: Option<Arc<Rebuild>>,
}

/// What each disk was at a cut, in their order; nothing of those that do not branch.
pub(crate) struct Cuts(Vec<Option<AtCut>>);

/// A disk as it was at a cut.
struct AtCut {
    /// What ended; nothing of one that is only read.
    cut: Option<Cut>,
    frozen: Frozen,
}

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
            began_on: None,
            comes: None,
        })
    };
    configs.iter().map(attach).collect()
}

/// Opens the disks of a machine that goes on. What branches goes on in a head of its own, so that any number of machines can
/// go on from one snapshot. What is not here is made where `rebuilding` says, if the snapshot has it.
pub(crate) fn reattach(
    states: &[DiskState],
    saved: &Snapshot,
    rebuilding: &Rebuilding<'_>,
) -> Result<Vec<AttachedDisk>, Error> {
    let states = states.iter().enumerate();
    states
        .map(|(number, state)| {
            let content = || Ok(saved.disk(number)?);
            reattach_one(state, &content, rebuilding)
        })
        .collect()
}

fn reattach_one(
    state: &DiskState,
    content: &dyn Fn() -> Result<Option<StoredDisk>, Error>,
    rebuilding: &Rebuilding<'_>,
) -> Result<AttachedDisk, Error> {
    let impossible = || Error::DiskState {
        path: state.path.clone(),
    };
    let mut attached = AttachedDisk {
        config: state.config().ok_or_else(impossible)?,
        branch: None,
        began_on: None,
        comes: None,
    };
    let layer = state.layer().map_err(|()| impossible())?;
    if let Some(id) = layer
        && !is_there(&attached.config.path)
        && let Some(content) = content()?
    {
        attached.have(id, content, rebuilding)?;
    }
    // One that is not there is refused when it is opened.
    if DiskState::of(&attached.config).is_ok_and(|now| state.changed_since(&now)) {
        return Err(Error::DiskChanged {
            path: state.path.clone(),
        });
    }
    let Some(id) = layer else {
        return Ok(attached);
    };
    if attached.config.read_only {
        let disk = attached.read(rebuilding.rule)?;
        if disk.id() != Some(id) {
            return Err(Error::DiskChanged {
                path: state.path.clone(),
            });
        }
        attached.branch = Some(Arc::new(Mutex::new(disk)));
        return Ok(attached);
    }
    let disk = match attached.branch(id, rebuilding.rule) {
        Err(error) if is_gone(&error) => {
            let Some(content) = content()? else {
                return Err(Error::LayerNotHere(error));
            };
            attached.have(id, content, rebuilding)?;
            attached.branch(id, rebuilding.rule)?
        }
        begun => begun?,
    };
    let path = std::mem::replace(&mut attached.config.path, disk.path().to_owned());
    attached.began_on = Some(LayerRef { path, id });
    attached.branch = Some(Arc::new(Mutex::new(disk)));
    Ok(attached)
}

impl AttachedDisk {
    /// Has the layer `id`, which was at its path, be elsewhere, or come there.
    fn have(
        &mut self,
        id: LayerId,
        content: StoredDisk,
        rebuilding: &Rebuilding<'_>,
    ) -> Result<(), Error> {
        match rebuilding.have(&self.config.path, id, content)? {
            Had::Here(path) => self.config.path = path,
            Had::Comes(rebuild) => {
                self.config.path = rebuild.path().to_owned();
                self.comes = Some(rebuild);
            }
        }
        Ok(())
    }

    /// The disk whose layer is at its path.
    fn read(&self, rule: &Rule<'_>) -> Result<Disk, branch_disk::Error> {
        match &self.comes {
            Some(rebuild) => rebuild.read(),
            None => Disk::open(&self.config.path, Mode::Read, rule),
        }
    }

    /// A disk that begins as the layer `id`, which is at its path.
    fn branch(&self, id: LayerId, rule: &Rule<'_>) -> Result<Disk, branch_disk::Error> {
        match &self.comes {
            Some(rebuild) => rebuild.branch(rule),
            None => Disk::branch(&self.config.path, Some(id), rule),
        }
    }
}

/// A disk's limits as its device knows them.
pub(crate) fn limits(limits: DiskLimits) -> devices::virtio::block::DiskLimits {
    let DiskLimits {
        bytes_per_second,
        operations_per_second,
        read_bytes_per_second,
        read_operations_per_second,
        write_bytes_per_second,
        write_operations_per_second,
    } = limits;
    let limit = |bytes_per_second, operations_per_second| RateLimit {
        bytes_per_second,
        operations_per_second,
    };
    devices::virtio::block::DiskLimits {
        total: limit(bytes_per_second, operations_per_second),
        reads: limit(read_bytes_per_second, read_operations_per_second),
        writes: limit(write_bytes_per_second, write_operations_per_second),
    }
}

/// The other way: a disk's limits as a client knows them.
pub(crate) fn limits_of(limits: devices::virtio::block::DiskLimits) -> DiskLimits {
    let devices::virtio::block::DiskLimits {
        total,
        reads,
        writes,
    } = limits;
    DiskLimits {
        bytes_per_second: total.bytes_per_second,
        operations_per_second: total.operations_per_second,
        read_bytes_per_second: reads.bytes_per_second,
        read_operations_per_second: reads.operations_per_second,
        write_bytes_per_second: writes.bytes_per_second,
        write_operations_per_second: writes.operations_per_second,
    }
}

/// A disk as it is now, as a client knows it.
pub(crate) fn status(control: &DiskControl) -> DiskStatus {
    DiskStatus {
        bytes: control.bytes(),
        limits: limits_of(control.limits()),
    }
}

/// The disks of a saved machine.
pub(crate) fn saved(state: &Container) -> Result<Vec<DiskState>, Error> {
    let mut sections = state.sections();
    let section = sections.find(|section| section.kind == MachineState::KIND);
    // One that has no such section is refused when that is taken.
    let machine = section.map(|section| section.decode::<MachineState>());
    Ok(machine
        .transpose()?
        .map_or(Vec::new(), |machine| machine.disks))
}

/// Whether any number of machines can have these disks each: one that writes to a raw image would write to that of the others.
pub(crate) fn apart(mut disks: impl Iterator<Item = DiskConfig>) -> Result<(), Error> {
    match disks.find(|disk| disk.format == DiskFormat::Raw && !disk.read_only) {
        Some(disk) => Err(Error::SharedDisk {
            path: disk.path.display().to_string(),
        }),
        None => Ok(()),
    }
}

/// Whether all that a machine writes to these disks can be undone.
pub(crate) fn undoable(disks: &[AttachedDisk]) -> Result<(), Error> {
    // What it began on has to be there, by its name.
    let is_here = |disk: &AttachedDisk| {
        let comes = disk.comes.as_ref();
        comes.is_none_or(|rebuild| rebuild.is_finished())
    };
    let undoable =
        |disk: &&AttachedDisk| disk.config.read_only || (disk.began_on.is_some() && is_here(disk));
    match disks.iter().find(|disk| !undoable(disk)) {
        Some(disk) => Err(Error::NotUndone {
            path: disk.config.path.display().to_string(),
        }),
        None => Ok(()),
    }
}

/// Undoes what was written to these disks since their machine was made.
pub(crate) fn undo(disks: &[AttachedDisk], confinement: Option<&Confinement>) -> Result<(), Error> {
    for disk in disks {
        if let (Some(branch), Some(on)) = (&disk.branch, &disk.began_on) {
            lock(branch).start_over(on, &|path: &Path| allows(confinement, path))?;
        }
    }
    Ok(())
}

/// Whether there is something at `path`, or it cannot be told.
pub(crate) fn is_there(path: &Path) -> bool {
    let found = std::fs::symlink_metadata(path);
    !found.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// Whether a layer could not be opened because it, or what it stands on, is not there any more: somebody merges layers.
fn is_gone(error: &branch_disk::Error) -> bool {
    match error {
        branch_disk::Error::Io { source, .. } => source.kind() == ErrorKind::NotFound,
        branch_disk::Error::NotThere { .. } => true,
        _ => false,
    }
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
        let cuts = both.map(|(next, disk)| {
            let Some(branch) = &disk.branch else {
                return Ok(None);
            };
            let mut branch = lock(branch);
            let cut = next.map(|next| branch.cut(next)).transpose()?;
            let frozen = branch.frozen();
            Ok::<_, Error>(Some(AtCut { cut, frozen }))
        });
        Ok(Cuts(cuts.collect::<Result<_, _>>()?))
    }
}

impl Cuts {
    /// What ended of the disk at `index`.
    pub(crate) fn layer(&self, index: usize) -> Option<&LayerRef> {
        self.0.get(index)?.as_ref()?.cut.as_ref().map(Cut::layer)
    }

    /// What ended, of all disks.
    pub(crate) fn layers(&self) -> Vec<LayerId> {
        let cuts = self.0.iter().flatten();
        let cuts = cuts.filter_map(|disk| disk.cut.as_ref());
        cuts.map(|cut| cut.layer().id).collect()
    }

    /// Makes durable what ended, and gives what the disks were, in their order; the machine may run meanwhile.
    pub(crate) fn finish(self) -> Result<Vec<Option<Frozen>>, Error> {
        let finish = |disk: AtCut| {
            disk.cut.map(Cut::finish).transpose()?;
            Ok(disk.frozen)
        };
        let disks = self.0.into_iter();
        disks.map(|disk| disk.map(finish).transpose()).collect()
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

pub(crate) fn lock(disk: &SharedDisk) -> MutexGuard<'_, Disk> {
    // A disk whose code panicked answers as well as it can.
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}
