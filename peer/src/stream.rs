//! The stream.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{TcpStream, ToSocketAddrs},
    sync::mpsc::{RecvTimeoutError, sync_channel},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::sockopt,
};
use snow::{Builder, HandshakeState, TransportState};

use crate::{
    Error,
    greeting::{self, GREETING_BYTES},
};

/// Bytes of the key that both sides have.
pub const KEY_BYTES: usize = 32;

const PATTERN: &str = "Noise_NNpsk0_25519_AESGCM_SHA256";
/// The most that Noise makes one message of.
const MAX_SEALED: usize = 65535;
const TAG_BYTES: usize = 16;
const MAX_OPEN: usize = MAX_SEALED - TAG_BYTES;
const LENGTH_BYTES: usize = 2;
/// No message of the handshake is longer.
const MAX_GREETING: usize = 256;

/// Who has not greeted by then is nobody.
const GREETING_TIME: Duration = Duration::from_secs(10);
/// How often who waits looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(100);
/// A host that is gone says nothing; its peer's kernel asks this often, and gives up after so many.
const KEEPALIVE: (Duration, u32) = (Duration::from_secs(15), 4);

/// One end of a stream. Dropped, it hangs up.
///
/// Who waits in it says by a function whether to go on, which is asked before each piece that is sent or received, and some times a second.
pub struct Stream {
    tcp: TcpStream,
    noise: TransportState,
    /// How long the peer may not move.
    patience: Option<Duration>,
    /// What is to be sent, and is less than a record.
    open: Vec<u8>,
    /// A record, sealed, with its length.
    sealed: Vec<u8>,
    /// What has come of the record that comes.
    coming: Vec<u8>,
    /// What has come, and how much of it was taken.
    came: Vec<u8>,
    taken: usize,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream")
            .field("tcp", &self.tcp)
            .finish_non_exhaustive()
    }
}

/// Which end of a handshake.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Connects,
    Listens,
}

impl Stream {
    /// Connects to the peer at `address`, like `host:7070`, which must have `key`.
    ///
    /// # Errors
    ///
    /// Nobody is there, or it is somebody else, or `wanted` says that it is not waited for any more.
    pub fn connect(
        address: &str,
        key: &[u8; KEY_BYTES],
        wanted: &dyn Fn() -> bool,
    ) -> Result<Self, Error> {
        // Neither who resolves names nor who connects can be interrupted: they end by themselves, with nobody waiting.
        let (done, connected) = sync_channel(1);
        let (address, key) = (address.to_owned(), *key);
        let connecting = thread::Builder::new().name("connect".to_owned());
        let started = connecting.spawn(move || drop(done.send(Self::connect_to(&address, &key))));
        started.map_err(Error::Io)?;
        loop {
            match connected.recv_timeout(LOOK) {
                Ok(connected) => return connected,
                Err(RecvTimeoutError::Disconnected) => return Err(Error::Closed),
                Err(RecvTimeoutError::Timeout) if wanted() => {}
                Err(RecvTimeoutError::Timeout) => return Err(Error::Unwanted),
            }
        }
    }

    fn connect_to(address: &str, key: &[u8; KEY_BYTES]) -> Result<Self, Error> {
        let addresses = address.to_socket_addrs().map_err(Error::Unreachable)?;
        let mut failed = io::Error::new(ErrorKind::NotFound, "the name has no address");
        for address in addresses {
            match TcpStream::connect_timeout(&address, GREETING_TIME) {
                Ok(tcp) => return Self::connected(tcp, key),
                Err(error) => failed = error,
            }
        }
        Err(Error::Unreachable(failed))
    }

    /// Greets who was connected to, and must have `key`.
    ///
    /// # Errors
    ///
    /// It is somebody else, or says nothing in ten seconds.
    pub fn connected(tcp: TcpStream, key: &[u8; KEY_BYTES]) -> Result<Self, Error> {
        Self::greet(tcp, key, End::Connects)
    }

    /// Greets who has connected, and must have `key`.
    ///
    /// # Errors
    ///
    /// It is somebody else, or says nothing in ten seconds.
    pub fn accept(tcp: TcpStream, key: &[u8; KEY_BYTES]) -> Result<Self, Error> {
        Self::greet(tcp, key, End::Listens)
    }

