//! Why a stream is not there, or no more.

use std::io;

/// An error of a stream; who the peer is, its user knows.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nobody.
    #[error("cannot be reached: {0}; check its address, and that `fermata receive` runs there")]
    Unreachable(#[source] io::Error),
    /// What answers is something else.
    #[error("is no fermata; check its address")]
    NotFermata,
    /// It is of another release.
    #[error(
        "speaks version {theirs} of the protocol, and this is version {ours}; use one release on both hosts"
    )]
    Version {
        /// The version here.
        ours: u32,
        /// The peer's.
        theirs: u32,
    },
    /// It did not show that it has the key.
    #[error("has another key; give both sides the same key file")]
    Key,
    /// What came is not what the peer sent, or not all of it.
    #[error("sent what is damaged or forged")]
    Forged,
    /// It said nothing for so many seconds, or took nothing.
    #[error("has not moved for {0} s; look whether it is still at work")]
    Silent(u64),
    /// It hung up.
    #[error("hung up")]
    Closed,
    /// The stream is not wanted any more.
    #[error("is not waited for any more")]
    Unwanted,
    /// The network, or the host.
    #[error("is lost: {0}")]
    Io(#[source] io::Error),
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        match error.kind() {
            BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof => Self::Closed,
            _ => Self::Io(error),
        }
    }
}
