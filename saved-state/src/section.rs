//! A section: the saved state of one part of a machine.

use std::fmt;

use versionize::{VersionMap, Versionize, VersionizeError};

use crate::Error;

/// What a section describes: four ASCII characters, like `VCPU` or `VBLK`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind(pub [u8; 4]);

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kind({self})")
    }
}

/// A type whose only purpose is to be saved; never the type the machine runs on.
///
/// A runtime type makes one of these by destructuring itself exhaustively, so that a field added
/// later does not compile until somebody decides whether it is saved.
pub trait SavedState: Versionize {
    /// The kind of its section.
    const KIND: Kind;
    /// The version this release writes; every version from 1 up to it can be read.
    const VERSION: u16 = 1;

    /// Which types changed at which version. A type that never changed needs no entry.
    fn version_map() -> VersionMap {
        VersionMap::new()
    }
}

/// The saved state of one part of a machine, encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// What it describes.
    pub kind: Kind,
    /// Which of several of this kind: vCPU 0, 1, 2.
    pub instance: u32,
    /// The version of the payload's encoding.
    pub version: u16,
    /// The encoded state.
    pub payload: Vec<u8>,
}

impl Section {
    /// Encodes `state` as instance `instance` of its kind.
    ///
    /// # Errors
    ///
    /// [`Error::Encode`] when the state breaks a bound of the encoding (10 MiB a vector, 16 KiB a
    /// string).
    pub fn encode<T: SavedState>(instance: u32, state: &T) -> Result<Self, Error> {
        let mut payload = Vec::new();
        state
            .serialize(&mut payload, &T::version_map(), T::VERSION)
            .map_err(|e| Error::Encode {
                kind: T::KIND,
                reason: e.to_string(),
            })?;
        Ok(Self {
            kind: T::KIND,
            instance,
            version: T::VERSION,
            payload,
        })
    }

    /// Decodes the payload, all of it: bytes left over are an error.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownVersion`] for a version this release does not know, [`Error::Decode`] for a
    /// payload that is not a `T`, [`Error::Malformed`] for a section of another kind.
    pub fn decode<T: SavedState>(&self) -> Result<T, Error> {
        if self.kind != T::KIND {
            return Err(Error::Malformed("a section of another kind was expected"));
        }
        if self.version == 0 || self.version > T::VERSION {
            return Err(Error::UnknownVersion {
                kind: T::KIND,
                found: self.version,
                known: T::VERSION,
            });
        }
        let decode_error = |reason: String| Error::Decode {
            kind: T::KIND,
            reason,
        };
        let mut rest = self.payload.as_slice();
        let state = T::deserialize(&mut rest, &T::version_map(), self.version)
            .map_err(|e| decode_error(reason(e)))?;
        if !rest.is_empty() {
            return Err(decode_error(format!("{} bytes are left over", rest.len())));
        }
        Ok(state)
    }
}

/// What a decoder's error says of what it decoded.
fn reason(error: VersionizeError) -> String {
    match error {
        VersionizeError::VecLength(bytes) => format!("a list of {bytes} bytes is too long"),
        VersionizeError::StringLength(bytes) => format!("a text of {bytes} bytes is too long"),
        VersionizeError::Semantic(reason) => reason,
        // Those of the encoding underneath name its own parts.
        VersionizeError::Deserialize(_)
        | VersionizeError::Serialize(_)
        | VersionizeError::Io(_) => {
            "it ends too early, or has values that there are not".to_owned()
        }
    }
}
