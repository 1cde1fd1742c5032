//! A round over a disk's queue.

use std::io;

use memory::GuestMemory;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::{DescriptorChain, Queue};

use super::{
    Block, Header, MAX_REQUEST_BYTES, QUEUE_ENTRIES,
    brought::{Brought, Manner},
    disk::Left,
    ring::ENTRIES,
    throttle::{Admission, Due, Way},
};
use crate::virtio::{
    DriverError,
    buffers::{Buffers, Run},
    chain::Chain,
    serve::{Handler, Outcome},
};

/// The most bytes of a round's reads that are kept, if it is not one read: as of one request.
#[cfg(not(test))]
const MAX_KEPT_BYTES: u64 = MAX_REQUEST_BYTES;
#[cfg(test)]
const MAX_KEPT_BYTES: u64 = super::test_reads::KEPT_BYTES;

/// A round, and the reads that it keeps for a later one.
pub(super) struct Round<'b, 'm> {
    block: &'b mut Block,
    memory: &'m GuestMemory,
    kept: Vec<Brought>,
    kept_bytes: u64,
    /// What those want, and how many reads bring it.
    wanted: Left,
    reads: u64,
    /// How many of them have not been kept before.
    newly_kept: u64,
    /// The flush that ends it.
    flush: Option<Flush<'m>>,
    /// Whether more is served than what was begun before.
    begins: bool,
    /// It ended with what could not be begun beside the loop, so that nothing else has the queue looked at.
    pub(super) ended_early: bool,
}

