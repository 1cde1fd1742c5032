//! What the two sides of a virtio device share without a lock.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{Counter, InterruptLine, sync::lock};

/// Interrupts, notifications, and the news that a device needs a reset.
#[derive(Debug)]
pub(crate) struct Shared {
    line: Arc<dyn InterruptLine>,
    interrupt_status: AtomicU32,
    needs_reset: AtomicBool,
    /// The configuration space as the driver reads it.
    config: Mutex<Vec<u8>>,
    /// How often it has changed.
    config_generation: AtomicU32,
    /// One per queue; a guest's notification makes it readable.
    notify: Vec<EventFd>,
    pub(crate) interrupts: Counter,
    pub(crate) interrupt_failures: Counter,
    pub(crate) rules_broken: Counter,
    pub(crate) rounds: Counter,
}

impl Shared {
    pub(crate) fn new(
        line: Arc<dyn InterruptLine>,
        queues: usize,
        config: Vec<u8>,
    ) -> io::Result<Self> {
        let notify = (0..queues)
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<io::Result<_>>()?;
        Ok(Self {
            line,
            interrupt_status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            config: Mutex::new(config),
            config_generation: AtomicU32::new(0),
            notify,
            interrupts: Counter::default(),
            interrupt_failures: Counter::default(),
            rules_broken: Counter::default(),
            rounds: Counter::default(),
        })
    }

    pub(crate) fn notify(&self) -> &[EventFd] {
        &self.notify
    }

    /// Makes the event loop look at queue `index`.
    pub(crate) fn signal(&self, index: usize) {
        if let Some(event) = self.notify.get(index) {
            // It fails only when its count is at the limit, and then it is readable anyway.
            let _ = event.write(1);
        }
    }

    pub(crate) fn interrupt_used_buffer(&self) {
        self.interrupt(VIRTIO_MMIO_INT_VRING);
    }

    fn interrupt(&self, cause: u32) {
        // The driver reads the cause after the edge, and what the cause is about after that.
        self.interrupt_status.fetch_or(cause, Ordering::AcqRel);
        self.send_edge();
    }

    fn send_edge(&self) {
        self.interrupts.add(1);
        if self.line.trigger().is_err() {
            self.interrupt_failures.add(1);
        }
    }

    /// Sends an edge for what the driver has not acknowledged.
    pub(crate) fn resend(&self) {
        if self.interrupt_status() != 0 {
            self.send_edge();
        }
    }

    pub(crate) fn interrupt_status(&self) -> u32 {
        self.interrupt_status.load(Ordering::Acquire)
    }

    pub(crate) fn set_interrupt_status(&self, causes: u32) {
        self.interrupt_status.store(causes, Ordering::Release);
    }

    pub(crate) fn acknowledge(&self, causes: u32) {
        self.interrupt_status.fetch_and(!causes, Ordering::AcqRel);
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(crate) fn set_needs_reset(&self, needs_reset: bool) {
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    /// Copies the configuration space from `offset` to `data`, as far as there is any.
    pub(crate) fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = lock(&self.config);
        let tail = config.get(offset..).unwrap_or_default();
        let len = tail.len().min(data.len());
        data[..len].copy_from_slice(&tail[..len]);
    }

    /// A driver that finds the same number before and after it read several fields has read them of one
    /// instant (virtio 1.3, 2.5.1).
    pub(crate) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::Acquire)
    }

    /// Changes the configuration space under a driver that runs, and tells it.
    pub(crate) fn change_config(&self, config: Vec<u8>) {
        *lock(&self.config) = config;
        self.config_generation.fetch_add(1, Ordering::AcqRel);
        self.interrupt(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Tells the driver that it has broken a rule; `running` once it has set `DRIVER_OK`, before which
    /// it must not be interrupted.
    pub(crate) fn rule_broken(&self, running: bool) {
        self.rules_broken.add(1);
        if !self.needs_reset.swap(true, Ordering::AcqRel) && running {
            self.interrupt(VIRTIO_MMIO_INT_CONFIG);
        }
    }
}
