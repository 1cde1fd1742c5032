//! A round over a disk's queue.

use memory::GuestMemory;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::{DescriptorChain, Queue};

use super::{
    Block, Header, MAX_REQUEST_BYTES, QUEUE_ENTRIES,
    overlap::Kept,
    throttle::{Admission, Way},
};
use crate::virtio::{
    DriverError,
    buffers::{Buffers, Run},
    chain::Chain,
    serve::{Handler, Outcome},
};

/// A round, and the reads that it keeps until its end.
pub(super) struct Round<'b, 'm> {
    block: &'b mut Block,
    memory: &'m GuestMemory,
    kept: Vec<Kept<'m>>,
    kept_bytes: u64,
}

impl<'b, 'm> Round<'b, 'm> {
    pub(super) fn begin(block: &'b mut Block, memory: &'m GuestMemory) -> Self {
        block.throttle.begin_round();
        Self {
            block,
            memory,
            kept: Vec::new(),
            kept_bytes: 0,
        }
    }

    /// Serves the request with this head, unless it has to wait.
    fn serve(&mut self, head: u16, buffers: Buffers<'m>) -> Result<Outcome, DriverError> {
        let Buffers {
            readable: mut output,
            writable: mut input,
        } = buffers;
        let status = input
            .take_last()
            .ok_or(DriverError::Incomplete("status byte"))?;
        let header = Header::take(&mut output).ok_or(DriverError::Incomplete("header"))?;
        if let Some(waits) = self.throttled(head, &header, output.len().max(input.len())) {
            return Ok(waits);
        }
        let outcome = if self.may_keep(&header, &input) {
            match self.block.disk.read_without_waiting(header.sector, &input) {
                Ok(pieces) if pieces.is_empty() => Ok(Some(self.block.has_read(&input))),
                Ok(pieces) => {
                    self.kept_bytes += input.len();
                    self.kept.push(Kept {
                        head,
                        status,
                        header,
                        data: input,
                        pieces,
                    });
                    return Ok(Outcome::Kept);
                }
                Err(error) => Err(error),
            }
        } else {
            self.block.execute(&header, &output, &input)
        };
        Ok(Outcome::Used(self.block.answer(&header, outcome, &status)))
    }

    /// What becomes of a request that has to wait for a limit.
    fn throttled(&mut self, head: u16, header: &Header, bytes: u64) -> Option<Outcome> {
        let Block {
            throttle, metrics, ..
        } = &mut *self.block;
        let (way, bytes) = match header.request {
            VIRTIO_BLK_T_IN => (Way::Read, bytes),
            VIRTIO_BLK_T_OUT => (Way::Write, bytes),
            VIRTIO_BLK_T_FLUSH | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                (Way::Write, 0)
            }
            _ => (Way::Read, 0),
        };
        // One that is longer fails.
        match throttle.admits(way, bytes.min(MAX_REQUEST_BYTES)) {
            Admission::Granted => return None,
            Admission::Refused => {
                let counter = match way {
                    Way::Read => &metrics.read_throttled,
                    Way::Write => &metrics.write_throttled,
                };
                counter.add(1);
            }
            Admission::Queued => {}
        }
        throttle.put_off(head, way);
        Some(Outcome::Kept)
    }

    /// Whether it is a read that may wait for the end of the round.
    fn may_keep(&self, header: &Header, input: &Run<'_>) -> bool {
        header.request == VIRTIO_BLK_T_IN
            && self.block.overlap.has_room(self.kept_bytes + input.len())
    }
}

impl<'m> Handler<'m> for Round<'_, 'm> {
    fn handle_kept(&mut self, queue: &Queue) -> Option<Result<(u16, Outcome), DriverError>> {
        let head = self.block.throttle.due()?;
        let chain = Chain::new(queue, self.memory, head);
        let buffers = Buffers::of(chain, self.memory, QUEUE_ENTRIES.into());
        let served = buffers.and_then(|buffers| self.serve(head, buffers));
        Some(served.map(|outcome| (head, outcome)))
    }

    fn handle(&mut self, chain: DescriptorChain<&'m GuestMemory>) -> Result<Outcome, DriverError> {
        let head = chain.head_index();
        self.serve(head, Buffers::of(chain, self.memory, QUEUE_ENTRIES.into())?)
    }

    fn finish(&mut self) -> Vec<(u16, u32)> {
        let Self { block, kept, .. } = self;
        let outcomes = block.overlap.read(&block.disk, kept);
        if kept.len() > 1 {
            block.metrics.overlapped_reads.add(kept.len() as u64);
        }
        let both = kept.iter().zip(outcomes);
        both.map(|(kept, outcome)| {
            let outcome = outcome.map(|()| Some(block.has_read(&kept.data)));
            let written = block.answer(&kept.header, outcome, &kept.status);
            (kept.head, written)
        })
        .collect()
    }
}
