//! The virtio socket device (virtio 1.3, section 5.10): streams between guest and host.

mod connection;
mod host;
mod metrics;
mod packet;
mod state;
#[cfg(test)]
mod tests;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use memory::GuestMemory;
use saved_state::{Kind, SavedState, Section};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::{DescriptorChain, Queue};

use super::{
    DriverError, EventSource, Progress, SavedTransport, VirtioDevice,
    buffers::Buffers,
    serve::{Outcome, serve, serve_until_later},
};
use crate::{Error, Metrics};
use connection::BUFFER_BYTES;
use host::Host;
use metrics::VsockMetrics;
use packet::{HEADER_BYTES, Header};
pub use state::SavedVsock;

const QUEUE_ENTRIES: u16 = 128;

/// The queues (virtio 1.3, 5.10.2).
const RECEIVE: usize = 0;
const SEND: usize = 1;
const EVENT: usize = 2;

/// The host's context ID, and the first that a guest may have (5.10.4).
const HOST_CID: u64 = 2;
const FIRST_CID: u64 = 3;
/// The only type of socket there is without a feature that says so.
const STREAM: u16 = 1;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, in a `struct virtio_vsock_event`.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// Why a vsock device cannot be made. Each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// No guest can have this context ID.
    #[error("a guest cannot have the context ID {0}; give it one from 3 to 4294967294")]
    Cid(u64),
    /// Somebody listens there already, or it is no socket.
    #[error("{} is in use by another machine, or is no socket; name another path", .0.display())]
    InUse(PathBuf),
    /// The socket cannot be made.
    #[error("the socket {} cannot be made: {source}; name a path in a directory that is there", path.display())]
    Listen {
        /// Its path.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// The path is saved as text.
    #[error("{0:?} cannot be saved as text; give the socket a path in UTF-8")]
    Path(PathBuf),
}

/// A vsock device.
pub struct Vsock {
    cid: u64,
    path: String,
    host: Host,
    /// The driver has to be told that its connections are gone.
    reset_due: bool,
    /// And before it hears of others, which it would take for some of those that are: nothing is received until the event queue
    /// has been looked at. If the driver has no room there then, it hears of others all the same, for it may never have any.
    /// This is the order in which the driver can find the two, not that in which it looks: one that looks at what was received
    /// first may still meet a request before the event, and end that connection with the others. That it has handled the event
    /// only shows when it gives the buffer back, which it need not do.
    reset_first: bool,
    buffer: Box<[u8]>,
    metrics: Arc<VsockMetrics>,
}

impl Vsock {
    /// A device for the guest of context ID `cid`, with its socket at `path`. A socket that is there and that
    /// nobody listens on is replaced.
    ///
    /// # Errors
    ///
    /// [`VsockError`].
    pub fn listen(cid: u64, path: &Path) -> Result<Self, VsockError> {
        if !(FIRST_CID..u64::from(u32::MAX)).contains(&cid) {
            return Err(VsockError::Cid(cid));
        }
        let text = path
            .to_str()
            .ok_or_else(|| VsockError::Path(path.to_owned()))?;
        let metrics = Arc::<VsockMetrics>::default();
        Ok(Self {
            cid,
            path: text.to_owned(),
            host: Host::listen(path, Arc::clone(&metrics))?,
            reset_due: false,
            reset_first: false,
            buffer: vec![0; BUFFER_BYTES as usize].into(),
            metrics,
        })
    }

    fn take_packet(
        &mut self,
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
    ) -> Result<u32, DriverError> {
        let mut packet = Buffers::of(chain, memory, QUEUE_ENTRIES.into())?.readable;
        let header = packet
            .take_front()
            .ok_or(DriverError::Incomplete("header"))?;
        let header = Header::decode(&header);
        if u64::from(header.len) > packet.len() {
            return Err(DriverError::Incomplete("data"));
        }
        // Nobody else can be reached, and nobody else may be spoken for.
        if header.dst_cid == HOST_CID && header.src_cid == self.cid {
            if header.kind == STREAM {
                self.host.take(&header, |len| {
                    let mut data = vec![0; len];
                    packet.copy_to(&mut data);
                    data
                });
            } else {
                self.host.orphan(header.ports());
            }
        }
        Ok(0)
    }

