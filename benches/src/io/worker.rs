//! A guest that runs what it is told, over its network.

use std::{
    io::{Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result};

/// Where `resources/bench/io-init` listens.
const PORT: u16 = 7000;

/// Emulated guests take minutes for what hardware does in seconds.
const PATIENCE: Duration = Duration::from_secs(180);

/// A guest, by its address.
#[derive(Debug)]
pub(super) struct Worker {
    address: IpAddr,
}

impl Worker {
    pub(super) fn new(address: IpAddr) -> Self {
        Self { address }
    }

    pub(super) fn address(&self) -> IpAddr {
        self.address
    }

    /// Has the guest's shell run `script`, and returns what that has printed.
    pub(super) fn ask(&self, script: &str) -> Result<String> {
        let context = || format!("cannot speak to the guest at {}", self.address);
        let address = SocketAddr::new(self.address, PORT);
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE).with_context(context)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(script.as_bytes()).with_context(context)?;
        stream.shutdown(Shutdown::Write).with_context(context)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).with_context(context)?;
        Ok(answer)
    }
}
