//! The host's side: Unix sockets.
//!
//! Who connects to `PATH` says `CONNECT <port>`, and is answered `OK <port of the host's side>` once the guest
//! has accepted. What the guest connects to port N of the host's goes to whoever listens on `PATH_N`.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fs,
    io::{self, Read, Write},
    mem,
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            fs::FileTypeExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    event::{Timespec, epoll},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};

use super::{
    VsockError,
    connection::{Connection, Stage},
    metrics::VsockMetrics,
    packet::{Header, Operation, Ports},
};
use crate::random::random;

/// The most connections, of which each may buffer what a guest has sent.
pub(super) const MAX_CONNECTIONS: usize = 512;
/// The most answers to packets of no connection that wait; a guest that does not take them gets no more.
const MAX_ORPHANS: usize = 64;
/// `CONNECT`, the largest port, and a newline.
const MAX_GREETING: usize = 32;
/// Where ports of the host's side begin that nobody has asked for.
const FIRST_PORT: u32 = 1 << 30;
/// The listener's token; streams count on from it.
const LISTENER: u64 = 0;

/// A stream of the host's.
struct Stream {
    socket: UnixStream,
    /// What is known since the last event: a read or write may find something, or room.
    readable: bool,
    writable: bool,
    /// In the queue of those with something for the guest.
    queued: bool,
    /// It has not been told that nothing more is written to it, or read from it.
    writes: bool,
    reads: bool,
    role: Role,
}

enum Role {
    /// It has not said yet which port it wants; what it has said so far.
    Greeting(Vec<u8>),
    Connected {
        ports: Ports,
        connection: Connection,
        /// What the guest has sent and the socket has not taken.
        backlog: VecDeque<u8>,
    },
}

/// All streams.
pub(super) struct Host {
    path: PathBuf,
    listener: UnixListener,
    epoll: OwnedFd,
    streams: BTreeMap<u64, Stream>,
    by_ports: HashMap<Ports, u64>,
    next_token: u64,
    next_port: u32,
    /// Streams that may have something for the guest, in turn.
    due: VecDeque<u64>,
    /// Connections that are none, of which the guest is to be told.
    orphans: VecDeque<Ports>,
    metrics: Arc<VsockMetrics>,
}

