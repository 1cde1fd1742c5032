//! Virtio devices: what they have in common above and below their queues.
//!
//! A device is split in two, because two sides use it at once. The vCPUs touch registers
//! ([`MmioTransport`]), the event loop serves queues (the worker). A vCPU waits for the end of a round only
//! where it changes what the worker works with: it resets or starts the device, has agreed on its features, sets up
//! a queue or asks whether one is ready, or writes to the configuration space. What a driver does for each request it
//! does without a lock, or with one that is held for no longer than a copy takes: a slow disk never holds up a vCPU
//! that notifies, acknowledges an interrupt or reads the configuration space.

pub mod balloon;
pub mod block;
mod buffers;
mod chain;
pub mod console;
#[cfg(test)]
pub(crate) mod driver;
pub mod entropy;
mod events;
mod mmio;
pub mod net;
mod serve;
mod shared;
mod used;
pub mod vsock;
mod worker;

use std::{os::fd::BorrowedFd, sync::Arc, time::Instant};

use memory::GuestMemory;
use saved_state::{Kind, Section};
use virtio_queue::Queue;

use crate::{Error, Metrics};
pub(crate) use events::QueueEvents;
pub use mmio::{HostSide, MMIO_BYTES, MmioTransport, QUEUE_NOTIFY, SavedTransport};
pub(crate) use worker::Worker;

/// A virtio device without its transport.
///
/// Requests are served synchronously on the event loop: between two calls nothing is in flight,
/// which is what makes saving a device as simple as reading its fields. A request that has to wait is begun with later. What
/// a device does beside the loop nonetheless ([`VirtioDevice::is_at_work`]) does not touch guest memory, and is over before a machine is saved.
pub trait VirtioDevice: Send {
    /// The kind of the section that the device and its transport save together.
    fn kind(&self) -> Kind;

    /// The device ID of virtio 1.3, section 5.
    fn device_type(&self) -> u32;

    /// The feature bits of this type of device; the transport adds those of its own.
    fn features(&self) -> u64;

    /// Whether `features`, of those that are offered, may be accepted together.
    fn makes_sense(&self, _features: u64) -> bool {
        true
    }

    /// The most entries that each queue may have.
    fn queue_sizes(&self) -> &'static [u16];

    /// The configuration space.
    fn config(&self) -> Vec<u8>;

    /// The driver writes `data` at `offset` of the configuration space. Most are only read.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// Whether the configuration space has changed, but for what the driver writes, since this was last asked. It is asked
    /// after each round over a queue, and if so the driver is told.
    fn take_config_change(&mut self) -> bool {
        false
    }

    /// What else than a notification makes queues worth a look. It is the same as long as the device lives.
    fn sources(&self) -> Vec<EventSource<'_>> {
        Vec::new()
    }

    /// Whether queue `index` has requests of the driver's, which are served before a machine is saved. A queue
    /// of room for what comes from outside is left alone then, and what comes stays outside.
    fn holds_requests(&self, _index: usize) -> bool {
        true
    }

    /// The driver has set `DRIVER_OK`, or a state in which it had is restored; `features` is what it
    /// has accepted.
    fn activate(&mut self, features: u64);

    /// Forgets what the driver has told, as if fresh.
    fn reset(&mut self);

    /// Queue `index` has ended, or begins anew at the start of its rings: the buffers of it that the device still had are the
    /// driver's.
    fn forget_queue(&mut self, _index: usize) {}

    /// Serves what is available in queue `index`, within bounds.
    ///
    /// # Errors
    ///
    /// [`DriverError`] when the driver breaks a rule; the device is not asked to do anything until
    /// the driver resets it.
    fn process_queue(
        &mut self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Progress, DriverError>;

    /// Whether something is under way that a round has begun. The device looks at its queues when it is over.
    fn is_at_work(&self) -> bool {
        false
    }

    /// Has what is under way end early, where it can be begun anew when the queue is looked at again.
    fn end_early(&self) {}

    /// Waits until nothing is under way; says whether that is so by `deadline`.
    #[must_use = "something may be under way still"]
    fn settle(&self, _deadline: Instant) -> bool {
        true
    }

    /// Answers in queue `index` what is over of what rounds have begun, and begins nothing. What was ended early it keeps.
    ///
    /// # Errors
    ///
    /// As [`VirtioDevice::process_queue`].
    fn answer_queue(
        &mut self,
        _index: usize,
        _queue: &mut Queue,
        _memory: &GuestMemory,
    ) -> Result<Progress, DriverError> {
        Ok(Progress::default())
    }

    /// Saves the device together with its transport.
    ///
    /// # Errors
    ///
    /// [`saved_state::Error::Encode`].
    fn save(&self, instance: u32, transport: SavedTransport)
    -> Result<Section, saved_state::Error>;

    /// Takes over the device's part of what [`VirtioDevice::save`] has saved, and returns the
    /// transport's.
    ///
    /// # Errors
    ///
    /// As of [`crate::Device::restore`].
    fn restore(&mut self, section: &Section) -> Result<SavedTransport, Error>;

    /// The device's counters.
    fn metrics(&self) -> Arc<dyn Metrics>;
}

/// A file descriptor whose events make queues worth a look, like a notification of the driver's.
///
/// The loop hears of an event once, when it comes (`EPOLLET`). A device therefore takes all there is, or knows
/// what else will have it look again: the bound of a round, a notification, another source.
#[derive(Clone, Copy, Debug)]
pub struct EventSource<'a> {
    /// The descriptor.
    pub descriptor: BorrowedFd<'a>,
    /// The queue to look at when it is readable, or hung up.
    pub readable: Option<usize>,
    /// The queue to look at when it is writable.
    pub writable: Option<usize>,
}

/// What one round over a queue has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The driver wants to hear of buffers that were used.
    pub interrupt: bool,
    /// The round ended at its bound and there may be more to do.
    pub more: bool,
    /// It has begun what goes on beside the loop, whose end makes its queue worth a look.
    pub begun: bool,
    /// It has made another queue worth a look.
    pub also: Option<usize>,
}

/// How a driver breaks the rules. The device answers with `DEVICE_NEEDS_RESET`.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The queue itself is unusable.
    #[error("the virtqueue cannot be used: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// A descriptor chain ends in a descriptor that says it goes on, or does not begin.
    #[error("a descriptor chain is broken or loops")]
    BrokenChain,
    /// More chains are made available than the queue has entries.
    #[error("more buffers are made available than the queue has entries, {0}")]
    TooManyBuffers(u16),
    /// A chain has more descriptors than the queue has entries.
    #[error("a descriptor chain has more than {0} descriptors")]
    LongChain(usize),
    /// A buffer is not in guest memory.
    #[error("a buffer of {len} bytes at guest-physical {address:#x} is not in memory")]
    OutsideMemory {
        /// Guest-physical address of the buffer.
        address: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A device-readable descriptor follows a device-writable one.
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// The device cannot tell what is asked of it, or has no room to answer.
    #[error("a request lacks its {0}")]
    Incomplete(&'static str),
    /// A frame is left unfinished in a way that was not negotiated.
    #[error("a frame asks for an offload that was not negotiated")]
    Offload,
}
