//! From the backend to the guest.
//!
//! Nothing is taken from the backend while the guest gives no buffers, but for one frame: how much room
//! is needed is not known before.

use std::time::{Duration, Instant};

use memory::GuestMemory;
use virtio_queue::{Queue, QueueT};

use super::{
    HEADER_BYTES, MAX_FRAME_BYTES, MERGEABLE, MIN_FRAME_BYTES, Net, QUEUE_ENTRIES,
    backend::Refused,
    header::{BUFFERS_AT, TO_GUEST, forget_valid_checksum, is_unsegmented},
};
use crate::virtio::{
    DriverError, Progress,
    buffers::{Buffers, Run},
    serve::take_chain,
    used,
};

/// A round ends after so many frames,
const ROUND_FRAMES: usize = 64;
/// or once it has taken so long: a backend that always has more shares the loop with other devices.
const ROUND_TIME: Duration = Duration::from_millis(10);

/// Where a frame waits between the backend and the guest.
pub(super) struct Incoming {
    /// A byte longer than the longest frame with its header, so that a longer one is recognised.
    buffer: Box<[u8]>,
    /// Length of the frame that waits, with its header; 0 if none does.
    waiting: usize,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Self {
            buffer: vec![0; HEADER_BYTES + MAX_FRAME_BYTES + 1].into(),
            waiting: 0,
        }
    }

    /// The frame that waits.
    pub(super) fn pending(&self) -> &[u8] {
        &self.buffer[..self.waiting]
    }

    pub(super) fn clear(&mut self) {
        self.waiting = 0;
    }

    /// Has `frame` wait, if it is one.
    pub(super) fn restore(&mut self, frame: &[u8]) -> Result<(), String> {
        if !frame.is_empty() && !possible(frame.len()) {
            return Err(format!("a frame of {} bytes waits", frame.len()));
        }
        self.buffer[..frame.len()].copy_from_slice(frame);
        self.waiting = frame.len();
        Ok(())
    }
}

/// Whether a frame with its header can have `len` bytes.
fn possible(len: usize) -> bool {
    (HEADER_BYTES + MIN_FRAME_BYTES..=HEADER_BYTES + MAX_FRAME_BYTES).contains(&len)
}

/// What has become of one attempt.
enum Step {
    Delivered,
    Dropped,
    /// There is no frame now, or no room for it: an event will tell when there is.
    Wait,
}

