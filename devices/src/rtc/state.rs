//! What the clock saves.

use saved_state::{Kind, SavedState};
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

/// The clock's registers and how far it is from the host's clock.
#[derive(Clone, Debug, PartialEq, Versionize)]
pub struct SavedRtc {
    pub(super) index: u8,
    pub(super) offset_seconds: i64,
    /// The time at which the guest has stopped the clock to set it, in seconds since the epoch.
    pub(super) stopped_at: Option<i64>,
    pub(super) registers: Vec<u8>,
}

impl SavedState for SavedRtc {
    const KIND: Kind = Kind(*b"CMOS");
}
