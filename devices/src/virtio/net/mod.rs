//! The virtio network device (virtio 1.3, section 5.1): one pair of queues.

mod backend;
mod error;
mod header;
mod metrics;
mod receive;
mod send;
mod socket;
mod state;
mod tap;
#[cfg(test)]
mod tests;

use std::{os::fd::OwnedFd, sync::Arc};

use memory::GuestMemory;
use saved_state::{Kind, SavedState, Section};
use virtio_bindings::{
    virtio_ids::VIRTIO_ID_NET,
    virtio_net::{
        VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
    },
};
use virtio_queue::Queue;

use super::{DriverError, EventSource, Progress, SavedTransport, VirtioDevice};
use crate::{Error, Metrics, RateLimit, rate_limit::Limiter};
use backend::Backend;
pub use error::NetError;
use header::{FROM_GUEST, HEADER_BYTES, MAX_FRAME_BYTES, MIN_FRAME_BYTES, OFFLOADS, TO_GUEST};
use metrics::NetMetrics;
use receive::Incoming;
use socket::Socket;
pub use state::{Attachment, SavedNet};
use tap::Tap;

const QUEUE_ENTRIES: u16 = 256;

/// The queues of the one pair there is (virtio 1.3, 5.1.2).
const RECEIVE: usize = 0;
const SEND: usize = 1;

const MAC: u64 = 1 << VIRTIO_NET_F_MAC;
const STATUS: u64 = 1 << VIRTIO_NET_F_STATUS;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// What a network device is beside what it is attached to.
#[derive(Clone, Copy, Debug)]
pub struct NetOptions {
    /// Its MAC address.
    pub mac: [u8; 6],
    /// The limit on what the guest receives.
    pub receive_limit: RateLimit,
    /// The limit on what the guest sends.
    pub send_limit: RateLimit,
}

/// A network device.
///
/// Frames are copied once in either direction, so that what is checked of a frame is what is passed on,
/// whatever the guest writes meanwhile.
pub struct Net {
    backend: Box<dyn Backend>,
    options: NetOptions,
    /// What the driver has accepted; nothing before it has.
    features: u64,
    incoming: Incoming,
    outgoing: Box<[u8]>,
    receive_limiter: Option<Limiter>,
    send_limiter: Option<Limiter>,
    /// Whether there is still something at the other end.
    link_up: bool,
    /// The driver has to be told that the configuration is not what it was.
    config_changed: bool,
    /// What the driver has last been told of the link.
    told_link_up: bool,
    metrics: Arc<NetMetrics>,
}

impl Net {
    /// A device on the TAP device `name`, which must be there.
    ///
    /// # Errors
    ///
    /// [`NetError`].
    pub fn tap(name: &str, options: NetOptions) -> Result<Self, NetError> {
        Self::new(Box::new(Tap::open(name)?), options)
    }

    /// A device on the Unix socket of sequenced packets that listens at `path`. A message is an Ethernet
    /// frame.
    ///
    /// # Errors
    ///
    /// [`NetError`].
    pub fn connect(path: &str, options: NetOptions) -> Result<Self, NetError> {
        Self::new(Box::new(Socket::connect(path)?), options)
    }

    /// The same on a socket that is connected already, of sequenced packets or of datagrams.
    ///
    /// # Errors
    ///
    /// [`NetError`].
    pub fn socket(socket: OwnedFd, options: NetOptions) -> Result<Self, NetError> {
        Self::new(Box::new(Socket::of(socket)?), options)
    }

    fn new(backend: Box<dyn Backend>, options: NetOptions) -> Result<Self, NetError> {
        let limiter = |limit| Limiter::new(limit).map_err(NetError::Timer);
        Ok(Self {
            backend,
            features: 0,
            incoming: Incoming::new(),
            outgoing: vec![0; HEADER_BYTES + MAX_FRAME_BYTES].into(),
            receive_limiter: limiter(options.receive_limit)?,
            send_limiter: limiter(options.send_limit)?,
            options,
            link_up: true,
            config_changed: false,
            told_link_up: true,
            metrics: Arc::default(),
        })
    }