/// A flush that begins when its round ends, or when the reads of its round are answered.
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
            wanted: Left::default(),
            reads: 0,
            newly_kept: 0,
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

    /// Serves the request with this head, unless it has to wait. It does not for limits if it was `admitted` as a read of so many bytes
    /// and is one still.
    fn serve(
        &mut self,
        head: u16,
        buffers: Buffers<'m>,
        admitted: Option<u64>,
    ) -> Result<Outcome, DriverError> {
        let Request {
            header,
            output,
            input,
            status,
        } = Request::of(buffers)?;
        let is_admitted = header.request == VIRTIO_BLK_T_IN && admitted == Some(input.len());
        if !is_admitted
            && let Some(waits) = self.throttled(head, &header, output.len().max(input.len()))
        {
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
        let outcome = if self.may_wait(&header, &input) {
            if self.kept_bytes > 0 && self.kept_bytes + input.len() > MAX_KEPT_BYTES {
                self.block.throttle.put_back(head, input.len());
                return Ok(Outcome::KeptLast);
            }
            match self.block.disk.read_without_waiting(header.sector, &input) {
                Ok(wanted) if wanted.is_empty() => Ok(Some(self.block.has_read(&input))),
                Ok(wanted) => {
                    self.newly_kept += 1;
                    return Ok(self.keep(head, input.len(), wanted));
                }
                Err(error) => Err(error),
            }
        } else {
            self.block.execute(&header, &output, &input)
        };
        Ok(Outcome::Used(self.block.answer(&header, outcome, &status)))
    }

    /// Keeps a read of so many bytes for a later round, since it wants what is not there yet.
    fn keep(&mut self, head: u16, bytes: u64, wanted: Left) -> Outcome {
        let begin = self.wanted.awaited.len();
        let manner = match wanted.awaited.len() {
            0 => Manner::Reads,
            count => Manner::Fetched(begin..begin + count),
        };
        self.kept.push(Brought {
            head,
            bytes,
            manner,
        });
        self.kept_bytes += bytes;
        self.reads += wanted.read_count();
        self.wanted.extend(wanted);
        // More would not be brought with it, and wait on the loop.
        match self.reads < ENTRIES.into() {
            true => Outcome::Kept,
            false => Outcome::KeptLast,
        }
    }

    /// Makes a read for which what it wants was brought, if there is one.
    fn brought(&mut self, queue: &Queue) -> Option<Result<(u16, Outcome), DriverError>> {
        let Brought {
            head,
            bytes,
            manner,
        } = self.block.brought.pop_front()?;
        let request = self.taken(queue, head).and_then(Request::of);
        Some(request.map(|request| {
            let Request {
                header,
                input,
                status,
                ..
            } = request;
            // It is still the driver's to change, and was admitted as what it was.
            let same = header.request == VIRTIO_BLK_T_IN && input.len() == bytes;
            let disk = &self.block.disk;
            let outcome = match manner {
                _ if !same => Err(io::ErrorKind::InvalidInput.into()),
                Manner::ReadsAll => disk.read(header.sector, &input).map(|()| Left::default()),
                // Whoever has it has been asked, and is not asked by the loop.
                Manner::Fetched(_) | Manner::ReadsHere => disk
                    .read_here(header.sector, &input)
                    .map(|()| Left::default()),
                Manner::Reads => disk.read_what_is_here(header.sector, &input),
                Manner::Anew => disk.read_without_waiting(header.sector, &input),
            };
            let outcome = match outcome {
                Ok(wanted) if wanted.is_empty() => Ok(Some(self.block.has_read(&input))),
                Ok(wanted) => return (head, self.keep_again(head, bytes, wanted)),
                Err(error) => Err(error),
            };
            let answered = self.block.answer(&header, outcome, &status);
            (head, Outcome::Used(answered))
        }))
    }

    /// Keeps a read once more: what it wants is fetched with what else this round keeps, or, if it begins nothing, in a later one.
    fn keep_again(&mut self, head: u16, bytes: u64, wanted: Left) -> Outcome {
        if self.begins {
            return self.keep(head, bytes, wanted);
        }
        self.kept.push(Brought {
            head,
            bytes,
            manner: Manner::Anew,
        });
        Outcome::Kept
    }

    /// Makes the flush that came behind reads, now that they are answered, if there is one.
    fn flush_behind(&mut self, queue: &Queue) -> Option<Result<(u16, Outcome), DriverError>> {
        let head = self.block.flush_behind.take()?;
        let request = self.taken(queue, head).and_then(Request::of);
        Some(request.map(|Request { header, status, .. }| {
            // As above.
            if header.request != VIRTIO_BLK_T_FLUSH {
                let outcome = Err(io::ErrorKind::InvalidInput.into());
                let answered = self.block.answer(&header, outcome, &status);
                return (head, Outcome::Used(answered));
            }
            self.flush = Some(Flush {
                head,
                header,
                status,
            });
            (head, Outcome::KeptLast)
        }))
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

    /// Whether it is a read that may wait for a later round.
    fn may_wait(&self, header: &Header, input: &Run<'_>) -> bool {
        header.request == VIRTIO_BLK_T_IN
            && input.len() <= MAX_REQUEST_BYTES
            && self.block.bringer.is_some()
    }
}

impl<'m> Handler<'m> for Round<'_, 'm> {
    fn handle_kept(&mut self, queue: &Queue) -> Option<Result<(u16, Outcome), DriverError>> {
        if let Some(flushed) = self.flushed(queue) {
            return Some(flushed);
        }
        if let Some(brought) = self.brought(queue) {
            return Some(brought);
        }
        if !self.begins {
            return None;
        }
        if let Some(flush) = self.flush_behind(queue) {
            return Some(flush);
        }
        let Due { head, admitted } = self.block.throttle.due()?;
        let buffers = self.taken(queue, head);
        let served = buffers.and_then(|buffers| self.serve(head, buffers, admitted));
        Some(served.map(|outcome| (head, outcome)))
    }

    fn handle(&mut self, chain: DescriptorChain<&'m GuestMemory>) -> Result<Outcome, DriverError> {
        if !self.begins {
            return Ok(Outcome::Later);
        }
        let head = chain.head_index();
        let buffers = Buffers::of(chain, self.memory, QUEUE_ENTRIES.into())?;
        self.serve(head, buffers, None)
    }

    fn finish(&mut self) -> Vec<(u16, u32)> {
        let Self {
            block,
            kept,
            wanted,
            newly_kept,
            flush,
            ..
        } = self;
        let flush = flush.take();
        if !kept.is_empty() {
            // Who asked for them is not to wait for the flush, too; nor for one that came behind them in an earlier round.
            block.flush_behind = flush.map(|flush| flush.head).or(block.flush_behind);
            // If it is not begun, or nothing is to be, the next round looks at them all the same.
            let begun = block.begin_to_bring(kept, std::mem::take(wanted));
            if begun {
                block.metrics.awaited_reads.add(*newly_kept);
            }
            self.ended_early = !begun;
            return Vec::new();
        }
        let Some(flush) = flush else {
            return Vec::new();
        };
        if block.begin_flush(flush.head) {
            return Vec::new();
        }
        self.ended_early = true;
        let outcome = block.flush().map(|()| Some(0));
        let answered = block.answer(&flush.header, outcome, &flush.status);
        vec![(flush.head, answered)]
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
