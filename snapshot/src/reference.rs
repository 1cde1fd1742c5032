//! A memory file that holds no memory: it says in which snapshot of which store the memory is.
//!
//! `docs/memory-format.md` specifies the bytes. A reference names a store by its id and never by its path:
//! it may come from anybody, and must not lead to files of its writer's choice.

use std::{os::unix::fs::FileExt, path::Path};

use saved_state::SnapshotId;

use crate::{Error, FORGED, durable::open_for_reading};

pub(crate) const REFERENCE_BYTES: usize = 128;

const MAGIC: [u8; 8] = *b"FERMATAR";
pub(crate) const VERSION: u32 = 1;
const CHECKED_BYTES: usize = 96;

/// What a reference says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reference {
    /// The machine's snapshot, as its state file says.
    pub(crate) id: SnapshotId,
    pub(crate) memory_bytes: u64,
    /// The id of the store.
    pub(crate) store: [u8; 16],
    /// The id of the snapshot in the store.
    pub(crate) stored: [u8; 16],
}

impl Reference {
    pub(crate) fn to_bytes(self) -> [u8; REFERENCE_BYTES] {
        let mut bytes = [0; REFERENCE_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.memory_bytes.to_le_bytes());
        bytes[24..40].copy_from_slice(&self.id.0);
        bytes[40..56].copy_from_slice(&self.store);
        bytes[56..72].copy_from_slice(&self.stored);
        let checksum = blake3::hash(&bytes[..CHECKED_BYTES]);
        bytes[CHECKED_BYTES..].copy_from_slice(checksum.as_bytes());
        bytes
    }

    /// Reads the file at `path` if it is a reference; `None` if it is something else.
    pub(crate) fn read(path: &Path) -> Result<Option<Self>, Error> {
        let file = open_for_reading(path)?;
        let metadata = file.metadata().map_err(Error::io("read", path))?;
        // A memory file is never as short.
        if !metadata.is_file() || metadata.len() != REFERENCE_BYTES as u64 {
            return Ok(None);
        }
        let mut bytes = [0; REFERENCE_BYTES];
        file.read_exact_at(&mut bytes, 0)
            .map_err(Error::io("read", path))?;
        if !bytes.starts_with(&MAGIC) {
            return Ok(None);
        }
        Self::from_bytes(&bytes)
            .map(Some)
            .map_err(|reason| Error::Memory {
                path: path.to_owned(),
                reason,
            })
    }

    /// Reads what begins like a reference; the error completes "the file …".
    pub(crate) fn from_bytes(bytes: &[u8; REFERENCE_BYTES]) -> Result<Self, String> {
        let version = u32::from_le_bytes(field(bytes, 8));
        if version > VERSION {
            return Err(format!(
                "is a reference of format version {version}, and this release reads up to {VERSION}; use a newer one"
            ));
        }
        let checksum = blake3::hash(&bytes[..CHECKED_BYTES]);
        let whole = FORGED || bytes[CHECKED_BYTES..] == *checksum.as_bytes();
        if !whole {
            return Err("is a damaged reference (checksum mismatch); take another copy".to_owned());
        }
        let zeros = [&bytes[12..16], &bytes[72..CHECKED_BYTES]].concat();
        if version == 0 || zeros.iter().any(|&byte| byte != 0) {
            return Err("is a reference as fermata writes none; take another copy".to_owned());
        }
        Ok(Self {
            memory_bytes: u64::from_le_bytes(field(bytes, 16)),
            id: SnapshotId(field(bytes, 24)),
            store: field(bytes, 40),
            stored: field(bytes, 56),
        })
    }
}

fn field<const N: usize>(bytes: &[u8; REFERENCE_BYTES], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reference() -> Reference {
        Reference {
            id: SnapshotId([1; 16]),
            memory_bytes: 64 << 20,
            store: [2; 16],
            stored: [3; 16],
        }
    }

    #[test]
    fn a_reference_round_trips() {
        let bytes = reference().to_bytes();
        assert_eq!(Reference::from_bytes(&bytes), Ok(reference()));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        for bit in 0..REFERENCE_BYTES * 8 {
            let mut bytes = reference().to_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let magic = bit < 64;
            assert!(magic || Reference::from_bytes(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn what_fermata_does_not_write_is_refused() {
        for (at, value) in [(8, 0), (12, 1), (15, 1), (72, 1), (95, 1)] {
            let mut bytes = reference().to_bytes();
            bytes[at] = value;
            let checksum = blake3::hash(&bytes[..CHECKED_BYTES]);
            bytes[CHECKED_BYTES..].copy_from_slice(checksum.as_bytes());
            let refused = Reference::from_bytes(&bytes).unwrap_err();
            assert!(refused.contains("writes none"), "byte {at}: {refused}");
        }
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let mut bytes = reference().to_bytes();
        bytes[8] = 2;
        assert!(
            Reference::from_bytes(&bytes)
                .unwrap_err()
                .contains("version 2")
        );
    }

    #[test]
    fn only_a_reference_is_taken_for_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for other in [&b"FERMATAR"[..], &[0; REFERENCE_BYTES], &[b'x'; 4096]] {
            std::fs::write(&path, other).unwrap();
            assert_eq!(Reference::read(&path).unwrap(), None);
        }
        std::fs::write(&path, reference().to_bytes()).unwrap();
        assert_eq!(Reference::read(&path).unwrap(), Some(reference()));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(tail: [[u8; 32]; 3]) {
            let mut bytes = reference().to_bytes();
            bytes[32..].copy_from_slice(tail.as_flattened());
            prop_assert!(Reference::from_bytes(&bytes).is_err());
        }
    }
}
