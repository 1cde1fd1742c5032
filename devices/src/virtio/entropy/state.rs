//! What the entropy device saves: nothing of its own.

use saved_state::{Kind, SavedState};
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

use crate::virtio::SavedTransport;

/// The entropy device's transport.
#[derive(Clone, Debug, PartialEq, Versionize)]
pub struct SavedEntropy {
    pub(in crate::virtio) transport: SavedTransport,
}

impl SavedState for SavedEntropy {
    const KIND: Kind = Kind(*b"VRNG");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_is_encoded_as_in_its_golden_file() {
        let transport = SavedTransport::example(1);
        golden::check_sections(&[&[SavedEntropy { transport }]]);
    }
}
