//! A saved machine as two files: a state file ([`saved_state::Container`]) and a memory file.
//!
//! [`write`] makes the pair appear together, or not at all; [`Pair::open`] checks both before anything
//! in them is believed. `docs/state-format.md` and `docs/memory-format.md` specify the bytes.

#![forbid(unsafe_code)]

mod durable;
mod error;
mod image;
mod pair;
mod table;
mod transfer;

pub use error::Error;
pub use pair::{Pair, Targets, Unpublished, read_state, write};
pub use transfer::Written;
