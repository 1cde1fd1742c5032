//! A stream between two hosts that share a key: both know who the other is, and nobody else reads or changes it.
//!
//! `docs/peer-protocol.md`, *The stream*, specifies the bytes. What is said over it is somebody else's.

#![forbid(unsafe_code)]

mod error;
mod greeting;
mod stream;

pub use error::Error;
pub use stream::{KEY_BYTES, Stream};
