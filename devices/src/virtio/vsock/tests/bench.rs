//! A vsock device whose guest and host are the test's.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
};

use tempfile::TempDir;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;
use vm_memory::GuestAddress;

use super::super::{packet::Ports, *};
use crate::{
    Device,
    conformance::Subject,
    sync::lock,
    virtio::{
        MMIO_BYTES, MmioTransport,
        driver::{self, Driver, Part, VERSION_1, get},
    },
};

pub(super) const CID: u64 = 7;
pub(super) const REQUEST: u16 = 1;
pub(super) const RESPONSE: u16 = 2;
pub(super) const RESET: u16 = 3;
pub(super) const SHUTDOWN: u16 = 4;
pub(super) const DATA: u16 = 5;
pub(super) const CREDIT_UPDATE: u16 = 6;
/// What the guest of these tests has room for.
pub(super) const ROOM: u32 = 1000;

/// A device, its driver, and the directory with its sockets.
pub(super) struct Bench {
    pub(super) directory: TempDir,
    pub(super) memory: GuestMemory,
    pub(super) device: MmioTransport,
    pub(super) receive: Driver<'static>,
    /// Received packets that the test has looked at.
    pub(super) seen: u16,
    /// Where the next one goes, once there is room for it.
    pub(super) room: Option<GuestAddress>,
    pub(super) send: Driver<'static>,
}

impl Bench {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let memory = driver::memory();
        let vsock = Vsock::listen(CID, &directory.path().join("v")).unwrap();
        let mut device = driver::transport(vsock, &memory).0;
        // Of a test, and as long as it.
        let leaked: &'static GuestMemory = Box::leak(Box::new(memory.clone()));
        let receive = Driver::start(&mut device, leaked, VERSION_1);
        let send = receive.of_queue(1);
        Self {
            directory,
            memory,
            device,
            receive,
            seen: 0,
            room: None,
            send,
        }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(super) fn dial(&self, greeting: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.path("v")).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream.write_all(greeting.as_bytes()).unwrap();
        stream
    }

    pub(super) fn give(
        &mut self,
        ports: Ports,
        operation: u16,
        change: impl FnOnce(&mut Header),
        data: &[u8],
    ) {
        let mut header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            len: data.len() as u32,
            kind: STREAM,
            operation,
            buffer_bytes: ROOM,
            ..Header::default()
        };
        change(&mut header);
        let bytes = header.encode();
        self.send
            .request(&mut self.device, &[Part::Out(&bytes), Part::Out(data)]);
    }

    pub(super) fn say(&mut self, ports: Ports, operation: u16) {
        self.give(ports, operation, |_| {}, &[]);
    }

    /// The next packet for the guest, if there is one.
    pub(super) fn get(&mut self) -> Option<(Header, Vec<u8>)> {
        let place = match self.room {
            Some(place) => place,
            None => self.receive.offer(&[Part::In(8192)])[0],
        };
        self.room = Some(place);
        self.receive.notify(&mut self.device);
        if self.receive.used() == self.seen {
            return None;
        }
        self.room = None;
        let len = self.receive.used_len(self.seen) as usize;
        self.seen += 1;
        let mut bytes = self.receive.bytes(place, len);
        let data = bytes.split_off(HEADER_BYTES);
        let header = Header::decode(&bytes.try_into().unwrap());
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
        assert_eq!(header.len as usize, data.len());
        Some((header, data))
    }

    pub(super) fn expect(&mut self, operation: u16) -> Header {
        let (header, _) = self.get().expect("no packet");
        assert_eq!(header.operation, operation);
        header
    }

    pub(super) fn broken(&mut self) -> bool {
        get(&mut self.device, VIRTIO_MMIO_STATUS) & 0x40 != 0
    }

    /// A connection of the guest's to a listener.
    pub(super) fn connected(&mut self) -> (Ports, UnixStream) {
        let path = self.path("v_52");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let ports = Ports {
            host: 52,
            guest: 1024,
        };
        self.say(ports, REQUEST);
        let (stream, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        let response = self.expect(RESPONSE);
        assert_eq!(response.buffer_bytes, BUFFER_BYTES);
        (ports, stream)
    }

    /// Fills the socket's buffer and then the device's, as a guest does that keeps the rules; returns what it has sent.
    pub(super) fn fill(&mut self, ports: Ports) -> Vec<u8> {
        let mut sent = Vec::new();
        let mut told = 0u32;
        loop {
            let room = BUFFER_BYTES - (sent.len() as u32).wrapping_sub(told);
            if room == 0 {
                return sent;
            }
            let data: Vec<u8> = (0..room.min(4000)).map(|i| (i ^ told) as u8).collect();
            self.give(ports, DATA, |_| {}, &data);
            sent.extend(data);
            while let Some((header, _)) = self.get() {
                assert_eq!(header.operation, CREDIT_UPDATE);
                told = header.forwarded;
            }
            assert!(sent.len() < 16 << 20);
        }
    }

    /// Everything that can be read while the device goes on writing.
    pub(super) fn read_all(&mut self, stream: &UnixStream) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let some = read(stream);
            if some.is_empty() {
                return all;
            }
            all.extend(some);
            lock(self.device.worker()).process(RECEIVE);
        }
    }
}

/// Everything that can be read now.
pub(super) fn read(mut stream: &UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(bytes @ 1..) = stream.read(&mut buffer) {
        all.extend(&buffer[..bytes]);
    }
    all
}

/// Whether the other side has closed it, with or without having read all.
pub(super) fn at_end(mut stream: &UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(bytes) => bytes == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

pub(super) struct Listening(TempDir, GuestMemory);

impl Subject for Listening {
    type Device = MmioTransport;
    type Saved = SavedVsock;
    const SPAN: u64 = MMIO_BYTES;

    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self(directory, driver::memory())
    }

    fn fresh(&self) -> MmioTransport {
        // The one before may still be there.
        let path = self.0.path().join("v");
        let _ = std::fs::remove_file(&path);
        let vsock = Vsock::listen(CID, &path).unwrap();
        driver::transport(vsock, &self.1).0
    }

    fn work(&self, device: &mut MmioTransport) {
        let receive = Driver::start(device, &self.1, VERSION_1);
        let mut send = receive.of_queue(1);
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            kind: STREAM,
            operation: REQUEST,
            ..Header::default()
        };
        send.request(device, &[Part::Out(&header.encode())]);
        receive.of_queue(2).offer(&[Part::In(4)]);
    }

    fn go_on(&self, device: &mut MmioTransport) {
        Device::resume(device);
        for queue in 0..3 {
            lock(device.worker()).process(queue);
        }
    }
}
