//! The virtio block device (virtio 1.3, section 5.2) on a raw image or a disk that branches.

#[cfg(test)]
mod branching_tests;
mod bringer;
#[cfg(test)]
mod bringer_tests;
mod brought;
mod control;
mod disk;
mod fetch;
#[cfg(test)]
mod fetch_tests;
mod flusher;
#[cfg(test)]
mod flusher_tests;
mod metrics;
mod range;
mod ring;
mod round;
#[cfg(test)]
mod size_tests;
mod state;
#[cfg(test)]
mod test_reads;
#[cfg(test)]
mod test_requests;
#[cfg(test)]
mod tests;
mod throttle;
#[cfg(test)]
mod throttle_tests;
mod vectored;

use std::{collections::VecDeque, io, path::Path, sync::Arc, time::Instant};

use branch_disk::Space;
use memory::GuestMemory;
use saved_state::{Kind, SavedState, Section};
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
        VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
        VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
        VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
    },
    virtio_ids::VIRTIO_ID_BLOCK,
};
use virtio_queue::Queue;

use super::{
    DriverError, EventSource, Progress, SavedTransport, VirtioDevice, buffers::Run,
    serve::serve_round,
};
use crate::{Error, Metrics, StoppedClock, sync::lock};
use bringer::Bringer;
use brought::Brought;
pub use control::DiskControl;
use disk::{Disk, Peek};
pub use disk::{DiskError, SharedDisk};
use flusher::Flusher;
use metrics::BlockMetrics;
use range::Range;
use round::Round;
pub use state::SavedBlock;
pub use throttle::DiskLimits;
use throttle::Throttle;

/// The unit of the request header and of the capacity, whatever the disk's own blocks are.
pub const SECTOR_BYTES: u64 = 512;

/// The most bytes of a disk's identity.
pub const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Up to and with `write_zeroes_may_unmap` and its padding.
const CONFIG_BYTES: usize = 60;

const QUEUE_ENTRIES: u16 = 256;
/// A request also has a header and a status, and no more descriptors than the queue has entries.
const MAX_SEGMENTS: u32 = QUEUE_ENTRIES as u32 - 2;
/// With [`MAX_SEGMENTS`] it bounds a request to 64 MiB: what is read or written in one go, and how
/// long a quiesce can have to wait.
const MAX_SEGMENT_BYTES: u32 = 256 << 10;
const MAX_REQUEST_BYTES: u64 = MAX_SEGMENTS as u64 * MAX_SEGMENT_BYTES as u64;

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const READ_ONLY: u64 = 1 << VIRTIO_BLK_F_RO;
const SIZE_MAX: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX;
const SEG_MAX: u64 = 1 << VIRTIO_BLK_F_SEG_MAX;
const DISCARD: u64 = 1 << VIRTIO_BLK_F_DISCARD;
const WRITE_ZEROES: u64 = 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// The most sectors of a discard: 1 GiB, which a file system frees in no time.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// The most sectors of zeroes: where the host has to write them, no more than any other request.
const MAX_ZEROES_SECTORS: u32 = (MAX_REQUEST_BYTES / SECTOR_BYTES) as u32;
/// What a discard should begin at, in sectors: the host's file systems free blocks of 4 KiB.
const DISCARD_ALIGNMENT: u32 = 8;

/// A disk.
pub struct Block {
    disk: Arc<Disk>,
    throttle: Throttle,
    /// Without one, reads wait where they are served.
    bringer: Option<Bringer>,
    /// The reads for which it brings, or has brought, what they want.
    brought: VecDeque<Brought>,
    /// Without one, flushes are made where they are served.
    flusher: Option<Flusher>,
    /// The head of the request for which it flushes.
    flushing: Option<u16>,
    /// That of a flush which is made when the reads that came before it are answered.
    flush_behind: Option<u16>,
    id: String,
    /// What the driver has accepted.
    accepted: u64,
    metrics: Arc<BlockMetrics>,
}

impl Block {
    /// A disk on the raw image at `path`, a file or a block device, which is locked: exclusively, or
    /// shared with others who only read it. The guest sees `id` as its serial number.
    ///
    /// # Errors
    ///
    /// [`DiskError`].
    pub fn open(path: &Path, read_only: bool, id: &str) -> Result<Self, DiskError> {
        fits(id)?;
        Self::new(Disk::open(path, read_only)?, id)
    }

