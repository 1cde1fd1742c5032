//! The event loop's side of a virtio device: its queues and the device behind them.

use std::sync::Arc;

use memory::GuestMemory;
use virtio_queue::{Queue, QueueT};

use super::{VirtioDevice, shared::Shared};

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

    /// Serves queue `index` for one bounded round. Returns whether there may be more to do; then the
    /// queue's event is signalled.
    pub(crate) fn process(&mut self, index: usize) -> bool {
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
        let round = device.process_queue(index, queue, memory);
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
                progress.more
            }
            Err(error) => {
                tracing::debug!(device = %device.kind(), queue = index, %error, "driver broke a rule");
                shared.rule_broken(true);
                false
            }
        }
    }

    /// Serves the requests in queue `index` until there are none or `go_on` says so.
    pub(crate) fn drain(&mut self, index: usize, go_on: impl Fn() -> bool) {
        if self.device.holds_requests(index) {
            while self.process(index) && go_on() {}
        }
    }

    /// Number of queues.
    pub(crate) fn queue_count(&self) -> usize {
        self.queues.len()
    }
}