    fn greet(tcp: TcpStream, key: &[u8; KEY_BYTES], end: End) -> Result<Self, Error> {
        configure(&tcp)?;
        let mut greeting = Greeting {
            tcp: &tcp,
            until: Instant::now() + GREETING_TIME,
        };
        let noise = greeting.shake_hands(key, end)?;
        tcp.set_read_timeout(Some(LOOK))?;
        tcp.set_write_timeout(Some(LOOK))?;
        Ok(Self {
            tcp,
            noise,
            patience: None,
            open: Vec::with_capacity(MAX_OPEN),
            sealed: vec![0; LENGTH_BYTES + MAX_SEALED],
            coming: Vec::with_capacity(LENGTH_BYTES + MAX_SEALED),
            came: Vec::with_capacity(MAX_OPEN),
            taken: 0,
        })
    }

    /// Has a peer that neither sends nor takes anything for so long, while it is waited for, be an error.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = Some(patience);
    }

    /// Sends `bytes`, at the latest when [`Stream::flush`] is called.
    ///
    /// # Errors
    ///
    /// The peer is lost or silent, or `wanted` says that it is not waited for any more. Then the stream is of no use but to be heard.
    pub fn send(&mut self, mut bytes: &[u8], wanted: &dyn Fn() -> bool) -> Result<(), Error> {
        while !bytes.is_empty() {
            let fits = bytes.len().min(MAX_OPEN - self.open.len());
            let (now, later) = bytes.split_at(fits);
            self.open.extend_from_slice(now);
            bytes = later;
            if self.open.len() == MAX_OPEN {
                self.flush(wanted)?;
            }
        }
        Ok(())
    }

    /// Sends what is not sent yet.
    ///
    /// # Errors
    ///
    /// As of [`Stream::send`].
    pub fn flush(&mut self, wanted: &dyn Fn() -> bool) -> Result<(), Error> {
        if self.open.is_empty() {
            return Ok(());
        }
        let body = &mut self.sealed[LENGTH_BYTES..];
        let sealed = self.noise.write_message(&self.open, body);
        // It fails for what is too long, which this is not, and once all numbers of records are used up.
        let bytes = sealed.map_err(|error| Error::Io(io::Error::other(error)))?;
        self.open.clear();
        self.sealed[..LENGTH_BYTES].copy_from_slice(&(bytes as u16).to_be_bytes());
        self.write(LENGTH_BYTES + bytes, wanted)
    }

    /// Writes so many bytes of what is sealed.
    fn write(&mut self, bytes: usize, wanted: &dyn Fn() -> bool) -> Result<(), Error> {
        let mut wait = Wait::new(self.patience, wanted);
        let mut written = 0;
        while written < bytes {
            wait.look()?;
            match self.tcp.write(&self.sealed[written..bytes]) {
                Ok(0) => return Err(Error::Closed),
                Ok(some) => {
                    written += some;
                    wait.moved();
                }
                Err(error) => wait.after(error)?,
            }
        }
        Ok(())
    }

    /// Fills `buffer` with what the peer has sent.
    ///
    /// # Errors
    ///
    /// The peer is lost or silent, or has sent what nobody who has the key sends, or `wanted` says that it is not waited for any more.
    pub fn receive(
        &mut self,
        mut buffer: &mut [u8],
        wanted: &dyn Fn() -> bool,
    ) -> Result<(), Error> {
        while !buffer.is_empty() {
            if self.taken == self.came.len() {
                self.receive_record(wanted)?;
            }
            let fits = buffer.len().min(self.came.len() - self.taken);
            let (now, later) = std::mem::take(&mut buffer).split_at_mut(fits);
            now.copy_from_slice(&self.came[self.taken..self.taken + fits]);
            self.taken += fits;
            buffer = later;
        }
        Ok(())
    }

    fn receive_record(&mut self, wanted: &dyn Fn() -> bool) -> Result<(), Error> {
        self.read(LENGTH_BYTES, wanted)?;
        let length = u16::from_be_bytes([self.coming[0], self.coming[1]]);
        self.read(LENGTH_BYTES + usize::from(length), wanted)?;
        self.came.resize(MAX_OPEN, 0);
        self.taken = 0;
        let body = &self.coming[LENGTH_BYTES..];
        let opened = self.noise.read_message(body, &mut self.came);
        self.coming.clear();
        let bytes = opened.map_err(|_| Error::Forged);
        self.came.truncate(*bytes.as_ref().unwrap_or(&0));
        bytes.map(drop)
    }

    /// Reads until so many bytes have come of the record that comes. What has come stays if this fails, so that it can be gone on with.
    fn read(&mut self, bytes: usize, wanted: &dyn Fn() -> bool) -> Result<(), Error> {
        let mut wait = Wait::new(self.patience, wanted);
        while self.coming.len() < bytes {
            wait.look()?;
            let have = self.coming.len();
            self.coming.resize(bytes, 0);
            let read = self.tcp.read(&mut self.coming[have..]);
            self.coming.truncate(have + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => return Err(Error::Closed),
                Ok(_) => wait.moved(),
                Err(error) => wait.after(error)?,
            }
        }
        Ok(())
    }

    /// Whether the peer has said something, or hung up.
    ///
    /// # Errors
    ///
    /// What the host says.
    pub fn has_come(&self) -> Result<bool, Error> {
        if self.taken < self.came.len() {
            return Ok(true);
        }
        let mut sockets = [PollFd::new(&self.tcp, PollFlags::IN)];
        let ready = poll(&mut sockets, Some(&Timespec::default())).map_err(io::Error::from)?;
        Ok(ready > 0)
    }

    /// Says that nothing more is sent, and hears the peer until it hangs up, for at most so long: who hangs up at once while something is
    /// on its way has the peer not hear what was said last.
    pub fn close(mut self, at_most: Duration) {
        let until = Instant::now() + at_most;
        let wanted = || Instant::now() < until;
        if self.flush(&wanted).is_err() || self.tcp.shutdown(std::net::Shutdown::Write).is_err() {
            return;
        }
        while wanted() {
            match self.tcp.read(&mut self.sealed) {
                Ok(0) => return,
                Err(error) if !is_early(&error) => return,
                _ => {}
            }
        }
    }
}

