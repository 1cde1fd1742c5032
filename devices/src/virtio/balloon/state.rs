//! What a balloon saves. Which pages are in it, the guest alone knows.

use saved_state::{Kind, SavedState};
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

use super::BalloonOptions;
use crate::virtio::SavedTransport;

/// A balloon and its transport.
#[derive(Clone, Debug, PartialEq, Versionize)]
pub struct SavedBalloon {
    /// Whether the guest may take pages out when it has no others left.
    pub(super) deflate_on_oom: bool,
    /// Whether the guest may report free pages.
    pub(super) free_page_reporting: bool,
    /// Pages that are to be in it.
    pub(super) target_pages: u32,
    /// Pages that the driver says are in it.
    pub(super) actual_pages: u32,
    /// Seconds between two times that the guest is asked for statistics; 0 if it is asked on demand only.
    pub(super) statistics_interval_s: u32,
    /// The buffer for statistics that the device has of the driver, by its head; at most one.
    pub(super) statistics_buffer: Vec<u16>,
    pub(super) transport: SavedTransport,
}

impl SavedState for SavedBalloon {
    const KIND: Kind = Kind(*b"VBAL");
}

impl SavedBalloon {
    /// What a balloon has to be made with that is to take this over.
    pub fn options(&self) -> BalloonOptions {
        BalloonOptions {
            target_pages: self.target_pages,
            deflate_on_oom: self.deflate_on_oom,
            free_page_reporting: self.free_page_reporting,
            statistics_interval_s: self.statistics_interval_s,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_is_encoded_as_in_its_golden_file() {
        let saved = SavedBalloon {
            deflate_on_oom: true,
            free_page_reporting: false,
            target_pages: 4096,
            actual_pages: 4000,
            statistics_interval_s: 5,
            statistics_buffer: vec![7],
            transport: SavedTransport::example(4),
        };
        golden::check_sections(&[&[saved]]);
    }
}
