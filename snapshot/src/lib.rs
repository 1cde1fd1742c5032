//! A saved machine: its state ([`saved_state::Container`]) and its memory, as two files or in a store.
//!
//! [`write`] makes a snapshot appear whole, or not at all; [`Snapshot::open`] checks it before anything in it is
//! believed. `docs/state-format.md`, `docs/memory-format.md` and `docs/store-format.md` specify the bytes.

#![forbid(unsafe_code)]

mod durable;
mod error;
mod files;
mod image;
mod open;
mod reference;
mod save;
mod stored;
mod table;
mod transfer;

pub use dedup::{Error as StoreError, Progress, Saved, Store};
pub use error::Error;
pub use files::Files;
pub use open::{Snapshot, Source, read_state};
pub use save::{Destination, StorePlace, Unpublished, write};
pub use stored::{MEMORY_IMAGE, StoreAt};
pub use transfer::Written;