impl Net {
    /// Passes on what the backend has, as far as the guest has given buffers.
    pub(super) fn receive(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Progress, DriverError> {
        let start = Instant::now();
        let used_before = queue.next_used();
        let mut more = true;
        // As long as there are buffers it does not matter that there are more of them.
        queue.disable_notification(memory)?;
        for _ in 0..ROUND_FRAMES {
            match self.receive_frame(queue, memory)? {
                Step::Delivered | Step::Dropped if start.elapsed() > ROUND_TIME => break,
                Step::Delivered | Step::Dropped => {}
                Step::Wait => {
                    more = false;
                    break;
                }
            }
        }
        let interrupt = used::wants_interrupt(queue, memory, used_before)?;
        Ok(Progress {
            interrupt,
            more,
            ..Progress::default()
        })
    }

    fn receive_frame(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Step, DriverError> {
        if self.incoming.waiting == 0
            && let Some(step) = self.fetch()
        {
            return Ok(step);
        }
        let frame = self.incoming.pending();
        let step = match room_for(frame.len(), self.features, queue, memory)? {
            Room::Enough(chains) => {
                deliver(frame, &chains, queue, memory)?;
                self.metrics.received_packets.add(1);
                let bytes = (frame.len() - HEADER_BYTES) as u64;
                self.metrics.received_bytes.add(bytes);
                let unsegmented = is_unsegmented(frame);
                self.metrics.received_unsegmented.add(unsegmented.into());
                Step::Delivered
            }
            Room::Never => {
                self.metrics.receive_drops.add(1);
                tracing::debug!(bytes = frame.len(), "a frame is too long for all buffers");
                Step::Dropped
            }
            Room::NotYet => {
                self.metrics.receive_waits.add(1);
                return Ok(Step::Wait);
            }
        };
        self.incoming.clear();
        Ok(step)
    }

    /// Has the next frame wait for delivery, or says why not.
    fn fetch(&mut self) -> Option<Step> {
        if !self.link_up {
            return Some(Step::Wait);
        }
        if let Some(limiter) = &mut self.receive_limiter
            && !limiter.admits(Instant::now())
        {
            self.metrics.receive_throttled.add(1);
            return Some(Step::Wait);
        }
        let buffer = &mut self.incoming.buffer;
        let error = match self.backend.receive(buffer) {
            Ok(len) if possible(len) && TO_GUEST.permits(self.features, buffer) => {
                if self.features & TO_GUEST.checksum == 0 {
                    forget_valid_checksum(buffer);
                }
                if let Some(limiter) = &mut self.receive_limiter {
                    limiter.charge(Instant::now(), (len - HEADER_BYTES) as u64);
                }
                self.incoming.waiting = len;
                return None;
            }
            // A frame from before the driver was bound anew, or from somebody who sends anything.
            Ok(_) => std::io::ErrorKind::InvalidData.into(),
            Err(Refused::Later) => return Some(Step::Wait),
            Err(Refused::Frame(error)) => error,
            Err(Refused::Gone(error)) => {
                self.link_lost(&error);
                return Some(Step::Wait);
            }
        };
        self.metrics.receive_drops.add(1);
        tracing::debug!(%error, "a frame for the guest was dropped");
        Some(Step::Dropped)
    }
}

/// Whether the driver has given room for a frame.
enum Room<'m> {
    /// In these chains, by their heads.
    Enough(Vec<(u16, Run<'m>)>),
    /// Not now; the driver will notify when it has given more.
    NotYet,
    /// Not even in all that a queue can hold.
    Never,
}

/// Takes chains off the queue until they have room for `len` bytes; puts them back if they never have.
fn room_for<'m>(
    len: usize,
    features: u64,
    queue: &mut Queue,
    memory: &'m GuestMemory,
) -> Result<Room<'m>, DriverError> {
    let begin = queue.next_avail();
    let most = if features & MERGEABLE != 0 {
        queue.size().into()
    } else {
        1
    };
    let mut chains = Vec::new();
    let mut room = 0;
    // Bounded also when the driver moves its index forth and back meanwhile.
    for _ in 0..=2 * most {
        if room >= len as u64 {
            return Ok(Room::Enough(chains));
        }
        if chains.len() == most {
            break;
        }
        let chain = take_chain(queue, memory)?;
        if let Some(chain) = chain {
            let head = chain.head_index();
            let run = Buffers::of(chain, memory, QUEUE_ENTRIES.into())?.writable;
            // All of the header is in the first (virtio 1.3, 5.1.6.3.1).
            if run.len() < HEADER_BYTES as u64 {
                return Err(DriverError::Incomplete("room for a header"));
            }
            room += run.len();
            chains.push((head, run));
        } else if !queue.enable_notification(memory)? {
            // Asked for where the chains end, and only then put back: who notifies does it there.
            queue.set_next_avail(begin);
            return Ok(Room::NotYet);
        }
    }
    queue.set_next_avail(begin);
    Ok(Room::Never)
}

/// Writes `frame` into `chains`, which have room for it, and gives them to the driver.
fn deliver(
    frame: &[u8],
    chains: &[(u16, Run<'_>)],
    queue: &mut Queue,
    memory: &GuestMemory,
) -> Result<(), DriverError> {
    let mut header = [0; HEADER_BYTES];
    let (from, mut rest) = frame.split_at(HEADER_BYTES.min(frame.len()));
    header[..from.len()].copy_from_slice(from);
    // The queue has no more than 32768 entries.
    header[BUFFERS_AT].copy_from_slice(&(chains.len() as u16).to_le_bytes());
    let mut used = Vec::with_capacity(chains.len());
    for (index, (head, run)) in chains.iter().enumerate() {
        let mut run = run.clone();
        let mut written = 0;
        if index == 0 {
            let body = run.split_off(HEADER_BYTES as u64);
            written = run.fill(&header);
            run = body;
        }
        let filled = run.fill(rest);
        rest = &rest[filled as usize..];
        used.push((*head, written + filled));
    }
    used::add_together(queue, memory, &used)?;
    Ok(())
}
