//! What a saved machine looks like in bytes.
//!
//! Every part of a machine saves itself as a [`Section`]: a kind, an instance number, a version and
//! a payload encoded by [`versionize`]. A [`Container`] gathers the sections of one machine under a
//! [`Header`] that can be read without decoding anything else, and under a BLAKE3 checksum that is
//! verified before a byte of a section is believed. `docs/state-format.md` specifies the bytes.
//!
//! The crate knows nothing of machines: which sections there are is decided by those who save them.

#![forbid(unsafe_code)]
#![allow(unexpected_cfgs, reason = "`fuzzing` is set by fuzzers alone")]

mod container;
mod cursor;
mod error;
mod header;
mod section;

/// Whether checksums are taken on trust, so that a fuzzer comes to what is behind them.
const FORGED: bool = cfg!(fuzzing);

pub use container::{Container, MAX_BODY_BYTES, MAX_SECTIONS};
pub use error::Error;
pub use header::{CpuIdentity, FORMAT_VERSION, HEADER_BYTES, Header, MAGIC, SnapshotId};
pub use section::{Kind, SavedState, Section};
