//! A snapshot that is sent: taken on one host, kept on another. `docs/peer-protocol.md` specifies what is said.

mod line;
mod message;
mod receiver;
mod reception;
mod reserved;
mod sender;
mod spool;

use std::path::Path;

use dedup::Key;
use peer::Stream;

use crate::Error;

pub use line::PeerError;
pub use message::Why;
pub use receiver::{Caller, Keep, Place, Received};
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
    fn connect(&self, wanted: &dyn Fn() -> bool) -> Result<Stream, Error> {
        let key = Key::read_file(self.key_file);
        let key = key.map_err(Error::store(self.key_file.display().to_string()))?;
        let connected = Stream::connect(self.address, key.bytes(), wanted);
        connected.map_err(|error| Error::Peer {
            address: self.address.to_owned(),
            cause: error.into(),
        })
    }
}
