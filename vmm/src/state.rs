//! What a state file says of the machine as a whole: enough to build it again.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use branch_disk::{LayerId, LayerRef};
use control::{DiskConfig, DiskFormat, DiskLimits};
use saved_state::{Kind, SavedState};
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

/// The machine as a whole. Its memory and its number of vCPUs are in the header.
#[derive(Clone, Debug, PartialEq, Eq, Versionize)]
pub(crate) struct MachineState {
    /// Its disks, in the order of their names in the guest.
    pub(crate) disks: Vec<DiskState>,
}

impl SavedState for MachineState {
    const KIND: Kind = Kind(*b"MACH");
    const VERSION: u16 = 3;

    fn version_map() -> VersionMap {
        let mut map = VersionMap::new();
        map.new_version().set_type_version(DiskState::type_id(), 2);
        map.new_version().set_type_version(DiskState::type_id(), 3);
        map
    }
}

/// [`DiskState::format`] of a raw image.
const RAW: u8 = 0;
/// [`DiskState::format`] of a disk that branches.
const BRANCH: u8 = 1;

/// A disk as it was at the cut: where, and in which condition.
#[derive(Clone, Debug, PartialEq, Eq, Versionize)]
pub(crate) struct DiskState {
    /// Absolute path of the image.
    pub(crate) path: String,
    /// Whether the guest may only read it.
    pub(crate) read_only: bool,
    /// The device that the image is on.
    pub(crate) device: u64,
    /// Its inode there, which a copy has of its own.
    pub(crate) inode: u64,
    /// When it was last written to, in nanoseconds since the Unix epoch.
    pub(crate) modified_unix_ns: u64,
    /// What it is: 0 a raw image, 1 a disk that branches.
    #[version(start = 2)]
    format: u8,
    /// Of a disk that branches: the id of the layer at `path`. If it is written to, that layer ended at the cut.
    #[version(start = 2)]
    layer: Vec<u8>,
    /// When the inode was made, in nanoseconds since the Unix epoch: an inode's number is given again. 0 where the
    /// file system does not tell.
    #[version(start = 3)]
    born_unix_ns: u64,
}

impl DiskState {
    pub(crate) fn of(disk: &DiskConfig) -> io::Result<Self> {
        let metadata = std::fs::metadata(&disk.path)?;
        Ok(Self {
            path: disk.path.to_string_lossy().into_owned(),
            read_only: disk.read_only,
            device: metadata.dev(),
            inode: metadata.ino(),
            modified_unix_ns: unix_ns(metadata.modified()),
            format: match disk.format {
                DiskFormat::Raw => RAW,
                DiskFormat::Branch => BRANCH,
            },
            layer: Vec::new(),
            born_unix_ns: unix_ns(metadata.created()),
        })
    }

    /// A disk that branches and is only read: it is what the layer `id` is.
    pub(crate) fn of_read_layer(disk: &DiskConfig, id: LayerId) -> io::Result<Self> {
        Ok(Self {
            layer: id.0.to_vec(),
            ..Self::of(disk)?
        })
    }

    /// A disk that was cut: it is what `layer` and all below it are.
    pub(crate) fn of_layer(disk: &DiskConfig, layer: &LayerRef) -> Self {
        Self {
            path: layer.path.to_string_lossy().into_owned(),
            read_only: disk.read_only,
            // A layer has an id, and does not change.
            device: 0,
            inode: 0,
            modified_unix_ns: 0,
            format: BRANCH,
            layer: layer.id.0.to_vec(),
            born_unix_ns: 0,
        }
    }

    /// How it is attached again. `None` when it is of a kind that this release never wrote.
    pub(crate) fn config(&self) -> Option<DiskConfig> {
        Some(DiskConfig {
            path: Path::new(&self.path).to_owned(),
            read_only: self.read_only,
            format: match self.format {
                RAW => DiskFormat::Raw,
                BRANCH => DiskFormat::Branch,
                _ => return None,
            },
            // The device's own section has them.
            serial: None,
            limits: DiskLimits::default(),
        })
    }

    /// The layer that it was, if it branches. `Err` when there can be no such.
    pub(crate) fn layer(&self) -> Result<Option<LayerId>, ()> {
        match (self.format, &*self.layer) {
            (RAW, []) => Ok(None),
            (BRANCH, layer) => layer.try_into().map(|id| Some(LayerId(id))).map_err(|_| ()),
            _ => Err(()),
        }
    }