/// Both sides before they have a key of their own.
struct Greeting<'a> {
    tcp: &'a TcpStream,
    until: Instant,
}

impl Greeting<'_> {
    fn shake_hands(&mut self, key: &[u8; KEY_BYTES], end: End) -> Result<TransportState, Error> {
        let ours = greeting::ours();
        self.write(&ours)?;
        let mut theirs = [0; GREETING_BYTES];
        self.read(&mut theirs)?;
        greeting::check(&theirs)?;
        let prologue = match end {
            End::Connects => [ours, theirs].concat(),
            End::Listens => [theirs, ours].concat(),
        };
        let mut state = handshake(key, &prologue, end).map_err(internal)?;
        while !state.is_handshake_finished() {
            match state.is_my_turn() {
                true => self.say(&mut state)?,
                false => self.hear(&mut state)?,
            }
        }
        let mut noise = state.into_transport_mode().map_err(internal)?;
        match end {
            End::Connects => self.prove(&mut noise)?,
            End::Listens => self.see_proof(&mut noise)?,
        }
        Ok(noise)
    }

    /// Sends an empty record. What somebody has recorded of another connection opens a handshake as well, but he cannot seal one.
    fn prove(&mut self, noise: &mut TransportState) -> Result<(), Error> {
        let mut record = [0; LENGTH_BYTES + TAG_BYTES];
        let sealed = noise.write_message(&[], &mut record[LENGTH_BYTES..]);
        let bytes = sealed.map_err(internal)?;
        record[..LENGTH_BYTES].copy_from_slice(&(bytes as u16).to_be_bytes());
        self.write(&record)
    }

    fn see_proof(&mut self, noise: &mut TransportState) -> Result<(), Error> {
        let record = self.message()?;
        let mut content = [0; MAX_GREETING];
        match noise.read_message(&record, &mut content) {
            Ok(0) => Ok(()),
            Ok(_) | Err(_) => Err(Error::Key),
        }
    }

    fn say(&mut self, state: &mut HandshakeState) -> Result<(), Error> {
        let mut message = [0; 256];
        let bytes = state
            .write_message(&[], &mut message[LENGTH_BYTES..])
            .map_err(internal)?;
        message[..LENGTH_BYTES].copy_from_slice(&(bytes as u16).to_be_bytes());
        self.write(&message[..LENGTH_BYTES + bytes])
    }

    fn hear(&mut self, state: &mut HandshakeState) -> Result<(), Error> {
        let message = self.message()?;
        let mut payload = [0; MAX_GREETING];
        let heard = state.read_message(&message, &mut payload);
        heard.map(drop).map_err(|_| Error::Key)
    }

    /// The next message, behind its length.
    fn message(&mut self) -> Result<Vec<u8>, Error> {
        let mut length = [0; LENGTH_BYTES];
        // Who has another key hangs up when it is shown this one.
        let or_key = |error| match error {
            Error::Closed => Error::Key,
            error => error,
        };
        self.read(&mut length).map_err(or_key)?;
        let bytes = usize::from(u16::from_be_bytes(length));
        if bytes > MAX_GREETING {
            return Err(Error::Key);
        }
        let mut message = vec![0; bytes];
        self.read(&mut message).map_err(or_key)?;
        Ok(message)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.tcp.set_write_timeout(Some(self.left()?))?;
        let written = self.tcp.write_all(bytes);
        written.map_err(late)
    }

    /// Fills `buffer`, however slowly it comes, but in time.
    fn read(&mut self, buffer: &mut [u8]) -> Result<(), Error> {
        let mut have = 0;
        while have < buffer.len() {
            self.tcp.set_read_timeout(Some(self.left()?))?;
            match self.tcp.read(&mut buffer[have..]) {
                Ok(0) => return Err(Error::Closed),
                Ok(some) => have += some,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(late(error)),
            }
        }
        Ok(())
    }

    fn left(&self) -> Result<Duration, Error> {
        let left = self.until.saturating_duration_since(Instant::now());
        // A timeout of zero would be none.
        let left = Some(left).filter(|left| !left.is_zero());
        left.ok_or(Error::Silent(GREETING_TIME.as_secs()))
    }
}