    fn give_packet(
        &mut self,
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
    ) -> Result<Outcome, DriverError> {
        let mut room = Buffers::of(chain, memory, QUEUE_ENTRIES.into())?.writable;
        if room.len() <= HEADER_BYTES as u64 {
            return Err(DriverError::Incomplete("room for a header and data"));
        }
        let body = room.split_off(HEADER_BYTES as u64);
        let most = self.buffer.len().min(body.len() as usize);
        let data = &mut self.buffer[..most];
        let Some(header) = self.host.next_packet(self.cid, data) else {
            return Ok(Outcome::Later);
        };
        let written = room.fill(&header.encode()) + body.fill(&data[..header.len as usize]);
        Ok(Outcome::Used(written))
    }

    fn give_event(
        &mut self,
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
    ) -> Result<Outcome, DriverError> {
        if !self.reset_due {
            return Ok(Outcome::Later);
        }
        let room = Buffers::of(chain, memory, QUEUE_ENTRIES.into())?.writable;
        if room.len() < TRANSPORT_RESET.len() as u64 {
            return Err(DriverError::Incomplete("room for an event"));
        }
        self.reset_due = false;
        Ok(Outcome::Used(room.fill(&TRANSPORT_RESET)))
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> Kind {
        SavedVsock::KIND
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_ENTRIES, QUEUE_ENTRIES, QUEUE_ENTRIES]
    }

    /// `struct virtio_vsock_config`.
    fn config(&self) -> Vec<u8> {
        self.cid.to_le_bytes().to_vec()
    }

    fn sources(&self) -> Vec<EventSource<'_>> {
        vec![EventSource {
            descriptor: self.host.descriptor(),
            readable: Some(RECEIVE),
            writable: None,
        }]
    }

    fn holds_requests(&self, index: usize) -> bool {
        index == SEND
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        self.host.clear();
        self.reset_due = false;
        self.reset_first = false;
    }

    fn process_queue(
        &mut self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Progress, DriverError> {
        match index {
            RECEIVE if self.reset_first => Ok(Progress::default()),
            RECEIVE => {
                self.host.poll();
                serve_until_later(queue, memory, |chain| self.give_packet(chain, memory))
            }
            SEND => {
                let mut progress = serve(queue, memory, |chain| self.take_packet(chain, memory))?;
                if self.host.has_due() {
                    progress.also = Some(RECEIVE);
                }
                Ok(progress)
            }
            EVENT => {
                let mut progress =
                    serve_until_later(queue, memory, |chain| self.give_event(chain, memory))?;
                if std::mem::take(&mut self.reset_first) {
                    progress.also = Some(RECEIVE);
                }
                Ok(progress)
            }
            _ => Ok(Progress::default()),
        }
    }

    fn save(
        &self,
        instance: u32,
        transport: SavedTransport,
    ) -> Result<Section, saved_state::Error> {
        let Self {
            cid,
            path,
            // Connections end with the machine that was saved.
            host: _,
            // A machine that is restored is always told.
            reset_due: _,
            reset_first: _,
            buffer: _,
            metrics: _,
        } = self;
        let saved = SavedVsock {
            cid: *cid,
            path: path.clone(),
            transport,
        };
        Section::encode(instance, &saved)
    }

    /// The device may have another path and another context ID than when it was saved: with the news that its
    /// connections are gone, the driver reads its context ID again.
    fn restore(&mut self, section: &Section) -> Result<SavedTransport, Error> {
        let SavedVsock {
            cid: _,
            path: _,
            transport,
        } = section.decode()?;
        self.reset_due = true;
        // A queue that the driver does not use is not looked at.
        self.reset_first = transport.is_ready(EVENT);
        Ok(transport)
    }

    fn metrics(&self) -> Arc<dyn Metrics> {
        Arc::clone(&self.metrics) as _
    }
}