    /// A disk that branches. The guest sees `id` as its serial number.
    ///
    /// # Errors
    ///
    /// [`DiskError`].
    pub fn branching(disk: SharedDisk, id: &str) -> Result<Self, DiskError> {
        fits(id)?;
        Self::new(Disk::branching(disk)?, id)
    }

    fn new(disk: Disk, id: &str) -> Result<Self, DiskError> {
        Ok(Self {
            disk: Arc::new(disk),
            throttle: Throttle::new().map_err(DiskError::Events)?,
            bringer: None,
            brought: VecDeque::new(),
            flusher: None,
            flushing: None,
            flush_behind: None,
            id: id.to_owned(),
            accepted: 0,
            metrics: Arc::default(),
        })
    }

    /// The same with limits.
    #[must_use]
    pub fn limited(mut self, limits: DiskLimits) -> Self {
        self.throttle.set_limits(limits);
        self
    }

    /// The same, whose flushes are made on a thread of their own: meanwhile this disk serves nothing else, but whoever serves it can
    /// serve others.
    ///
    /// # Errors
    ///
    /// [`DiskError::Events`].
    pub fn flushing_aside(mut self) -> Result<Self, DiskError> {
        let flusher = Flusher::new(Arc::clone(&self.disk)).map_err(DiskError::Events)?;
        self.flusher = Some(flusher);
        Ok(self)
    }

    /// The same, for whose reads the kernel brings into the page cache what is not there: meanwhile this disk serves nothing else, but
    /// whoever serves it can serve others.
    ///
    /// # Errors
    ///
    /// [`DiskError::Events`].
    pub fn reading_aside(mut self) -> Result<Self, DiskError> {
        let bringer = Bringer::new(Arc::clone(&self.disk)).map_err(DiskError::Events)?;
        self.bringer = Some(bringer);
        Ok(self)
    }

    /// Has its limits take the time from `clock`. For tests and fuzzers, which then look at the queue themselves when time has
    /// passed.
    pub fn stop_clock(&mut self, clock: &StoppedClock) {
        self.throttle.stop_clock(clock);
    }

    /// By which the disk can be changed while the device is in use.
    pub fn control(&self) -> DiskControl {
        DiskControl::new(Arc::clone(&self.disk), Arc::clone(self.throttle.limits()))
    }

    /// Has every read kept for a later round, if it [reads aside](Self::reading_aside), as if nothing were in the host's page cache. For
    /// tests and fuzzers, whose files always are.
    pub fn keep_reads(&self) {
        self.disk.set_peek(Peek::Nothing);
    }

    /// Writes how a request has gone; returns the bytes written in all.
    fn answer(
        &self,
        header: &Header,
        outcome: io::Result<Option<u32>>,
        status_byte: &Run<'_>,
    ) -> u32 {
        let (status, written) = match outcome {
            Ok(Some(written)) => (VIRTIO_BLK_S_OK, written),
            Ok(None) => {
                self.metrics.unsupported.add(1);
                (VIRTIO_BLK_S_UNSUPP, 0)
            }
            Err(error) => {
                self.metrics.errors.add(1);
                tracing::debug!(path = self.disk.path(), ?header, %error, "disk request failed");
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        written + status_byte.fill(&[status as u8])
    }

    /// Counts a read; returns the bytes of it.
    fn has_read(&self, data: &Run<'_>) -> u32 {
        self.metrics.reads.add(1);
        self.metrics.read_bytes.add(data.len());
        data.len() as u32
    }

    /// Returns the bytes written to `input`; `None` for a request of unknown type.
    fn execute(
        &self,
        header: &Header,
        output: &Run<'_>,
        input: &Run<'_>,
    ) -> io::Result<Option<u32>> {
        if output.len().max(input.len()) > MAX_REQUEST_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let metrics = &self.metrics;
        let written = match header.request {
            VIRTIO_BLK_T_IN => {
                self.disk.read(header.sector, input)?;
                self.has_read(input)
            }
            VIRTIO_BLK_T_OUT => {
                self.disk.write(header.sector, output)?;
                self.written()?;
                metrics.writes.add(1);
                metrics.written_bytes.add(output.len());
                0
            }
            VIRTIO_BLK_T_DISCARD if self.accepted & DISCARD != 0 => {
                let range = Range::of(output, MAX_DISCARD_SECTORS)?;
                // A discard has no flags (virtio 1.3, 5.2.6.2).
                let Some(range) = range.known(0) else {
                    return Ok(None);
                };
                self.disk.discard(range.sector, range.len())?;
                self.written()?;
                metrics.discards.add(1);
                metrics.discarded_bytes.add(range.len());
                0
            }
            VIRTIO_BLK_T_WRITE_ZEROES if self.accepted & WRITE_ZEROES != 0 => {
                let range = Range::of(output, MAX_ZEROES_SECTORS)?;
                let Some(range) = range.known(VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) else {
                    return Ok(None);
                };
                let space = match range.flags {
                    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP => Space::Free,
                    _ => Space::Keep,
                };
                let (sector, len) = (range.sector, range.len());
                self.disk.write_zeroes(sector, len, space)?;
                self.written()?;
                metrics.write_zeroes.add(1);
                metrics.zeroed_bytes.add(len);
                0
            }
            VIRTIO_BLK_T_FLUSH => {
                self.flush()?;
                0
            }
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; ID_BYTES];
                id[..self.id.len()].copy_from_slice(self.id.as_bytes());
                input.fill(&id)
            }
            _ => return Ok(None),
        };
        Ok(Some(written))
    }

