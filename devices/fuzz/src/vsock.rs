//! The socket device, with who connects to it and whom it connects to.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::Once,
};

use devices::virtio::{MmioTransport, VirtioDevice, vsock::Vsock};
use fuzz_harness::Input;

use crate::{
    Bench, Part, Subject,
    guest::{Offered, any_parts},
    scratch::Scratch,
};

const RECEIVE: u16 = 0;
const SEND: u16 = 1;
const EVENT: u16 = 2;

const CID: u64 = 7;
const HOST_CID: u64 = 2;
const STREAM: u16 = 1;
const HEADER_BYTES: u32 = 44;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const DATA: u16 = 5;

/// The port that somebody listens on.
const PORT: u32 = 52;
/// And the first that a device that is built for a fuzzer gives to who connects.
const FIRST_PORT: u32 = (1 << 30) + 1;
/// More than all those who may be waiting have to say.
const MOST_PACKETS: usize = 4000;
/// Streams that a program may have.
const MOST_STREAMS: usize = 24;

thread_local! {
    static SCRATCH: Scratch = Scratch::new();
}

/// The host's side.
pub struct Streams {
    path: PathBuf,
    listener: UnixListener,
    streams: Vec<UnixStream>,
}

impl Subject for Streams {
    fn new(_input: &mut Input<'_>) -> Self {
        // As the runtime of a program with a `main` of Rust's does.
        static PIPE: Once = Once::new();
        // SAFETY: no handler is installed, and nothing here relies on the signal.
        PIPE.call_once(|| unsafe {
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        });
        let path = SCRATCH.with(|scratch| {
            scratch.clear();
            scratch.path("v")
        });
        let listener = UnixListener::bind(path.with_file_name(format!("v_{PORT}")));
        let listener = listener.expect("nobody else listens there");
        listener.set_nonblocking(true).expect("it is a socket");
        Self {
            path,
            listener,
            streams: Vec::new(),
        }
    }

    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(Vsock::listen(CID, &self.path).expect("nobody else listens there"))
    }

    fn compose(&mut self, queue: u16, input: &mut Input<'_>) -> Vec<Part> {
        match (queue, input.byte()) {
            (_, 250..) => any_parts(input),
            (RECEIVE, 0..100) => vec![Part::In(4096)],
            (RECEIVE | EVENT, _) => vec![Part::In(u32::from(input.byte()))],
            _ => packet(input),
        }
    }

    fn outside(&mut self, _transport: &MmioTransport, input: &mut Input<'_>) {
        let which = usize::from(input.byte());
        let last = self
            .streams
            .len()
            .checked_sub(1)
            .map(|last| which % (last + 1));
        match (input.byte() % 8, last) {
            (0..2, _) | (_, None) => self.connect(input),
            (2 | 3, Some(stream)) => {
                let bytes = vec![b'x'; usize::from(input.half())];
                let _ = self.streams[stream].write(&bytes);
            }
            (4 | 5, Some(stream)) => {
                let mut buffer = vec![0; usize::from(input.half())];
                let _ = self.streams[stream].read(&mut buffer);
            }
            (6, Some(stream)) => drop(self.streams.swap_remove(stream)),
            (_, Some(stream)) => {
                let _ = self.streams[stream].shutdown(std::net::Shutdown::Write);
            }
        }
        self.accept();
    }

    fn prove(&mut self, bench: &mut Bench) {
        self.accept();
        self.streams.clear();
        let mut ear = Ear(None);
        let ports = (PORT, 1 << 20);
        let (len, _) = bench.request(SEND, &[Part::Out(header(ports, REQUEST, 0))]);
        assert_eq!(len, 0);
        let (mut stream, _) = self.listener.accept().expect("it does not connect");
        ear.wait_for(bench, ports, RESPONSE);

        let packet = [
            Part::Out(header(ports, DATA, 5)),
            Part::Out(b"hello".to_vec()),
        ];
        bench.request(SEND, &packet);
        let mut said = [0; 5];
        stream.read_exact(&mut said).expect("it is not passed on");
        assert_eq!(&said, b"hello");

        stream.write_all(b"there").expect("it is open");
        assert_eq!(ear.wait_for(bench, ports, DATA), b"there");
    }
}

/// What the guest hears: of those, too, who have connected before the device was reset and are still waiting.
struct Ear(Option<Offered>);

impl Ear {
    /// Takes packets until one is of this connection and does this; returns its data.
    fn wait_for(&mut self, bench: &mut Bench, ports: (u32, u32), operation: u16) -> Vec<u8> {
        for _ in 0..MOST_PACKETS {
            let room = match self.0.take() {
                Some(room) => room,
                None => bench.offer(RECEIVE, &[Part::In(HEADER_BYTES + 4000)]),
            };
            bench.device().serve(RECEIVE.into());
            bench.serve_notified();
            let Some((len, packet)) = bench.guest.outcome(&room) else {
                self.0 = Some(room);
                break;
            };
            if is(&packet, ports, operation) {
                return packet[0][HEADER_BYTES as usize..len as usize].to_vec();
            }
        }
        panic!("the guest does not hear operation {operation}");
    }
}

impl Streams {
    fn connect(&mut self, input: &mut Input<'_>) {
        if self.streams.len() >= MOST_STREAMS {
            return;
        }
        let Ok(mut stream) = UnixStream::connect(&self.path) else {
            return;
        };
        stream.set_nonblocking(true).expect("it is a socket");
        let len = usize::from(input.byte());
        let _ = match len {
            0..200 => stream.write(format!("CONNECT {}\n", len % 8).as_bytes()),
            _ => stream.write(input.bytes(len - 190)),
        };
        self.streams.push(stream);
    }

    /// Takes the connections that the guest has made.
    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            stream.set_nonblocking(true).expect("it is a socket");
            if self.streams.len() < MOST_STREAMS {
                self.streams.push(stream);
            }
        }
    }
}

/// The header of a packet of the guest's, from its port to the host's.
fn header((host, guest): (u32, u32), operation: u16, len: u32) -> Vec<u8> {
    let mut bytes = CID.to_le_bytes().to_vec();
    bytes.extend(HOST_CID.to_le_bytes());
    for word in [guest, host, len] {
        bytes.extend(word.to_le_bytes());
    }
    for half in [STREAM, operation] {
        bytes.extend(half.to_le_bytes());
    }
    // Flags, room, and how much of it was taken.
    for word in [0u32, 1 << 16, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

/// Whether a packet for the guest is of this connection and does this.
fn is(room: &[Vec<u8>], (host, guest): (u32, u32), operation: u16) -> bool {
    let packet = &room[0];
    packet[16..20] == host.to_le_bytes()
        && packet[20..24] == guest.to_le_bytes()
        && packet[30..32] == operation.to_le_bytes()
}

fn packet(input: &mut Input<'_>) -> Vec<Part> {
    let host = match input.byte() {
        0..100 => PORT,
        port => FIRST_PORT + u32::from(port % 8),
    };
    let guest = u32::from(input.byte() % 8);
    let operation = u16::from(input.byte() % 9);
    let bytes = match input.byte() {
        0..128 => 0,
        128..250 => usize::from(input.byte()),
        _ => usize::from(input.half()),
    };
    let mut header = header((host, guest), operation, bytes as u32);
    for _ in 0..input.byte() % 4 {
        let at = usize::from(input.byte()) % header.len();
        header[at] = input.byte();
    }
    let mut parts = vec![Part::Out(header)];
    if bytes > 0 {
        parts.push(Part::Out(vec![b'g'; bytes]));
    }
    parts
}
