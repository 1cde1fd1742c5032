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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_is_encoded_as_in_its_golden_file() {
        let runs = SavedRtc {
            index: 0x0b,
            offset_seconds: -3600,
            stopped_at: None,
            registers: (0..128).collect(),
        };
        let stands_still = SavedRtc {
            stopped_at: Some(1_700_000_000),
            ..runs.clone()
        };
        golden::check_sections(&[&[runs, stands_still]]);
    }
}
