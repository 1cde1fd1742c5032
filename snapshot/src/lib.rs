//! A saved machine: its state ([`saved_state::Container`]) and its memory, as two files in a store, or with another fermata.
//!
//! [`write`] makes a snapshot appear whole, or not at all; [`Snapshot::open`] checks it before anything in it is
//! believed. `docs/state-format.md`, `docs/memory-format.md` and `docs/store-format.md` specify the bytes.

#![forbid(unsafe_code)]
#![allow(unexpected_cfgs, reason = "`fuzzing` is set by fuzzers alone")]

mod content;
mod disk;
mod durable;
mod error;
mod files;
#[cfg(test)]
mod golden_tests;
mod granules;
mod hot;
mod image;
mod image_file;
mod on_demand;
mod open;
mod reference;
mod save;
mod saving;
mod sent;
mod stored;
mod table;
mod transfer;
mod working_set;

/// Whether checksums are taken on trust, so that a fuzzer comes to what is behind them.
const FORGED: bool = cfg!(fuzzing);

pub use content::{Content, Piece};
pub use dedup::{Error as StoreError, Key, Progress, Saved, Store};
pub use disk::StoredDisk;
pub use error::Error;
pub use files::Files;
pub use image_file::Written;
pub use on_demand::{Finisher, Lost, OnDemand, OnLoss, UseWorkingSet};
pub use open::{Snapshot, Source, read_state, read_state_bytes};
pub use save::{Destination, Draft, Published, StorePlace, Unpublished, begin, write};
pub use saving::Saving;
pub use sent::{Caller, Keep, PeerAt, PeerError, Place, Received, Why};
pub use stored::{MEMORY_IMAGE, StoreAt};
pub use working_set::{Malformed, WorkingSet};
