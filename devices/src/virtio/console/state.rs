//! What a console saves.

use saved_state::{Kind, SavedState};
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

use crate::virtio::SavedTransport;

/// A console and its transport.
#[derive(Clone, Debug, PartialEq, Versionize)]
pub struct SavedConsole {
    /// Bytes that are written of the buffer that is next in the transmit queue.
    pub(super) written_bytes: u64,
    /// What was typed and the guest has not taken.
    pub(super) input: Vec<u8>,
    pub(super) transport: SavedTransport,
}

impl SavedState for SavedConsole {
    const KIND: Kind = Kind(*b"VCON");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_is_encoded_as_in_its_golden_file() {
        let saved = SavedConsole {
            written_bytes: 0x1_2345,
            input: b"typed ahead".to_vec(),
            transport: SavedTransport::example(2),
        };
        golden::check_sections(&[&[saved]]);
    }
}
