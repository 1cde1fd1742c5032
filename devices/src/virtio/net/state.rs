//! What a network device saves.

use saved_state::{Kind, SavedState};
use versionize::{VersionMap, Versionize, VersionizeError, VersionizeResult};
use versionize_derive::Versionize;

use crate::{SavedRateLimit, virtio::SavedTransport};

/// A network device and its transport. The device's own fields are public: who restores a machine needs
/// them to make the device.
#[derive(Clone, Debug, PartialEq, Versionize)]
pub struct SavedNet {
    /// What it was attached to.
    pub attachment: Attachment,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// The limit on what the guest receives.
    pub receive_limit: SavedRateLimit,
    /// The limit on what the guest sends.
    pub send_limit: SavedRateLimit,
    /// Whether the driver could see that the link is up.
    pub(super) link_up: bool,
    /// A frame with its header that was received and had not found room in the driver's buffers yet.
    pub(super) pending: Vec<u8>,
    pub(super) transport: SavedTransport,
}

impl SavedState for SavedNet {
    const KIND: Kind = Kind(*b"VNET");
}

/// What a network device is attached to.
#[derive(Clone, Debug, PartialEq, Eq, Versionize)]
pub enum Attachment {
    /// The TAP device of this name.
    Tap(String),
    /// The socket that listens at this path.
    Socket(String),
    /// A socket that was handed over when the machine was made.
    Descriptor,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_is_encoded_as_in_its_golden_file() {
        let attachments = [
            Attachment::Tap("tap0".to_owned()),
            Attachment::Socket("/run/switch".to_owned()),
            Attachment::Descriptor,
        ];
        let examples = attachments.map(|attachment| SavedNet {
            attachment,
            mac: [2, 3, 4, 5, 6, 7],
            receive_limit: SavedRateLimit::example(1),
            send_limit: SavedRateLimit::example(2),
            link_up: true,
            pending: vec![8, 9, 10],
            transport: SavedTransport::example(2),
        });
        golden::check_sections(&[&examples]);
    }
}
