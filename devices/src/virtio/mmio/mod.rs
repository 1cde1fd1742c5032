//! The virtio-mmio transport (virtio 1.3, section 4.2): the vCPUs' side of a device.

mod host_side;
mod registers;
mod state;
#[cfg(test)]
mod tests;

use std::{
    slice,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use memory::GuestMemory;
use saved_state::{Kind, Section};
use virtio_bindings::{
    virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_F_VERSION_1},
    virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::{VirtioDevice, Worker, shared::Shared};
use crate::{Device, Error, InterruptLine, Metrics, event_loop::drain, sync::lock};
pub use host_side::HostSide;
use registers::Registers;
pub use state::SavedTransport;

/// Guest-physical addresses that a transport answers for.
pub const MMIO_BYTES: u64 = 0x1000;

/// The register that a driver writes a queue's index to, in 32 bits, to notify the device.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// How long who has no loop waits for what a device does beside its rounds.
const SERVE_BOUND: Duration = Duration::from_secs(60);

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A virtio device on the bus.
pub struct MmioTransport {
    kind: Kind,
    device_type: u32,
    /// All feature bits that are offered.
    features: u64,
    queue_sizes: &'static [u16],
    metrics: Arc<dyn Metrics>,
    registers: Registers,
    shared: Arc<Shared>,
    worker: Arc<Mutex<Worker>>,
}

impl MmioTransport {
    /// Puts `device` on a transport. Its buffers are in `memory`, its interrupts go out on `line`.
    ///
    /// # Errors
    ///
    /// [`Error::EventFd`], [`Error::QueueSize`].
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        line: Arc<dyn InterruptLine>,
    ) -> Result<Self, Error> {
        let queue_sizes = device.queue_sizes();
        let shared = Shared::new(line, queue_sizes.len(), device.config());
        let shared = Arc::new(shared.map_err(Error::EventFd)?);
        let queues = queue_sizes
            .iter()
            .map(|&size| Queue::new(size).map_err(|_| Error::QueueSize(size)))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            kind: device.kind(),
            device_type: device.device_type(),
            features: device.features() | VERSION_1 | EVENT_IDX | INDIRECT_DESC,
            queue_sizes,
            metrics: device.metrics(),
            registers: Registers::default(),
            shared: Arc::clone(&shared),
            worker: Arc::new(Mutex::new(Worker {
                device,
                queues,
                memory,
                active: false,
                shared,
            })),
        })
    }

    /// The notifications that may bypass the bus: a write of the queue's index, in 32 bits, at the
    /// offset, is the same as a signal on the eventfd.
    pub fn ioeventfds(&self) -> impl Iterator<Item = (u64, u32, &EventFd)> {
        self.shared
            .notify()
            .iter()
            .zip(0..)
            .map(|(event, index)| (QUEUE_NOTIFY, index, event))
    }

    /// What who has changed the device from outside tells it by.
    pub fn host_side(&self) -> HostSide {
        HostSide {
            shared: Arc::clone(&self.shared),
            worker: Arc::clone(&self.worker),
        }
    }

    /// Serves queue `index` for one bounded round on this thread, as the [`crate::EventLoop`] does when it was notified
    /// or one of its sources has an event, once what earlier rounds have begun is over; returns whether there may be more to do. For
    /// who has no loop, such as a fuzzer.
    pub fn serve(&self, index: usize) -> bool {
        self.settle();
        lock(&self.worker).process(index)
    }

    /// Waits for what [`Self::serve`] has begun, as who has no loop has to before the device is saved or dropped.
    pub fn settle(&self) {
        let settled = lock(&self.worker).settle(Instant::now() + SERVE_BOUND);
        if !settled {
            tracing::warn!(kind = %self.kind, "a device is still at work");
        }
    }

    /// Has the device stand still as the [`crate::EventLoop`] does before a machine is saved: what takes its time is ended early where it can
    /// be begun anew, and what is over is answered.
    pub fn drain(&self) {
        let now = Instant::now();
        if !drain(slice::from_ref(&self.worker), now, now + SERVE_BOUND) {
            tracing::warn!(kind = %self.kind, "a device is still at work");
        }
    }

    /// The side that the event loop works on.
    pub(crate) fn worker(&self) -> &Arc<Mutex<Worker>> {
        &self.worker
    }
}

impl Device for MmioTransport {
    fn kind(&self) -> Kind {
        self.kind
    }

    fn save(&self, instance: u32) -> Result<Section, saved_state::Error> {
        // What is skipped follows from the device, belongs to the host, or is in the worker.
        let Self {
            kind: _,
            device_type: _,
            features: _,
            queue_sizes: _,
            metrics: _,
            registers:
                Registers {
                    status,
                    device_features_sel,
                    driver_features_sel,
                    driver_features,
                    queue_sel,
                },
            shared,
            worker,
        } = self;
        let Worker {
            device,
            queues,
            memory: _,
            // It follows from the status.
            active: _,
            shared: _,
        } = &*lock(worker);
        let transport = SavedTransport {
            status: *status,
            needs_reset: shared.needs_reset(),
            interrupt_status: shared.interrupt_status(),
            device_features_sel: *device_features_sel,
            driver_features_sel: *driver_features_sel,
            driver_features: *driver_features,
            queue_sel: *queue_sel,
            queues: queues.iter().map(|queue| queue.state().into()).collect(),
        };
        device.save(instance, transport)
    }

    fn restore(&mut self, section: &Section) -> Result<(), Error> {
        let mut worker = lock(&self.worker);
        if worker.active {
            // What its driver has told it since is not what the saved one's had.
            worker.device.reset();
        }
        let checked = worker.device.restore(section)?.check(
            self.kind,
            self.features,
            self.queue_sizes,
            &worker.memory,
        )?;
        self.registers = checked.registers;
        self.shared.set_needs_reset(checked.needs_reset);
        self.shared.set_interrupt_status(checked.interrupt_status);
        self.shared.restore_config(worker.device.config());
        worker.queues = checked.queues;
        worker.active = self.registers.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        if worker.active {
            worker.device.activate(self.registers.driver_features);
        }
        Ok(())
    }

    fn resume(&mut self) {
        self.shared.resend();
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let mut list = self.metrics.list();
        list.extend([
            ("rounds", self.shared.rounds.get()),
            ("interrupts", self.shared.interrupts.get()),
            ("interrupt_failures", self.shared.interrupt_failures.get()),
            ("rules_broken", self.shared.rules_broken.get()),
        ]);
        list
    }
}
