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
    /// The flush that ends it.
    flush: Option<Flush<'m>>,
    /// Whether more is served than what was begun before.
    begins: bool,
    /// It ended with a flush that is over, so that nothing else has the queue looked at.
    pub(super) ended_early: bool,
}

/// A flush that begins when the reads of its round are over.
struct Flush<'m> {
    head: u16,
    header: Header,
    status: Run<'m>,
}

impl<'b, 'm> Round<'b, 'm> {
    pub(super) fn begin(block: &'b mut Block, memory: &'m GuestMemory, begins: bool) -> Self {
        block.throttle.begin_round();
        Self {
            block,
            memory,
            kept: Vec::new(),
            kept_bytes: 0,
            flush: None,
            begins,
            ended_early: false,
        }
    }

    /// What the request with this head, which was taken off the ring, has to read and write.
    fn taken(&self, queue: &Queue, head: u16) -> Result<Buffers<'m>, DriverError> {
        let chain = Chain::new(queue, self.memory, head);
        Buffers::of(chain, self.memory, QUEUE_ENTRIES.into())
    }

    /// Serves the request with this head, unless it has to wait.
    fn serve(&mut self, head: u16, buffers: Buffers<'m>) -> Result<Outcome, DriverError> {
        let Request {
            header,
            output,
            input,
            status,
        } = Request::of(buffers)?;
        if let Some(waits) = self.throttled(head, &header, output.len().max(input.len())) {
            return Ok(waits);
        }
        if header.request == VIRTIO_BLK_T_FLUSH && self.block.flusher.is_some() {
            self.flush = Some(Flush {
                head,
                header,
                status,
            });
            return Ok(Outcome::KeptLast);
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

    /// Answers the request for which a flush was made, if one has ended.
    fn flushed(&mut self, queue: &Queue) -> Option<Result<(u16, Outcome), DriverError>> {
        let outcome = self.block.flusher.as_ref()?.outcome()?;
        // Else its driver has given up.
        let head = self.block.flushing.take()?;
        let request = self.taken(queue, head).and_then(Request::of);
        Some(request.map(|Request { header, status, .. }| {
            let answered = self
                .block
                .answer(&header, outcome.map(|()| Some(0)), &status);
            (head, Outcome::Used(answered))
        }))
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
        if let Some(flushed) = self.flushed(queue) {
            return Some(flushed);
        }
        if !self.begins {
            return None;
        }
        let head = self.block.throttle.due()?;
        let buffers = self.taken(queue, head);
        let served = buffers.and_then(|buffers| self.serve(head, buffers));
        Some(served.map(|outcome| (head, outcome)))
    }

    fn handle(&mut self, chain: DescriptorChain<&'m GuestMemory>) -> Result<Outcome, DriverError> {
        if !self.begins {
            return Ok(Outcome::Later);
        }
        let head = chain.head_index();
        self.serve(head, Buffers::of(chain, self.memory, QUEUE_ENTRIES.into())?)
    }

    fn finish(&mut self) -> Vec<(u16, u32)> {
        let Self {
            block, kept, flush, ..
        } = self;
        let outcomes = block.overlap.read(&block.disk, kept);
        if kept.len() > 1 {
            block.metrics.overlapped_reads.add(kept.len() as u64);
        }
        let both = kept.iter().zip(outcomes);
        let read = both.map(|(kept, outcome)| {
            let outcome = outcome.map(|()| Some(block.has_read(&kept.data)));
            let written = block.answer(&kept.header, outcome, &kept.status);
            (kept.head, written)
        });
        let mut done: Vec<(u16, u32)> = read.collect();
        if let Some(flush) = flush.take()
            && !block.begin_flush(flush.head)
        {
            self.ended_early = true;
            let outcome = block.flush().map(|()| Some(0));
            done.push((
                flush.head,
                block.answer(&flush.header, outcome, &flush.status),
            ));
        }
        done
    }
}

/// A request, taken apart.
struct Request<'m> {
    header: Header,
    /// What is written to the disk.
    output: Run<'m>,
    /// Where what is read goes.
    input: Run<'m>,
    status: Run<'m>,
}

impl<'m> Request<'m> {
    fn of(buffers: Buffers<'m>) -> Result<Self, DriverError> {
        let Buffers {
            readable: mut output,
            writable: mut input,
        } = buffers;
        let status = input
            .take_last()
            .ok_or(DriverError::Incomplete("status byte"))?;
        let header = Header::take(&mut output).ok_or(DriverError::Incomplete("header"))?;
        Ok(Self {
            header,
            output,
            input,
            status,
        })
    }
}