impl Host {
    pub(super) fn listen(path: &Path, metrics: Arc<VsockMetrics>) -> Result<Self, VsockError> {
        let failed = |source| VsockError::Listen {
            path: path.to_owned(),
            source,
        };
        // One that a VMM left behind that was killed is nobody's; one that answers is somebody's.
        if let Ok(found) = fs::symlink_metadata(path) {
            // Without waiting for who is there and does not answer.
            match dial(path) {
                Err(error)
                    if error.kind() == io::ErrorKind::ConnectionRefused
                        // A file refuses too.
                        && found.file_type().is_socket() =>
                {
                    fs::remove_file(path).map_err(failed)?;
                }
                _ => return Err(VsockError::InUse(path.to_owned())),
            }
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        watch(&epoll, &listener, LISTENER, epoll::EventFlags::IN).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            listener,
            epoll,
            streams: BTreeMap::new(),
            by_ports: HashMap::new(),
            next_token: LISTENER + 1,
            // Not always the first: a guest that was restored keeps sockets of its last connections until whoever has them
            // closes them, and takes a request from the same port to the same port for one of those.
            next_port: next_port(random()),
            due: VecDeque::new(),
            orphans: VecDeque::new(),
            metrics,
        })
    }

    /// Readable when [`Host::poll`] has something to do.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Closes all connections. Listening goes on.
    pub(super) fn clear(&mut self) {
        self.streams.clear();
        self.by_ports.clear();
        self.due.clear();
        self.orphans.clear();
    }

    /// Whether there may be something for the guest.
    pub(super) fn has_due(&self) -> bool {
        !self.due.is_empty() || !self.orphans.is_empty()
    }

    /// Takes in what has happened to the sockets.
    pub(super) fn poll(&mut self) {
        let mut events = Vec::with_capacity(64);
        // Bounded: each stream can be found ready once, and what becomes ready meanwhile makes an event.
        for _ in 0..=MAX_CONNECTIONS / 64 {
            events.clear();
            let now = Timespec::default();
            let buffer = rustix::buffer::spare_capacity(&mut events);
            if epoll::wait(&self.epoll, buffer, Some(&now)).unwrap_or(0) == 0 {
                return;
            }
            for event in &events {
                let (token, flags) = (event.data.u64(), event.flags);
                if token == LISTENER {
                    self.accept();
                } else {
                    self.happened(token, flags);
                }
            }
        }
    }

    fn accept(&mut self) {
        for _ in 0..MAX_CONNECTIONS {
            let Ok((socket, _)) = self.listener.accept() else {
                return;
            };
            if !self.has_room() || socket.set_nonblocking(true).is_err() {
                self.metrics.refused.add(1);
                continue;
            }
            // Its first event, that it is writable, has it looked at.
            self.insert(socket, Role::Greeting(Vec::new()));
        }
    }

    /// Whether there is room for another stream, or would be if one that is over were forgotten.
    fn has_room(&self) -> bool {
        self.streams.len() < MAX_CONNECTIONS || self.oldest_over().is_some()
    }

    /// The oldest of those that are only there for a reader that is slow, or hangs.
    fn oldest_over(&self) -> Option<u64> {
        let over = |stream: &Stream| matches!(&stream.role, Role::Connected { connection, .. } if connection.is_gone());
        let (token, _) = self.streams.iter().find(|(_, stream)| over(stream))?;
        Some(*token)
    }

    /// Where there is no room, in place of the oldest that is over.
    fn insert(&mut self, socket: UnixStream, role: Role) -> Option<u64> {
        let token = self.next_token;
        let flags = epoll::EventFlags::IN
            | epoll::EventFlags::OUT
            | epoll::EventFlags::RDHUP
            | epoll::EventFlags::ET;
        if watch(&self.epoll, &socket, token, flags).is_err() {
            self.metrics.refused.add(1);
            return None;
        }
        if self.streams.len() >= MAX_CONNECTIONS
            && let Some(over) = self.oldest_over()
        {
            self.forget(over);
        }
        self.next_token += 1;
        let stream = Stream {
            socket,
            readable: true,
            writable: true,
            queued: false,
            writes: true,
            reads: true,
            role,
        };
        self.streams.insert(token, stream);
        Some(token)
    }

    fn happened(&mut self, token: u64, flags: epoll::EventFlags) {
        let Some(stream) = self.streams.get_mut(&token) else {
            return;
        };
        stream.readable |= flags != epoll::EventFlags::OUT;
        stream.writable |= flags.contains(epoll::EventFlags::OUT);
        if let Role::Greeting(said) = &mut stream.role {
            match greeting(&mut stream.socket, said) {
                Greeting::Wants(port) => self.ask_guest(token, port),
                Greeting::Unfinished => {}
                Greeting::Nonsense => self.forget(token),
            }
        } else {
            flush(stream, &self.metrics);
            if flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
                give_up_unread(stream);
            }
            self.note(token);
        }
    }

    /// Has the guest asked for a connection to its `port`.
    fn ask_guest(&mut self, token: u64, port: u32) {
        let mut ports = Ports {
            host: self.next_port,
            guest: port,
        };
        while self.by_ports.contains_key(&ports) {
            ports.host = next_port(ports.host);
        }
        self.next_port = next_port(ports.host);
        if let Some(stream) = self.streams.get_mut(&token) {
            stream.role = connected(ports, Connection::to_guest());
            self.by_ports.insert(ports, token);
            self.note(token);
        }
    }

    /// Queues a stream if it has something for the guest, and forgets it if it is at its end.
    fn note(&mut self, token: u64) {
        let Some(stream) = self.streams.get_mut(&token) else {
            return;
        };
        let Role::Connected {
            ports,
            connection,
            backlog,
        } = &stream.role
        else {
            return;
        };
        if connection.is_gone() {
            if backlog.is_empty() {
                self.forget(token);
            } else {
                // Who reads slowly still gets all that was sent before the end: a guest may give a connection up seconds
                // after it has closed it. To the guest it is none any more, and it makes room for one that is.
                let ports = *ports;
                self.release(ports, token);
            }
            return;
        }
        let wants = connection.has_control() || stream.readable && connection.credit() > 0;
        if wants && !stream.queued {
            stream.queued = true;
            self.due.push_back(token);
        }
    }

    fn forget(&mut self, token: u64) {
        // Closed with it, and thereby not watched any more.
        let Some(stream) = self.streams.remove(&token) else {
            return;
        };
        if stream.queued {
            // Or a guest that takes no answers could have the queue grow for ever.
            self.due.retain(|due| *due != token);
        }
        if let Role::Connected { ports, .. } = stream.role {
            self.release(ports, token);
        }
    }

    /// Frees the ports of a stream, if they are not another's by now.
    fn release(&mut self, ports: Ports, token: u64) {
        if self.by_ports.get(&ports) == Some(&token) {
            self.by_ports.remove(&ports);
        }
    }

    /// The next packet for the guest of `cid`, with its data in the front of `room`.
    pub(super) fn next_packet(&mut self, cid: u64, room: &mut [u8]) -> Option<Header> {
        if let Some(ports) = self.orphans.pop_front() {
            return Some(Header::to_guest(cid, ports, Operation::Reset));
        }
        while let Some(token) = self.due.pop_front() {
            let packet = self.packet_of(token, cid, room);
            self.note(token);
            if packet.is_some() {
                return packet;
            }
        }
        None
    }

    fn packet_of(&mut self, token: u64, cid: u64, room: &mut [u8]) -> Option<Header> {
        let stream = self.streams.get_mut(&token)?;
        stream.queued = false;
        let Role::Connected {
            ports, connection, ..
        } = &mut stream.role
        else {
            return None;
        };
        if let Some((operation, flags)) = connection.next_control() {
            let mut header = Header::to_guest(cid, *ports, operation);
            header.flags = flags;
            connection.tell(&mut header);
            return Some(header);
        }
        let most = room.len().min(connection.credit() as usize);
        if !stream.readable || most == 0 {
            return None;
        }
        match stream.socket.read(&mut room[..most]) {
            Ok(0) => {
                stream.readable = false;
                connection.end_of_host();
                connection.finish();
                None
            }
            Ok(bytes) => {
                connection.send(bytes as u32);
                self.metrics.received_bytes.add(bytes as u64);
                let mut header = Header::to_guest(cid, *ports, Operation::Data);
                header.len = bytes as u32;
                connection.tell(&mut header);
                Some(header)
            }
            Err(error) if again(&error) => {
                stream.readable = error.kind() == io::ErrorKind::Interrupted;
                None
            }
            Err(_) => {
                connection.reset();
                None
            }
        }
    }

    /// Takes a packet of the guest's. Its data is asked for, by length, only when it is to be kept.
    pub(super) fn take(&mut self, header: &Header, data: impl FnOnce(usize) -> Vec<u8>) {
        let ports = header.ports();
        let operation = Operation::of(header.operation);
        match (self.by_ports.get(&ports).copied(), operation) {
            (Some(token), operation) => {
                self.take_of(token, operation, header, data);
                self.note(token);
            }
            (None, Some(Operation::Request)) => self.request(header),
            (None, Some(Operation::Reset)) => {}
            (None, _) => self.orphan(ports),
        }
    }

    fn take_of(
        &mut self,
        token: u64,
        operation: Option<Operation>,
        header: &Header,
        data: impl FnOnce(usize) -> Vec<u8>,
    ) {
        let Some(stream) = self.streams.get_mut(&token) else {
            return;
        };
        let Role::Connected {
            ports,
            connection,
            backlog,
        } = &mut stream.role
        else {
            return;
        };
        let asked = connection.stage == Stage::Asked;
        match operation.map(|operation| (operation, connection.take(operation, header))) {
            Some((Operation::Data, Ok(()))) if connection.stage == Stage::Open => {
                backlog.extend(data(header.len as usize));
            }
            Some((_, Ok(()))) => {}
            Some((_, Err(_))) | None => {
                self.metrics.broken.add(1);
                connection.reset();
            }
        }
        if asked && connection.stage == Stage::Open {
            self.metrics.connections.add(1);
            // Nothing was written before, so that there is room.
            let said = format!("OK {}\n", ports.host);
            if stream.socket.write_all(said.as_bytes()).is_err() {
                connection.reset();
            }
        }
        flush(stream, &self.metrics);
    }

    /// The guest wants a connection.
    fn request(&mut self, header: &Header) {
        let ports = header.ports();
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", ports.host));
        let socket = self.has_room().then(|| dial(Path::new(&path)));
        if let Some(Ok(socket)) = socket {
            let role = connected(ports, Connection::from_guest(header));
            if let Some(token) = self.insert(socket, role) {
                self.metrics.connections.add(1);
                self.by_ports.insert(ports, token);
                self.note(token);
                return;
            }
        }
        self.metrics.refused.add(1);
        self.orphan(ports);
    }

    /// Has the guest told that there is no such connection.
    pub(super) fn orphan(&mut self, ports: Ports) {
        if self.orphans.len() < MAX_ORPHANS {
            self.orphans.push_back(ports);
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Nobody is left to complain to.
        let _ = fs::remove_file(&self.path);
    }
}

