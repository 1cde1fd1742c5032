//! What a state file says of the machine as a whole: enough to build it again.

use std::{io, os::unix::fs::MetadataExt, path::Path};

use control::DiskConfig;
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
}

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
}

impl DiskState {
    pub(crate) fn of(disk: &DiskConfig) -> io::Result<Self> {
        let metadata = std::fs::metadata(&disk.path)?;
        let seconds = u64::try_from(metadata.mtime()).unwrap_or(0);
        let nanoseconds = u64::try_from(metadata.mtime_nsec()).unwrap_or(0);
        Ok(Self {
            path: disk.path.to_string_lossy().into_owned(),
            read_only: disk.read_only,
            device: metadata.dev(),
            inode: metadata.ino(),
            modified_unix_ns: seconds
                .saturating_mul(1_000_000_000)
                .saturating_add(nanoseconds),
        })
    }

    pub(crate) fn config(&self) -> DiskConfig {
        DiskConfig {
            path: Path::new(&self.path).to_owned(),
            read_only: self.read_only,
        }
    }

    /// Whether `now` is the same file with another content: memory and disk of a machine must be of
    /// one instant. Of a copy, nothing can be said.
    pub(crate) fn changed_since(&self, now: &Self) -> bool {
        let same_file = (self.device, self.inode) == (now.device, now.inode);
        same_file && self.modified_unix_ns != now.modified_unix_ns
    }
}
