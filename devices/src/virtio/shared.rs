//! What the two sides of a virtio device share, without a lock that is held while a queue is served.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{Counter, InterruptLine, random::random, sync::lock};

/// Interrupts, notifications, and the news that a device needs a reset.
#[derive(Debug)]
pub(crate) struct Shared {
    line: Arc<dyn InterruptLine>,
    interrupt_status: AtomicU32,
    needs_reset: AtomicBool,
    config: Mutex<Config>,
    /// One per queue; a guest's notification makes it readable.
    notify: Vec<EventFd>,
    pub(crate) interrupts: Counter,
    pub(crate) interrupt_failures: Counter,
    pub(crate) rules_broken: Counter,
    pub(crate) rounds: Counter,
}

/// The configuration space as the driver reads it.
#[derive(Debug)]
struct Config {
    bytes: Vec<u8>,
    /// Another one whenever it has changed.
    generation: u32,
    /// The generation when the driver first looked since it has reset the device.
    seen: Option<u32>,
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
            config: Mutex::new(Config {
                bytes: config,
                generation: 0,
                seen: None,
            }),
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

    /// Makes the event loop look at all queues.
    pub(crate) fn signal_all(&self) {
        for index in 0..self.notify.len() {
            self.signal(index);
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
        let mut config = lock(&self.config);
        let generation = config.generation;
        config.seen.get_or_insert(generation);
        let tail = config.bytes.get(offset..).unwrap_or_default();
        let len = tail.len().min(data.len());
        data[..len].copy_from_slice(&tail[..len]);
    }

    /// A driver that finds the same number before and after it read several fields has read them of one
    /// instant (virtio 1.3, 2.5.1).
    pub(crate) fn config_generation(&self) -> u32 {
        lock(&self.config).generation
    }

    /// The configuration space as the driver reads it.
    pub(crate) fn config(&self) -> Vec<u8> {
        lock(&self.config).bytes.clone()
    }

    /// Changes the configuration space.
    pub(crate) fn set_config(&self, bytes: Vec<u8>) {
        let mut config = lock(&self.config);
        config.bytes = bytes;
        // Under the same lock: who reads something new finds another generation afterwards.
        config.generation = config.generation.wrapping_add(1);
    }

    /// Changes the configuration space, and tells a driver that is `running`; before `DRIVER_OK` it must not be
    /// interrupted.
    pub(crate) fn change_config(&self, config: Vec<u8>, running: bool) {
        self.set_config(config);
        if running {
            self.interrupt(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// The driver has set `DRIVER_OK`. It is told of what has changed since it looked, of which it could not be told before.
    pub(crate) fn driver_starts(&self) {
        let config = lock(&self.config);
        let changed = config.seen.is_some_and(|seen| seen != config.generation);
        drop(config);
        if changed {
            self.interrupt(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// The driver has reset the device: it has seen nothing of a configuration space that is `config` now.
    pub(crate) fn reset_config(&self, config: Vec<u8>) {
        self.set_config(config);
        lock(&self.config).seen = None;
    }

    /// The configuration space is `bytes` in a device that was saved and is restored. What its driver had looked at until
    /// then is not known, so that it is taken to have seen another; nor is the generation, which a driver that has read one half
    /// before must not find again.
    pub(crate) fn restore_config(&self, bytes: Vec<u8>) {
        let generation = random();
        *lock(&self.config) = Config {
            bytes,
            generation,
            seen: Some(generation.wrapping_sub(1)),
        };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::Line;

    /// More than it takes to meet a change between the bytes and their generation, if there were such an instant.
    const CHANGES: u64 = 200_000;

    #[test]
    fn fields_that_are_read_under_one_generation_are_of_one_instant() {
        let shared = Shared::new(Arc::new(Line::default()), 0, vec![0; 16]).unwrap();
        let field = |offset| {
            let mut field = [0; 8];
            shared.read_config(offset, &mut field);
            u64::from_le_bytes(field)
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for change in 1..=CHANGES {
                    shared.set_config([change.to_le_bytes(); 2].concat());
                }
            });
            while field(0) < CHANGES {
                let before = shared.config_generation();
                let fields = (field(0), field(8));
                if shared.config_generation() == before {
                    assert_eq!(fields.0, fields.1);
                }
            }
        });
    }
}
