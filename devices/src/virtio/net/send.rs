//! From the guest to the backend.

use std::time::Instant;

use memory::GuestMemory;
use virtio_queue::{DescriptorChain, Queue};

use super::{
    HEADER_BYTES, MIN_FRAME_BYTES, Net, QUEUE_ENTRIES,
    backend::Refused,
    header::{BUFFERS_AT, FROM_GUEST, is_unsegmented},
};
use crate::virtio::{
    DriverError, Progress,
    buffers::Buffers,
    serve::{Outcome, serve_until_later},
};

/// A frame reads nothing back.
const SENT: Outcome = Outcome::Used(0);

impl Net {
    /// Passes on what the guest sends.
    pub(super) fn send(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Progress, DriverError> {
        serve_until_later(queue, memory, |chain| self.send_frame(chain, memory))
    }

    fn send_frame(
        &mut self,
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
    ) -> Result<Outcome, DriverError> {
        if let Some(limiter) = &mut self.send_limiter
            && !limiter.admits(Instant::now())
        {
            self.metrics.send_throttled.add(1);
            return Ok(Outcome::Later);
        }
        let frame = Buffers::of(chain, memory, QUEUE_ENTRIES.into())?.readable;
        let len = frame.len();
        if len < HEADER_BYTES as u64 {
            return Err(DriverError::Incomplete("header"));
        }
        if len < (HEADER_BYTES + MIN_FRAME_BYTES) as u64 || len > self.outgoing.len() as u64 {
            self.metrics.send_drops.add(1);
            self.charge(0);
            return Ok(SENT);
        }
        let copy = &mut self.outgoing[..len as usize];
        frame.copy_to(copy);
        if !FROM_GUEST.permits(self.features, copy) {
            return Err(DriverError::Offload);
        }
        // The field means something in the other direction only.
        copy[BUFFERS_AT].fill(0);
        let bytes = len - HEADER_BYTES as u64;
        match self.backend.send(copy) {
            Ok(()) => {
                self.metrics.sent_packets.add(1);
                self.metrics.sent_bytes.add(bytes);
                let unsegmented = is_unsegmented(copy);
                self.metrics.sent_unsegmented.add(unsegmented.into());
            }
            Err(Refused::Later) => {
                self.metrics.send_waits.add(1);
                return Ok(Outcome::Later);
            }
            Err(Refused::Frame(error)) => {
                self.metrics.send_drops.add(1);
                tracing::debug!(bytes, %error, "a frame of the guest's was not taken");
            }
            Err(Refused::Gone(error)) => {
                self.metrics.send_drops.add(1);
                self.link_lost(&error);
            }
        }
        self.charge(bytes);
        Ok(SENT)
    }

    /// Counts a frame against the limit whatever becomes of it: to look at one costs as much.
    fn charge(&mut self, bytes: u64) {
        if let Some(limiter) = &mut self.send_limiter {
            limiter.charge(Instant::now(), bytes);
        }
    }
}
