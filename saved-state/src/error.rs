//! Why a saved state could not be written or believed.

use crate::{Kind, header::FORMAT_VERSION};

/// An error of the container or of one of its sections.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The file does not begin with the magic number.
    #[error("this is not a fermata state file (it does not begin with the magic number)")]
    NotAStateFile,
    /// The container is of a format that this release does not know.
    #[error(
        "the state file has format version {found}, this release reads version {FORMAT_VERSION}; \
         restore it with the release that wrote it, {release}"
    )]
    UnknownFormat {
        /// The version found in the header.
        found: u32,
        /// The release that wrote the file, as its header gives it.
        release: String,
    },
    /// The file ends before its header says it should, or goes on after it.
    #[error(
        "the state file should have {expected} bytes but has {found}; it was cut or appended to: take another copy"
    )]
    WrongLength {
        /// Bytes by the header.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// The checksum of the header does not match.
    #[error("the header of the state file is damaged (checksum mismatch); take another copy")]
    DamagedHeader,
    /// The checksum of the body does not match.
    #[error("the state file is damaged (checksum mismatch); take another copy")]
    DamagedBody,
    /// A checked container breaks its own rules: it was made by something else than fermata.
    #[error("the state file is malformed: {0}; take another copy, or save the machine again")]
    Malformed(&'static str),
    /// A section that the machine needs is not there.
    #[error(
        "the state file has no section {kind} {instance}; it was saved from another machine type"
    )]
    MissingSection {
        /// The kind looked for.
        kind: Kind,
        /// The instance looked for.
        instance: u32,
    },
    /// Sections remain that nothing in this machine asked for.
    #[error(
        "the state file has sections this machine does not use: {0}; restore it with the release that wrote it"
    )]
    Leftover(String),
    /// A section is newer than this release.
    #[error(
        "section {kind} of the state file has version {found}, this release knows 1 to {known}; restore it with the release that wrote it"
    )]
    UnknownVersion {
        /// The section's kind.
        kind: Kind,
        /// The version found.
        found: u16,
        /// The newest version known.
        known: u16,
    },
    /// A section's payload could not be decoded.
    #[error(
        "section {kind} of the state file is malformed: {reason}; take another copy, or save the machine again"
    )]
    Decode {
        /// The section's kind.
        kind: Kind,
        /// What the decoder said.
        reason: String,
    },
    /// A section's payload could not be encoded.
    #[error("section {kind} cannot be encoded: {reason}")]
    Encode {
        /// The section's kind.
        kind: Kind,
        /// What the encoder said.
        reason: String,
    },
}
