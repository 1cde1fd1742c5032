//! The event loop's side of a virtio device: its queues and the device behind them.

use std::{sync::Arc, time::Instant};

use memory::GuestMemory;
use virtio_queue::{Queue, QueueT};

use super::{DriverError, Progress, VirtioDevice, shared::Shared};

/// The queues of one device and what serves them.
pub(crate) struct Worker {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) queues: Vec<Queue>,
    pub(super) memory: GuestMemory,
    /// The driver has set `DRIVER_OK` and has not reset the device since.
    pub(super) active: bool,
    pub(super) shared: Arc<Shared>,
}

impl Worker {
    /// Whether a driver is at work.
    pub(crate) fn is_active(&self) -> bool {
        self.active
    }

    /// Serves queue `index` for one bounded round. Returns whether there may be more to do: the queue's event is signalled then, or
    /// another will be.
    pub(crate) fn process(&mut self, index: usize) -> bool {
        self.round(index, |device, queue, memory| {
            device.process_queue(index, queue, memory)
        })
    }

    /// A round over queue `index`, which `serve` serves.
    fn round(
        &mut self,
        index: usize,
        serve: impl FnOnce(
            &mut dyn VirtioDevice,
            &mut Queue,
            &GuestMemory,
        ) -> Result<Progress, DriverError>,
    ) -> bool {
        let Self {
            device,
            queues,
            memory,
            active,
            shared,
        } = self;
        let Some(queue) = queues.get_mut(index) else {
            return false;
        };
        if !*active || !queue.ready() || shared.needs_reset() {
            // Nobody is told, but a driver that starts later reads what is true then.
            if !*active && device.take_config_change() {
                shared.set_config(device.config());
            }
            return false;
        }
        shared.rounds.add(1);
        let round = serve(device.as_mut(), queue, memory);
        if device.take_config_change() {
            shared.change_config(device.config(), true);
        }
        match round {
            Ok(progress) => {
                if progress.interrupt {
                    shared.interrupt_used_buffer();
                }
                if progress.more {
                    shared.signal(index);
                }
                if let Some(also) = progress.also {
                    shared.signal(also);
                }
                progress.more || progress.begun
            }
            Err(error) => {
                tracing::debug!(device = %device.kind(), queue = index, %error, "driver broke a rule");
                shared.rule_broken(true);
                false
            }
        }
    }

    /// Serves the requests in queue `index` until there are none, or something is under way still at `until`; one round in any case where
    /// nothing is.
    pub(crate) fn serve_until(&mut self, index: usize, until: Instant) {
        if !self.device.holds_requests(index) {
            return;
        }
        while self.settle(until) && self.process(index) && Instant::now() < until {}
    }

    /// Has what is under way end early, where it can be begun anew.
    pub(crate) fn end_early(&self) {
        self.device.end_early();
    }

    /// Answers what is over in queue `index`. Says whether nothing is under way then, which has to be so by `deadline`.
    #[must_use = "something may be under way still"]
    pub(crate) fn answer(&mut self, index: usize, deadline: Instant) -> bool {
        if !self.device.holds_requests(index) {
            return true;
        }
        let is_settled = self.settle(deadline);
        if is_settled {
            self.round(index, |device, queue, memory| {
                device.answer_queue(index, queue, memory)
            });
        }
        is_settled
    }

    /// Waits until nothing is under way that a round has begun; says whether that is so by `deadline`.
    #[must_use = "something may be under way still"]
    pub(crate) fn settle(&self, deadline: Instant) -> bool {
        self.device.settle(deadline)
    }

    /// Whether something is under way that a round has begun.
    pub(crate) fn is_at_work(&self) -> bool {
        self.device.is_at_work()
    }

    /// Number of queues.
    pub(crate) fn queue_count(&self) -> usize {
        self.queues.len()
    }
}
