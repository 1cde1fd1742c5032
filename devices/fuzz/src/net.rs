//! The network device on a socket, with who is at its other end.

use std::os::fd::OwnedFd;

use devices::{
    RateLimit,
    virtio::{
        MmioTransport, VirtioDevice,
        net::{Net, NetOptions},
    },
};
use fuzz_harness::Input;
use rustix::{
    io::dup,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair},
};

use crate::{Bench, Part, Subject, guest::any_parts};

const RECEIVE: u16 = 0;
const SEND: u16 = 1;
const HEADER_BYTES: usize = 12;
/// Of a frame, with its header.
const MOST_BYTES: u32 = 65_535 + 18 + HEADER_BYTES as u32;
/// Frames that may wait in a socket of messages.
const MOST_WAITING: usize = 600;

/// A pair of sockets.
pub struct Wire {
    inside: OwnedFd,
    /// There is none once it was hung up.
    outside: Option<OwnedFd>,
}

impl Subject for Wire {
    fn new(input: &mut Input<'_>) -> Self {
        let kind = if input.flag() {
            SocketType::DGRAM
        } else {
            SocketType::SEQPACKET
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = socketpair(AddressFamily::UNIX, kind, flags, None);
        let (inside, outside) = pair.expect("there are descriptors");
        Self {
            inside,
            outside: Some(outside),
        }
    }

    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let options = NetOptions {
            mac: [2, 0, 0, 0, 0, 7],
            receive_limit: RateLimit::default(),
            send_limit: RateLimit::default(),
        };
        let inside = dup(&self.inside).expect("there are descriptors");
        Box::new(Net::socket(inside, options).expect("it is a socket of messages"))
    }

    fn compose(&mut self, queue: u16, input: &mut Input<'_>) -> Vec<Part> {
        let bytes = match input.byte() {
            0..100 => 1526,
            100..160 => 60,
            160..200 => MOST_BYTES,
            _ => input.half().into(),
        };
        match (queue, input.byte()) {
            (_, 250..) => any_parts(input),
            (RECEIVE, _) => vec![Part::In(bytes)],
            (_, by) => {
                let mut header = vec![0; HEADER_BYTES];
                if by > 200 {
                    header[0] = input.byte();
                    header[1] = input.byte();
                }
                vec![Part::Out(header), Part::Out(vec![by; bytes as usize])]
            }
        }
    }

    fn outside(&mut self, _transport: &MmioTransport, input: &mut Input<'_>) {
        let Some(outside) = &self.outside else { return };
        match input.byte() {
            0..160 => {
                // Where a connection has an end, that is what a message of no bytes means.
                let bytes = usize::from(input.half()).max(1);
                for _ in 0..=input.byte() % 16 {
                    let _ = send(outside, &vec![7; bytes], SendFlags::DONTWAIT);
                }
            }
            160..254 => self.drain(),
            _ => self.outside = None,
        }
    }

    fn prove(&mut self, bench: &mut Bench) {
        self.drain();
        let to_send: Vec<u8> = (0..100).collect();
        let packet = [Part::Out(vec![0; HEADER_BYTES]), Part::Out(to_send.clone())];
        assert_eq!(bench.request(SEND, &packet).0, 0);
        let Some(outside) = &self.outside else { return };
        let mut got = [0; 200];
        let (len, _) = recv(outside, &mut got, RecvFlags::DONTWAIT).expect("the frame is sent");
        assert_eq!(got[..len], to_send);

        // Those that have waited come before it, and may leave no room for it.
        let to_receive = [9; 64];
        let mut sent = false;
        for _ in 0..MOST_WAITING {
            sent = sent || send(outside, &to_receive, SendFlags::DONTWAIT).is_ok();
            let offered = bench.offer(RECEIVE, &[Part::In(MOST_BYTES)]);
            bench.device().serve(RECEIVE.into());
            bench.serve_notified();
            let outcome = bench.guest.outcome(&offered);
            let (len, room) = outcome.expect("a frame that waits is not received");
            if room.concat()[HEADER_BYTES..len as usize] == to_receive {
                return;
            }
        }
        panic!("it is not received");
    }
}

impl Wire {
    /// Takes what the guest has sent.
    fn drain(&self) {
        let mut buffer = [0; 16];
        let Some(outside) = &self.outside else { return };
        while recv(outside, &mut buffer, RecvFlags::DONTWAIT).is_ok_and(|(len, _)| len > 0) {}
    }
}
