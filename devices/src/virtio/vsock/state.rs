//! What a vsock device saves: no connection, for their other ends stay behind.

use saved_state::{Kind, SavedState};
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

use crate::virtio::SavedTransport;

/// A vsock device and its transport. The device's own fields are public: who restores a machine needs them to
/// make the device.
#[derive(Clone, Debug, PartialEq, Versionize)]
pub struct SavedVsock {
    /// The guest's context ID.
    pub cid: u64,
    /// The path of the socket on the host that saved it.
    pub path: String,
    pub(super) transport: SavedTransport,
}

impl SavedState for SavedVsock {
    const KIND: Kind = Kind(*b"VSOK");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_is_encoded_as_in_its_golden_file() {
        let saved = SavedVsock {
            cid: 0x0304_0506,
            path: "/run/guest.vsock".to_owned(),
            transport: SavedTransport::example(3),
        };
        golden::check_sections(&[&[saved]]);
    }
}
