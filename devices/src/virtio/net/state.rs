//! What a network device saves.

use std::num::NonZeroU64;

use saved_state::{Kind, SavedState};
use versionize::{VersionMap, Versionize, VersionizeError, VersionizeResult};
use versionize_derive::Versionize;

use crate::{RateLimit, virtio::SavedTransport};

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

/// A [`RateLimit`]; 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Versionize)]
pub struct SavedRateLimit {
    bytes_per_second: u64,
    operations_per_second: u64,
}

impl From<RateLimit> for SavedRateLimit {
    fn from(limit: RateLimit) -> Self {
        let RateLimit {
            bytes_per_second,
            operations_per_second,
        } = limit;
        let or_zero = |rate: Option<NonZeroU64>| rate.map_or(0, NonZeroU64::get);
        Self {
            bytes_per_second: or_zero(bytes_per_second),
            operations_per_second: or_zero(operations_per_second),
        }
    }
}

impl From<SavedRateLimit> for RateLimit {
    fn from(saved: SavedRateLimit) -> Self {
        let SavedRateLimit {
            bytes_per_second,
            operations_per_second,
        } = saved;
        Self {
            bytes_per_second: NonZeroU64::new(bytes_per_second),
            operations_per_second: NonZeroU64::new(operations_per_second),
        }
    }
}