fn connected(ports: Ports, connection: Connection) -> Role {
    Role::Connected {
        ports,
        connection,
        backlog: VecDeque::new(),
    }
}

fn next_port(port: u32) -> u32 {
    // Half of all ports, which are more than there can be connections.
    FIRST_PORT | (port.wrapping_add(1) & (FIRST_PORT - 1))
}

/// Writes what the guest has sent, as far as the socket takes it.
fn flush(stream: &mut Stream, metrics: &VsockMetrics) {
    let Role::Connected {
        connection,
        backlog,
        ..
    } = &mut stream.role
    else {
        return;
    };
    while stream.writable && !backlog.is_empty() {
        match stream.socket.write(backlog.as_slices().0) {
            Ok(bytes) => {
                backlog.drain(..bytes);
                connection.forward(bytes as u32);
                metrics.sent_bytes.add(bytes as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if again(&error) => stream.writable = false,
            Err(_) => {
                backlog.clear();
                connection.reset();
                return;
            }
        }
    }
    // Each once: it is an event of the socket's own, after which this is looked at again. It fails when the other side has gone,
    // which is found out by reading, or by an event.
    if backlog.is_empty() && !connection.guest_sends && mem::take(&mut stream.writes) {
        let _ = stream.socket.shutdown(Shutdown::Write);
    }
    if !connection.takes() && mem::take(&mut stream.reads) {
        let _ = stream.socket.shutdown(Shutdown::Read);
    }
    connection.finish();
}

/// Ends the connection of somebody who has gone for good, if nobody reads from it, who would find that out once there is nothing
/// left: the guest has not accepted it yet, or receives nothing any more.
fn give_up_unread(stream: &mut Stream) {
    if let Role::Connected {
        connection,
        backlog,
        ..
    } = &mut stream.role
        && (connection.stage == Stage::Asked || !connection.takes())
    {
        // Every write would fail.
        backlog.clear();
        connection.reset();
    }
}

/// What a stream has said about where it wants to go.
enum Greeting {
    Wants(u32),
    Unfinished,
    Nonsense,
}

/// Reads no further than the end of the line: what follows is for the guest.
fn greeting(socket: &mut UnixStream, said: &mut Vec<u8>) -> Greeting {
    let mut byte = [0];
    while said.len() < MAX_GREETING {
        match socket.read(&mut byte) {
            Ok(0) => return Greeting::Nonsense,
            Ok(_) if byte == *b"\n" => {
                let line = std::str::from_utf8(said).unwrap_or_default();
                let port = line.strip_prefix("CONNECT ").map(str::trim).map(str::parse);
                return port
                    .and_then(Result::ok)
                    .map_or(Greeting::Nonsense, Greeting::Wants);
            }
            Ok(_) => said.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if again(&error) => return Greeting::Unfinished,
            Err(_) => return Greeting::Nonsense,
        }
    }
    Greeting::Nonsense
}

/// Connects to the socket at `path`, unless that would have to wait.
fn dial(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

fn again(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

fn watch(epoll: &OwnedFd, what: impl AsFd, token: u64, flags: epoll::EventFlags) -> io::Result<()> {
    epoll::add(epoll, what, epoll::EventData::new_u64(token), flags)?;
    Ok(())
}
