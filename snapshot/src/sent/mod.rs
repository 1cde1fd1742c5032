//! A snapshot that is sent: taken on one host, kept on another. `docs/peer-protocol.md` specifies what is said.

mod line;
mod message;
mod receiver;
mod reception;
mod sender;
mod spool;

use std::path::Path;

use dedup::Key;
use peer::Stream;

use crate::Error;

pub use line::PeerError;
pub use message::Why;
pub use receiver::{Keep, Place, Received, receive};
pub(crate) use sender::Sender;

/// Another fermata, which keeps snapshots for who has its key.
#[derive(Clone, Copy, Debug)]
pub struct PeerAt<'a> {
    /// Where it listens, like `host:7070`.
    pub address: &'a str,
    /// The file with the key that both have.
    pub key_file: &'a Path,
}

impl PeerAt<'_> {
    /// Connects to it.
    pub(crate) fn connect(&self) -> Result<Stream, Error> {
        let key = read_key(self.key_file)?;
        let connected = Stream::connect(self.address, key.bytes());
        connected.map_err(|error| Error::Peer {
            address: self.address.to_owned(),
            cause: error.into(),
        })
    }
}

/// Reads a key file, in either of the forms that a store's has.
pub(crate) fn read_key(file: &Path) -> Result<Key, Error> {
    Key::read_file(file).map_err(Error::store(file.display().to_string()))
}