    /// There is nobody left at the other end.
    fn link_lost(&mut self, error: &std::io::Error) {
        if self.link_up {
            let attachment = self.backend.attachment();
            tracing::warn!(?attachment, %error, "a network device has lost its link");
            self.link_up = false;
            self.config_changed = true;
        }
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> Kind {
        SavedNet::KIND
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        MAC | STATUS | MERGEABLE | self.backend.offloads()
    }

    fn makes_sense(&self, features: u64) -> bool {
        [TO_GUEST, FROM_GUEST]
            .iter()
            .all(|direction| direction.makes_sense(features))
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_ENTRIES, QUEUE_ENTRIES]
    }

    /// The start of `struct virtio_net_config`; the rest belongs to features that are not offered.
    fn config(&self) -> Vec<u8> {
        let status = if self.link_up {
            VIRTIO_NET_S_LINK_UP as u16
        } else {
            0
        };
        [&self.options.mac[..], &status.to_le_bytes()].concat()
    }

    fn take_config_change(&mut self) -> bool {
        self.told_link_up = self.link_up;
        std::mem::take(&mut self.config_changed)
    }

    fn sources(&self) -> Vec<EventSource<'_>> {
        let mut sources = vec![EventSource {
            descriptor: self.backend.descriptor(),
            readable: Some(RECEIVE),
            writable: self.backend.can_be_full().then_some(SEND),
        }];
        let limiters = [(&self.receive_limiter, RECEIVE), (&self.send_limiter, SEND)];
        for (limiter, queue) in limiters {
            sources.extend(limiter.iter().map(|limiter| EventSource {
                descriptor: limiter.timer(),
                readable: Some(queue),
                writable: None,
            }));
        }
        sources
    }

    /// What is on its way to the guest waits outside, while what the guest has sent is passed on.
    fn holds_requests(&self, index: usize) -> bool {
        index == SEND
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        self.backend.accept(features);
    }

    fn reset(&mut self) {
        self.features = 0;
        self.incoming.clear();
        self.backend.accept(0);
    }

    fn process_queue(
        &mut self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Progress, DriverError> {
        if index == RECEIVE {
            self.receive(queue, memory)
        } else {
            self.send(queue, memory)
        }
    }

    fn save(
        &self,
        instance: u32,
        transport: SavedTransport,
    ) -> Result<Section, saved_state::Error> {
        let Self {
            backend,
            options:
                NetOptions {
                    mac,
                    receive_limit,
                    send_limit,
                },
            // They follow from the transport.
            features: _,
            incoming,
            // Empty between two calls.
            outgoing: _,
            // What was admitted before the cut does not count after it.
            receive_limiter: _,
            send_limiter: _,
            // The machine that goes on from this finds out for itself.
            link_up: _,
            config_changed: _,
            // Not what is so: a machine that has not run yet has told its driver nothing.
            told_link_up,
            metrics: _,
        } = self;
        let saved = SavedNet {
            attachment: backend.attachment(),
            mac: *mac,
            receive_limit: (*receive_limit).into(),
            send_limit: (*send_limit).into(),
            link_up: *told_link_up,
            pending: incoming.pending().to_vec(),
            transport,
        };
        Section::encode(instance, &saved)
    }

    /// The device may be attached elsewhere, have another MAC address and other limits than when it was
    /// saved. A running driver keeps the address that it knows until it is bound anew.
    fn restore(&mut self, section: &Section) -> Result<SavedTransport, Error> {
        let SavedNet {
            attachment: _,
            mac,
            receive_limit: _,
            send_limit: _,
            link_up,
            pending,
            transport,
        } = section.decode()?;
        let uses = transport.accepted_features();
        if uses & OFFLOADS & !self.backend.offloads() != 0 {
            return Err(NetError::Offloads.into());
        }
        self.incoming
            .restore(&pending)
            .map_err(|reason| Error::Impossible {
                kind: SavedNet::KIND,
                reason,
            })?;
        self.told_link_up = link_up;
        self.config_changed = (mac, link_up) != (self.options.mac, self.link_up);
        Ok(transport)
    }

    fn metrics(&self) -> Arc<dyn Metrics> {
        Arc::clone(&self.metrics) as _
    }
}