    /// After a change: if the driver does not flush, every one must be durable when it completes.
    fn written(&self) -> io::Result<()> {
        if self.accepted & FLUSH == 0 {
            self.flush()?;
        }
        Ok(())
    }

    /// Whether a request was begun in an earlier round that is not answered yet.
    fn owes_answers(&self) -> bool {
        self.flushing.is_some() || !self.brought.is_empty() || self.flush_behind.is_some()
    }

    /// Begins the flush that the request with this head asks for; says whether that could be done.
    fn begin_flush(&mut self, head: u16) -> bool {
        let begun = self.flusher.as_mut().is_some_and(Flusher::begin);
        if begun {
            self.metrics.flushes.add(1);
            self.flushing = Some(head);
        }
        begun
    }

    /// Serves a round; or of it only the answers to what was begun in earlier ones, if `begins` nothing.
    fn serve(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
        begins: bool,
    ) -> Result<Progress, DriverError> {
        // Its end has it look again.
        if self.is_at_work() {
            return Ok(Progress::default());
        }
        self.learn_what_was_fetched();
        let mut round = Round::begin(self, memory, begins);
        let progress = serve_round(queue, memory, &mut round)?;
        Ok(Progress {
            more: progress.more || round.ended_early,
            begun: self.owes_answers(),
            ..progress
        })
    }

    /// Makes all writes that have completed durable.
    fn flush(&self) -> io::Result<()> {
        self.metrics.flushes.add(1);
        self.disk.flush()
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> Kind {
        SavedBlock::KIND
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let of_mode = if self.disk.read_only() {
            READ_ONLY
        } else {
            DISCARD | WRITE_ZEROES
        };
        FLUSH | SIZE_MAX | SEG_MAX | of_mode
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_ENTRIES]
    }

