//! The registers, and what reading and writing them does.

use virtio_bindings::{
    virtio_config::{
        VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    },
    virtio_mmio::*,
};
use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::GuestAddress;

use super::{EVENT_IDX, MmioTransport, state::acceptable};
use crate::{BusDevice, sync::lock, virtio::Worker};

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// The version of the register layout; 1 was the legacy interface.
const VERSION: u32 = 2;
/// "FRMT": no vendor ID was ever assigned to anybody.
const VENDOR: u32 = u32::from_le_bytes(*b"FRMT");
/// Reads of the length of a shared memory region that does not exist, as of every one here.
const NO_REGION: u32 = u32::MAX;

/// The registers that are neither shared with the worker nor constant.
#[derive(Clone, Debug, Default)]
pub(super) struct Registers {
    /// Without `DEVICE_NEEDS_RESET`, which the worker sets.
    pub(super) status: u32,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let register = offset as u32;
        if register >= VIRTIO_MMIO_CONFIG {
            self.shared
                .read_config((register - VIRTIO_MMIO_CONFIG) as usize, data);
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            // A control register is 32 bits wide and accessed in one; other reads find zero.
            *word = self.read_register(register).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let register = offset as u32;
        if let Some(offset) = register.checked_sub(VIRTIO_MMIO_CONFIG) {
            let mut worker = lock(&self.worker);
            worker.device.write_config(offset as usize, data);
            self.shared.set_config(worker.device.config());
        } else if let Ok(word) = data.try_into() {
            self.write_register(register, u32::from_le_bytes(word));
        }
    }
}

