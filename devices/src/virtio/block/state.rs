//! What a disk saves.

use saved_state::{Kind, SavedState};
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

use crate::virtio::SavedTransport;

/// A disk and its transport. The disk's fields are public: who restores a machine needs them to
/// open the image.
#[derive(Clone, Debug, PartialEq, Versionize)]
pub struct SavedBlock {
    /// Absolute path of the image on the host that saved it.
    pub path: String,
    /// Sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// Whether it was attached read-only.
    pub read_only: bool,
    /// The identity that the guest sees, as for [`super::Block::open`].
    pub id: String,
    pub(super) transport: SavedTransport,
}

impl SavedState for SavedBlock {
    const KIND: Kind = Kind(*b"VBLK");
}