    /// `struct virtio_blk_config` as far as zeroes; what belongs to features that are not offered is 0.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.disk.sectors().to_le_bytes());
        put(8, &MAX_SEGMENT_BYTES.to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        if !self.disk.read_only() {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &range::MAX_RANGES.to_le_bytes());
            put(44, &DISCARD_ALIGNMENT.to_le_bytes());
            put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
            put(52, &range::MAX_RANGES.to_le_bytes());
            // Zeroes that need not keep their space do not.
            put(56, &[1]);
        }
        config
    }

    fn sources(&self) -> Vec<EventSource<'_>> {
        let flushed = self.flusher.as_ref().map(Flusher::ended);
        let brought = self.bringer.as_ref().map(Bringer::ended);
        let timer = std::iter::once(self.throttle.timer());
        let descriptors = timer.chain(flushed).chain(brought);
        let source = |descriptor| EventSource {
            descriptor,
            readable: Some(0),
            writable: None,
        };
        descriptors.map(source).collect()
    }

    fn is_at_work(&self) -> bool {
        self.flusher.as_ref().is_some_and(Flusher::is_under_way)
            || self.bringer.as_ref().is_some_and(Bringer::is_under_way)
    }

    fn end_early(&self) {
        if let Some(bringer) = &self.bringer {
            bringer.end_early();
        }
    }

    fn settle(&self, deadline: Instant) -> bool {
        let (flusher, bringer) = (self.flusher.as_ref(), self.bringer.as_ref());
        flusher.is_none_or(|flusher| flusher.wait_until(deadline))
            && bringer.is_none_or(|bringer| bringer.wait_until(deadline))
    }

    fn activate(&mut self, features: u64) {
        self.accepted = features;
    }

    fn reset(&mut self) {
        self.accepted = 0;
        self.forget_queue(0);
    }

    fn forget_queue(&mut self, _index: usize) {
        self.throttle.set_waiting(&[]);
        self.flushing = None;
        self.flush_behind = None;
        self.brought.clear();
        // The next driver does not wait for all that was asked for.
        self.end_early();
    }

    fn process_queue(
        &mut self,
        _index: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Progress, DriverError> {
        self.serve(queue, memory, true)
    }

    fn answer_queue(
        &mut self,
        _index: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Progress, DriverError> {
        // Else there is nothing to answer.
        match self.owes_answers() {
            true => self.serve(queue, memory, false),
            false => Ok(Progress::default()),
        }
    }

    fn save(
        &self,
        instance: u32,
        transport: SavedTransport,
    ) -> Result<Section, saved_state::Error> {
        let Self {
            disk,
            throttle,
            // Nothing is under way. What is over is answered, unless its driver has broken a rule since or there was no time, or it was
            // ended early.
            bringer: _,
            brought,
            flusher: _,
            flushing,
            flush_behind,
            id,
            // The transport has it.
            accepted: _,
            metrics: _,
        } = self;
        let DiskLimits {
            total,
            reads,
            writes,
        } = *lock(throttle.limits());
        let brought = brought.iter().map(|read| read.head);
        let flushes = flush_behind.iter().chain(flushing).copied();
        let saved = SavedBlock {
            path: disk.path().to_owned(),
            capacity_sectors: disk.sectors(),
            read_only: disk.read_only(),
            id: id.clone(),
            transport,
            total_limit: total.into(),
            read_limit: reads.into(),
            write_limit: writes.into(),
            waiting: brought.chain(flushes).chain(throttle.waiting()).collect(),
        };
        Section::encode(instance, &saved)
    }

    /// The image may have another path than when it was saved. Limits are what they were, and nothing of them is used up.
    fn restore(&mut self, section: &Section) -> Result<SavedTransport, Error> {
        let SavedBlock {
            path: _,
            capacity_sectors,
            read_only,
            id,
            transport,
            total_limit,
            read_limit,
            write_limit,
            waiting,
        } = section.decode()?;
        let path = self.disk.path().to_owned();
        if capacity_sectors != self.disk.sectors() {
            return Err(DiskError::CapacityChanged {
                path,
                saved: capacity_sectors,
                found: self.disk.sectors(),
            }
            .into());
        }
        if read_only != self.disk.read_only() {
            return Err(DiskError::ModeChanged { path, read_only }.into());
        }
        fits(&id)?;
        self.id = id;
        // Each that waits was taken off the ring and not given back.
        if waiting.len() > transport.in_use(0).into() {
            return Err(Error::Impossible {
                kind: SavedBlock::KIND,
                reason: "more requests wait than were made".to_owned(),
            });
        }
        self.throttle.set_limits(DiskLimits {
            total: total_limit.into(),
            reads: read_limit.into(),
            writes: write_limit.into(),
        });
        self.throttle.set_waiting(&waiting);
        self.flushing = None;
        self.flush_behind = None;
        self.brought.clear();
        Ok(transport)
    }

    fn metrics(&self) -> Arc<dyn Metrics> {
        Arc::clone(&self.metrics) as _
    }
}

/// Whether the guest can see all of an identity.
fn fits(id: &str) -> Result<(), DiskError> {
    if id.len() > ID_BYTES {
        return Err(DiskError::LongId { id: id.to_owned() });
    }
    Ok(())
}

/// The header of a request.
#[derive(Debug)]
struct Header {
    request: u32,
    sector: u64,
}

impl Header {
    /// Takes the header off the front of what the driver has written.
    fn take(output: &mut Run<'_>) -> Option<Self> {
        let request = u32::from_le_bytes(output.take_front()?);
        let _reserved: [u8; 4] = output.take_front()?;
        let sector = u64::from_le_bytes(output.take_front()?);
        Some(Self { request, sector })
    }
}