fn handshake(
    key: &[u8; KEY_BYTES],
    prologue: &[u8],
    end: End,
) -> Result<HandshakeState, snow::Error> {
    let builder = Builder::new(PATTERN.parse()?)
        .prologue(prologue)?
        .psk(0, key)?;
    match end {
        End::Connects => builder.build_initiator(),
        End::Listens => builder.build_responder(),
    }
}

/// Of this side alone: the host has no random numbers, say.
fn internal(error: snow::Error) -> Error {
    Error::Io(io::Error::other(error))
}

fn late(error: io::Error) -> Error {
    match is_early(&error) {
        true => Error::Silent(GREETING_TIME.as_secs()),
        false => error.into(),
    }
}

/// Whether nothing has happened but that time has passed.
fn is_early(error: &io::Error) -> bool {
    use ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), Interrupted | TimedOut | WouldBlock)
}

fn configure(tcp: &TcpStream) -> Result<(), Error> {
    let (every, count) = KEEPALIVE;
    tcp.set_nodelay(true)?;
    let keep_alive = || -> rustix::io::Result<()> {
        sockopt::set_socket_keepalive(tcp, true)?;
        sockopt::set_tcp_keepidle(tcp, every)?;
        sockopt::set_tcp_keepintvl(tcp, every)?;
        sockopt::set_tcp_keepcnt(tcp, count)
    };
    keep_alive().map_err(|errno| Error::Io(errno.into()))
}

/// Somebody who waits for the peer to move.
struct Wait<'a> {
    patience: Option<Duration>,
    since: Instant,
    wanted: &'a dyn Fn() -> bool,
}

impl<'a> Wait<'a> {
    fn new(patience: Option<Duration>, wanted: &'a dyn Fn() -> bool) -> Self {
        Self {
            patience,
            since: Instant::now(),
            wanted,
        }
    }

    fn moved(&mut self) {
        self.since = Instant::now();
    }

    /// Whether to go on at all.
    fn look(&self) -> Result<(), Error> {
        match (self.wanted)() {
            true => Ok(()),
            false => Err(Error::Unwanted),
        }
    }

    /// Whether to go on after a read or a write that failed like this.
    fn after(&self, error: io::Error) -> Result<(), Error> {
        if !is_early(&error) {
            return Err(error.into());
        }
        match self.patience {
            Some(patience) if self.since.elapsed() >= patience => {
                Err(Error::Silent(patience.as_secs()))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