impl MmioTransport {
    fn read_register(&self, register: u32) -> u32 {
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_type,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.registers.device_features_sel {
                0 => self.features as u32,
                1 => (self.features >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => self
                .queue_sizes
                .get(self.registers.queue_sel as usize)
                .map_or(0, |&size| size.into()),
            VIRTIO_MMIO_QUEUE_READY => self.with_queue(|queue| queue.ready().into()).unwrap_or(0),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.shared.interrupt_status(),
            VIRTIO_MMIO_STATUS if self.shared.needs_reset() => {
                self.registers.status | VIRTIO_CONFIG_S_NEEDS_RESET
            }
            VIRTIO_MMIO_STATUS => self.registers.status,
            VIRTIO_MMIO_SHM_LEN_LOW | VIRTIO_MMIO_SHM_LEN_HIGH => NO_REGION,
            VIRTIO_MMIO_SHM_BASE_LOW | VIRTIO_MMIO_SHM_BASE_HIGH => NO_REGION,
            VIRTIO_MMIO_CONFIG_GENERATION => self.shared.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NUM => {
                self.set_up_queue(|queue| {
                    let size = u16::try_from(value).map_err(|_| QueueError::InvalidSize)?;
                    queue.try_set_size(size)
                });
            }
            VIRTIO_MMIO_QUEUE_READY => self.set_queue_ready(value == 1),
            VIRTIO_MMIO_QUEUE_NOTIFY => self.shared.signal(value as usize),
            VIRTIO_MMIO_INTERRUPT_ACK => self.shared.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.set_status(value),
            VIRTIO_MMIO_QUEUE_DESC_LOW | VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                let high = register == VIRTIO_MMIO_QUEUE_DESC_HIGH;
                self.set_up_queue(|queue| {
                    queue.try_set_desc_table_address(half(queue.desc_table(), high, value))
                });
            }
            VIRTIO_MMIO_QUEUE_AVAIL_LOW | VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                let high = register == VIRTIO_MMIO_QUEUE_AVAIL_HIGH;
                self.set_up_queue(|queue| {
                    queue.try_set_avail_ring_address(half(queue.avail_ring(), high, value))
                });
            }
            VIRTIO_MMIO_QUEUE_USED_LOW | VIRTIO_MMIO_QUEUE_USED_HIGH => {
                let high = register == VIRTIO_MMIO_QUEUE_USED_HIGH;
                self.set_up_queue(|queue| {
                    queue.try_set_used_ring_address(half(queue.used_ring(), high, value))
                });
            }
            _ => {}
        }
    }

    fn has(&self, status: u32) -> bool {
        self.registers.status & status != 0
    }

    /// The driver accepts features, 32 at a time; once it has said that it is done, no more.
    fn accept_features(&mut self, value: u32) {
        if self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        let features = &mut self.registers.driver_features;
        match self.registers.driver_features_sel {
            0 => *features = *features & !u64::from(u32::MAX) | u64::from(value),
            1 => *features = *features & u64::from(u32::MAX) | u64::from(value) << 32,
            _ => {}
        }
    }

    /// The status is set bit by bit and cleared only as a whole (virtio 1.3, 2.1.1).
    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let old = self.registers.status;
        let mut new = value & !VIRTIO_CONFIG_S_NEEDS_RESET;
        if old & !new != 0 {
            return self.rule_broken("it clears bits of the device status");
        }
        let added = new & !old;
        let accepted = self.registers.driver_features;
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0
            && !(acceptable(accepted, self.features)
                && lock(&self.worker).device.makes_sense(accepted))
        {
            // The driver reads the bit back to learn that this is not a set of features to run with.
            new &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 && new & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            return self.rule_broken("it starts without having negotiated features");
        }
        self.registers.status = new & super::state::KNOWN_STATUS;
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.start();
        }
    }

    /// The driver has begun. Nobody has served what it had notified before, which real drivers do although they must not, nor what
    /// has come from outside, of which nobody hears twice: all queues are looked at now.
    fn start(&self) {
        let mut worker = lock(&self.worker);
        worker.device.activate(self.registers.driver_features);
        worker.active = true;
        self.shared.driver_starts();
        self.shared.signal_all();
    }

    /// Waits until the worker has finished its round, then forgets everything.
    fn reset(&mut self) {
        let mut worker = lock(&self.worker);
        worker.active = false;
        worker.device.reset();
        self.shared.reset_config(worker.device.config());
        worker.queues.iter_mut().for_each(Queue::reset);
        self.registers = Registers::default();
        self.shared.set_needs_reset(false);
        self.shared.set_interrupt_status(0);
    }

    fn with_queue<T>(&self, then: impl FnOnce(&mut Queue) -> T) -> Option<T> {
        let index = self.registers.queue_sel as usize;
        lock(&self.worker).queues.get_mut(index).map(then)
    }

    /// Changes the selected queue, which must exist and not be ready yet.
    fn set_up_queue(&self, change: impl FnOnce(&mut Queue) -> Result<(), QueueError>) {
        let result = self.with_queue(|queue| {
            if queue.ready() {
                return Err("it changes a virtqueue that is ready");
            }
            change(queue).map_err(|_| "it gives a virtqueue a wrong size or alignment")
        });
        if let Some(Err(rule)) = result {
            self.rule_broken(rule);
        }
    }

    fn set_queue_ready(&self, ready: bool) {
        let negotiated = self.has(VIRTIO_CONFIG_S_FEATURES_OK);
        let event_idx = self.registers.driver_features & EVENT_IDX != 0;
        let index = self.registers.queue_sel as usize;
        let valid = {
            let mut worker = lock(&self.worker);
            let Worker {
                device,
                queues,
                memory,
                ..
            } = &mut *worker;
            let Some(queue) = queues.get_mut(index) else {
                return;
            };
            if !ready {
                queue.set_ready(false);
                device.forget_queue(index);
                return;
            }
            if !queue.ready() {
                device.forget_queue(index);
                // A queue begins at the start of its rings. Where it was before, with a size that the driver may have
                // changed since, is a state that could not be restored.
                queue.set_next_avail(0);
                queue.set_next_used(0);
            }
            queue.set_event_idx(event_idx);
            queue.set_ready(true);
            let valid = negotiated && queue.is_valid(memory);
            queue.set_ready(valid);
            valid
        };
        if !valid {
            self.rule_broken("a virtqueue is not in guest memory or is ready too early");
        }
    }

    fn rule_broken(&self, rule: &str) {
        tracing::debug!(device = %self.kind, rule, "driver broke a rule");
        self.shared.rule_broken(self.has(VIRTIO_CONFIG_S_DRIVER_OK));
    }
}

/// `address` with one of its halves replaced.
fn half(address: u64, high: bool, value: u32) -> GuestAddress {
    GuestAddress(if high {
        address & u64::from(u32::MAX) | u64::from(value) << 32
    } else {
        address & !u64::from(u32::MAX) | u64::from(value)
    })
}
