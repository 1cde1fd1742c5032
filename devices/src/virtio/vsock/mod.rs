//! The virtio socket device (virtio 1.3, section 5.10): streams between guest and host.

mod connection;
mod host;
mod metrics;
mod news;
mod packet;
mod state;
#[cfg(test)]
mod tests;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
};

use memory::GuestMemory;
use saved_state::{Kind, SavedState, Section};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::{DescriptorChain, Queue, QueueT};

use super::{
    DriverError, EventSource, Progress, SavedTransport, VirtioDevice,
    buffers::Buffers,
    serve::{Outcome, serve, serve_until_later},
};
use crate::{Error, Metrics};
use connection::BUFFER_BYTES;
use host::Host;
use metrics::VsockMetrics;
use news::News;
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
/// The most bytes of a socket's path, which end with a zero in `struct sockaddr_un`.
const MAX_PATH_BYTES: usize = 107;
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
    /// No socket's name is so long.
    #[error("the path of a vsock device's socket, {}, is too long; name one of at most {MAX_PATH_BYTES} bytes", .0.display())]
    TooLong(PathBuf),
    /// The path is saved as text.
    #[error("{0:?} cannot be saved as text; give the socket a path in UTF-8")]
    Path(PathBuf),
    /// The host has no timer left.
    #[error("a vsock device needs a timer: {0}; raise the limit of open files (ulimit -n)")]
    Timer(#[source] io::Error),
}

/// A vsock device.
pub struct Vsock {
    cid: u64,
    path: String,
    host: Host,
    news: News,
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
        if text.len() > MAX_PATH_BYTES {
            return Err(VsockError::TooLong(path.to_owned()));
        }
        let metrics = Arc::<VsockMetrics>::default();
        Ok(Self {
            cid,
            path: text.to_owned(),
            host: Host::listen(path, Arc::clone(&metrics))?,
            news: News::none().map_err(VsockError::Timer)?,
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
        if !self.news.is_due() {
            return Ok(Outcome::Later);
        }
        let room = Buffers::of(chain, memory, QUEUE_ENTRIES.into())?.writable;
        if room.len() < TRANSPORT_RESET.len() as u64 {
            return Err(DriverError::Incomplete("room for an event"));
        }
        self.news.are_put();
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
        let source = |descriptor| EventSource {
            descriptor,
            readable: Some(RECEIVE),
            writable: None,
        };
        vec![source(self.host.descriptor()), source(self.news.timer())]
    }

    fn holds_requests(&self, index: usize) -> bool {
        index == SEND
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        self.host.clear();
        self.news.forget();
    }

    fn forget_queue(&mut self, index: usize) {
        if index == EVENT {
            self.news.let_go();
        }
    }

    fn process_queue(
        &mut self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Progress, DriverError> {
        match index {
            RECEIVE if self.news.hold() => Ok(Progress {
                also: Some(EVENT),
                ..Progress::default()
            }),
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
                let available = queue.avail_idx(memory, Ordering::Acquire)?.0;
                let mut progress =
                    serve_until_later(queue, memory, |chain| self.give_event(chain, memory))?;
                if self.news.look(available) {
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
            news: _,
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
        self.news.arrive(transport.is_ready(EVENT));
        Ok(transport)
    }

    fn metrics(&self) -> Arc<dyn Metrics> {
        Arc::clone(&self.metrics) as _
    }
}
