//! What a snapshot says about itself, and the id that it has for all it holds.

use serde::{Deserialize, Serialize};

use crate::bytes::{from_hex, to_hex};
use crate::error::Malformed;
use crate::name::{FileId, check_name};

/// What a snapshot is, whatever its name: the digest of all it holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SnapshotId(pub(crate) [u8; 16]);

impl SnapshotId {
    /// Its bytes. In hexadecimal they are a name by which the store finds the snapshot.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl std::fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&to_hex(&self.0))
    }
}

impl std::fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl Serialize for SnapshotId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SnapshotId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parse_hex(deserializer).map(SnapshotId)
    }
}

fn parse_hex<'de, D: serde::Deserializer<'de>, const N: usize>(
    deserializer: D,
) -> Result<[u8; N], D::Error> {
    let hex = String::deserialize(deserializer)?;
    from_hex(&hex).ok_or_else(|| serde::de::Error::custom("not a digest"))
}

/// What a snapshot says about itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// The name it was saved under.
    pub name: String,
    /// When it was saved: milliseconds since 1970, UTC.
    pub created_ms: u64,
    /// The host that saved it.
    pub host: String,
    /// The snapshot it came from.
    pub parent: Option<SnapshotId>,
    /// Its images, in the order in which they were saved.
    pub images: Vec<ImageFacts>,
    pub(crate) manifest: Span,
    /// In an encrypted store, what the snapshot's own keys are derived from.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "write_salt",
        deserialize_with = "parse_salt"
    )]
    pub(crate) salt: Option<FileId>,
}

/// What a snapshot says about one of its images.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageFacts {
    /// The image's name, unique in its snapshot.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Chunks that are all zeros.
    pub zero_chunks: u64,
    /// Chunks that the store did not hold before.
    pub new_chunks: u64,
    pub(crate) blocks_at: u64,
    pub(crate) directory: Span,
}

/// A part of a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Span {
    pub(crate) at: u64,
    pub(crate) len: u64,
    #[serde(serialize_with = "write_hex", deserialize_with = "parse_hex")]
    pub(crate) digest: [u8; 16],
}

fn write_hex<S: serde::Serializer>(bytes: &[u8; 16], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&to_hex(bytes))
}

fn write_salt<S: serde::Serializer>(
    salt: &Option<FileId>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    salt.as_ref().map(FileId::to_string).serialize(serializer)
}

fn parse_salt<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<FileId>, D::Error> {
    parse_hex(deserializer).map(FileId).map(Some)
}

/// Text for the facts: without what would steer the terminal on which they are shown.
pub(crate) fn as_text(text: &str) -> String {
    text.replace(char::is_control, "")
}

impl Facts {
    /// Checks the texts: they are shown to people, on terminals. Names of images are checked with the layout.
    pub(crate) fn check_texts(&self) -> Result<(), Malformed> {
        if self.host.contains(char::is_control) {
            return Err(Malformed("the host's name has control characters"));
        }
        check_name(&self.name).map_err(|_| Malformed("it was saved under an impossible name"))
    }
}

impl Span {
    pub(crate) fn end(&self) -> Result<u64, Malformed> {
        self.at
            .checked_add(self.len)
            .ok_or(Malformed("a part is outside of the file"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_no_control_characters() {
        assert_eq!(as_text("\u{1b}[2Jho\nst\u{7f}\u{9b}é"), "[2Jhosté");
    }
}