    /// Whether `now` is the same file with another content: memory and disk of a machine must be of
    /// one instant. Of a copy, nothing can be said.
    pub(crate) fn changed_since(&self, now: &Self) -> bool {
        // An inode is never 0; that is a layer's, or a foreign file system's.
        let same_inode = self.inode != 0 && (self.device, self.inode) == (now.device, now.inode);
        // An older snapshot does not tell when it was made.
        let made_anew = self.born_unix_ns != 0 && self.born_unix_ns != now.born_unix_ns;
        same_inode && !made_anew && self.modified_unix_ns != now.modified_unix_ns
    }
}

/// 0 for what the file system does not tell, and for what is before the epoch or more than 584 years after it.
fn unix_ns(time: io::Result<SystemTime>) -> u64 {
    let since = time
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since
        .and_then(|since| u64::try_from(since.as_nanos()).ok())
        .unwrap_or(0)
}

/// The state of a saved machine of 64 MiB that nothing has been put into yet.
#[cfg(test)]
pub(crate) fn empty_container() -> saved_state::Container {
    saved_state::Container::new(saved_state::Header {
        id: saved_state::SnapshotId([1; 16]),
        release: "0".to_owned(),
        created_unix_ns: 1,
        host_cpu: saved_state::CpuIdentity::default(),
        vcpus: 1,
        memory_bytes: 64 << 20,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_is_encoded_as_in_its_golden_file() {
        let raw = DiskState {
            path: "/disk.raw".to_owned(),
            read_only: true,
            device: 0x0801,
            inode: 4711,
            modified_unix_ns: 1_700_000_000_000_000_001,
            format: RAW,
            layer: Vec::new(),
            born_unix_ns: 1_600_000_000_000_000_002,
        };
        let branching = DiskState {
            path: "/disk.layer".to_owned(),
            read_only: false,
            format: BRANCH,
            layer: (1..=16).collect(),
            ..raw.clone()
        };
        // Before, nobody asked when an inode was made.
        let unborn = |disk: &DiskState| DiskState {
            born_unix_ns: 0,
            ..disk.clone()
        };
        let machine = |disks: &[DiskState]| MachineState {
            disks: disks.to_vec(),
        };
        golden::check_sections(&[
            // No disk branched.
            &[machine(&[unborn(&raw)])],
            &[machine(&[unborn(&raw), unborn(&branching)])],
            &[machine(&[raw, branching])],
        ]);
    }

    #[test]
    fn a_file_has_changed_only_if_it_is_still_the_same() {
        let saved = DiskState {
            path: "/disk".to_owned(),
            read_only: false,
            device: 1,
            inode: 2,
            modified_unix_ns: 3,
            format: RAW,
            layer: Vec::new(),
            born_unix_ns: 1,
        };
        assert!(!saved.changed_since(&saved));
        let written = DiskState {
            modified_unix_ns: 4,
            ..saved.clone()
        };
        assert!(saved.changed_since(&written));
        let copied = DiskState {
            inode: 3,
            ..written.clone()
        };
        assert!(!saved.changed_since(&copied));
        // As a file system does that gives the number of what was removed to what is made next.
        let copied_in_its_place = DiskState {
            born_unix_ns: 4,
            ..written.clone()
        };
        assert!(!saved.changed_since(&copied_in_its_place));
        let older = DiskState {
            born_unix_ns: 0,
            ..saved
        };
        assert!(older.changed_since(&written));
    }

    #[test]
    fn a_layer_is_named_and_only_a_branching_disk_has_one() {
        let config = DiskConfig {
            path: "/d".into(),
            read_only: false,
            format: DiskFormat::Branch,
            serial: None,
            limits: DiskLimits::default(),
        };
        let layer = LayerRef {
            path: "/d.layer".into(),
            id: LayerId([7; 16]),
        };
        let state = DiskState::of_layer(&config, &layer);
        let section = saved_state::Section::encode(
            0,
            &MachineState {
                disks: vec![state.clone()],
            },
        );
        let MachineState { disks } = section.unwrap().decode().unwrap();
        assert_eq!(disks, std::slice::from_ref(&state));
        assert_eq!(state.layer(), Ok(Some(layer.id)));
        assert_eq!(state.config().unwrap().path, layer.path);
        let raw = DiskState {
            format: RAW,
            layer: Vec::new(),
            ..state.clone()
        };
        assert_eq!(raw.layer(), Ok(None));
        assert_eq!(raw.config().unwrap().format, DiskFormat::Raw);
        for wrong in [
            DiskState {
                format: RAW,
                ..state.clone()
            },
            DiskState {
                layer: vec![7; 15],
                ..state.clone()
            },
            DiskState {
                layer: Vec::new(),
                ..state.clone()
            },
        ] {
            assert_eq!(wrong.layer(), Err(()));
        }
        assert_eq!(DiskState { format: 2, ..state }.config(), None);
    }
}
