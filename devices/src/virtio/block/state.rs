//! What a disk saves.

use saved_state::{Kind, SavedState};
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

use crate::{SavedRateLimit, virtio::SavedTransport};

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
    /// The limit on all requests together.
    #[version(start = 2)]
    pub total_limit: SavedRateLimit,
    /// The limit on reads.
    #[version(start = 2)]
    pub read_limit: SavedRateLimit,
    /// The limit on writes, and on all that is no read.
    #[version(start = 2)]
    pub write_limit: SavedRateLimit,
    /// The heads of the requests that were taken off the ring and are not answered: they wait for a limit, or until a round has room
    /// for them; or, if their driver has broken a rule meanwhile, there was no time or they were ended early, for what was
    /// brought for them, or for a flush.
    #[version(start = 2)]
    pub(super) waiting: Vec<u16>,
}

impl SavedState for SavedBlock {
    const KIND: Kind = Kind(*b"VBLK");
    const VERSION: u16 = 2;

    fn version_map() -> VersionMap {
        let mut map = VersionMap::new();
        map.new_version().set_type_version(Self::type_id(), 2);
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_is_encoded_as_in_its_golden_file() {
        let newest = SavedBlock {
            path: "/disk.raw".to_owned(),
            capacity_sectors: 2_097_152,
            read_only: true,
            id: "serial".to_owned(),
            transport: SavedTransport::example(1),
            total_limit: SavedRateLimit::example(1),
            read_limit: SavedRateLimit::example(2),
            write_limit: SavedRateLimit::example(3),
            waiting: vec![5, 4],
        };
        let without_limits = SavedBlock {
            total_limit: SavedRateLimit::default(),
            read_limit: SavedRateLimit::default(),
            write_limit: SavedRateLimit::default(),
            waiting: Vec::new(),
            ..newest.clone()
        };
        golden::check_sections(&[&[without_limits], &[newest]]);
    }
}
