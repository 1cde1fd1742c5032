//! Network devices whose other end is the test's.

use std::sync::Mutex;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use virtio_bindings::{virtio_mmio::VIRTIO_MMIO_STATUS, virtio_ring::VIRTIO_RING_F_EVENT_IDX};

use super::super::{backend::Refused, *};
use crate::{
    BusDevice, Device,
    conformance::{Line, Subject},
    sync::lock,
    virtio::{
        MMIO_BYTES, MmioTransport,
        driver::{self, Driver, Part, VERSION_1, get},
    },
};

pub(super) const PLAIN: u64 = VERSION_1 | MAC | STATUS;
pub(super) const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

pub(super) fn options() -> NetOptions {
    NetOptions {
        mac: [2, 0, 0, 0, 0, 7],
        receive_limit: RateLimit::default(),
        send_limit: RateLimit::default(),
    }
}

/// Two ends of sequenced packets.
pub(super) fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

pub(super) fn frame(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes)
        .map(|i| (i as u8).wrapping_mul(31) ^ seed)
        .collect()
}

pub(super) fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER_BYTES], frame].concat()
}

/// A device with a socket, whose other end is the test's.
pub(super) struct Bench {
    pub(super) memory: GuestMemory,
    pub(super) device: MmioTransport,
    pub(super) line: Arc<Line>,
    pub(super) outside: OwnedFd,
}

impl Bench {
    pub(super) fn new() -> Self {
        Self::with(options())
    }

    pub(super) fn with(options: NetOptions) -> Self {
        let (inside, outside) = pair();
        let memory = driver::memory();
        let net = Net::socket(inside, options).unwrap();
        let (device, line) = driver::transport(net, &memory);
        Self {
            memory,
            device,
            line,
            outside,
        }
    }

    pub(super) fn receive(&mut self) {
        lock(self.device.worker()).process(RECEIVE);
        driver::serve_notified(&mut self.device);
    }

    pub(super) fn push(&self, frame: &[u8]) {
        send(&self.outside, frame, SendFlags::DONTWAIT).unwrap();
    }

    pub(super) fn pull(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 1 << 17];
        let (_, bytes) = recv(&self.outside, &mut buffer[..], RecvFlags::DONTWAIT).ok()?;
        buffer.truncate(bytes);
        Some(buffer)
    }

    pub(super) fn metric(&self, name: &str) -> u64 {
        let found = self.device.metrics().into_iter().find(|(n, _)| *n == name);
        found.unwrap().1
    }

    pub(super) fn broken(&mut self) -> bool {
        get(&mut self.device, VIRTIO_MMIO_STATUS) & 0x40 != 0
    }

    pub(super) fn link_is_up(&mut self) -> bool {
        let mut status = [0; 2];
        self.device.read(0x106, &mut status);
        u16::from_le_bytes(status) == 1
    }
}

/// A backend that the test tells what to say.
#[derive(Default)]
pub(super) struct Script {
    offloads: u64,
    /// Last in, first out.
    pub(super) incoming: Vec<Vec<u8>>,
    pub(super) sent: Vec<Vec<u8>>,
    pub(super) accepted: u64,
}

pub(super) struct Scripted(Arc<Mutex<Script>>, OwnedFd);

impl Backend for Scripted {
    fn attachment(&self) -> Attachment {
        Attachment::Tap("scripted".to_owned())
    }

    fn descriptor(&self) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.1)
    }

    fn can_be_full(&self) -> bool {
        false
    }

    fn offloads(&self) -> u64 {
        lock(&self.0).offloads
    }

    fn accept(&mut self, features: u64) {
        lock(&self.0).accepted = features;
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<usize, Refused> {
        let Some(next) = lock(&self.0).incoming.pop() else {
            return Err(Refused::Later);
        };
        let len = next.len().min(buffer.len());
        buffer[..len].copy_from_slice(&next[..len]);
        Ok(len)
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), Refused> {
        lock(&self.0).sent.push(frame.to_vec());
        Ok(())
    }
}

pub(super) fn scripted(memory: &GuestMemory) -> (MmioTransport, Arc<Mutex<Script>>, Arc<Line>) {
    let script = Arc::new(Mutex::new(Script {
        offloads: OFFLOADS,
        ..Script::default()
    }));
    let backend = Box::new(Scripted(Arc::clone(&script), pair().0));
    let (device, line) = driver::transport(Net::new(backend, options()).unwrap(), memory);
    (device, script, line)
}

/// The conformance suite's device: on a script that always has one more frame than fits.
pub(super) struct OnScript(GuestMemory);

impl Subject for OnScript {
    type Device = MmioTransport;
    type Saved = SavedNet;
    const SPAN: u64 = MMIO_BYTES;

    fn new() -> Self {
        Self(driver::memory())
    }

    fn fresh(&self) -> MmioTransport {
        let (device, script, _) = scripted(&self.0);
        lock(&script).incoming = vec![with_header(&frame(600, 1)); 3];
        device
    }

    fn work(&self, device: &mut MmioTransport) {
        let mut receive = Driver::start(device, &self.0, PLAIN | MERGEABLE | OFFLOADS);
        let mut sender = receive.of_queue(1);
        sender.request(device, &[Part::Out(&with_header(&frame(60, 2)))]);
        receive.offer(&[Part::In(1000)]);
        receive.notify(device);
        // The next frame is taken and finds room for half of it.
        receive.offer(&[Part::In(300)]);
        receive.notify(device);
        sender.offer(&[Part::Out(&with_header(&frame(60, 3)))]);
    }

    fn go_on(&self, device: &mut MmioTransport) {
        Device::resume(device);
        for queue in 0..2 {
            lock(device.worker()).process(queue);
        }
    }
}
