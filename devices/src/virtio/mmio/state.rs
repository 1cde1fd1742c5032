//! What a transport saves, and what it believes of what it finds.

use memory::GuestMemory;
use saved_state::Kind;
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;
use virtio_bindings::{
    virtio_config::{
        VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
        VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
    },
    virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING},
};
use virtio_queue::{Queue, QueueState, QueueT};

use super::{EVENT_IDX, Registers, VERSION_1};
use crate::Error;

pub(super) const KNOWN_STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED;

/// The state of a virtio-mmio transport and of its queues. It is saved within its device's section.
#[derive(Clone, Debug, PartialEq, Versionize)]
pub struct SavedTransport {
    pub(super) status: u32,
    pub(super) needs_reset: bool,
    pub(super) interrupt_status: u32,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
    pub(super) queues: Vec<SavedQueue>,
}

/// The state of one virtqueue.
#[derive(Clone, Debug, PartialEq, Versionize)]
pub(super) struct SavedQueue {
    pub(super) max_size: u16,
    pub(super) next_avail: u16,
    pub(super) next_used: u16,
    pub(super) event_idx_enabled: bool,
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) desc_table: u64,
    pub(super) avail_ring: u64,
    pub(super) used_ring: u64,
}

impl From<QueueState> for SavedQueue {
    fn from(state: QueueState) -> Self {
        let QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        } = state;
        Self {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        }
    }
}

impl From<SavedQueue> for QueueState {
    fn from(saved: SavedQueue) -> Self {
        let SavedQueue {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        } = saved;
        Self {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        }
    }
}

/// A saved transport that could have been this one.
pub(super) struct Checked {
    pub(super) registers: Registers,
    pub(super) needs_reset: bool,
    pub(super) interrupt_status: u32,
    pub(super) queues: Vec<Queue>,
}

impl SavedTransport {
    /// The features that the driver uses; none before it has agreed on them.
    pub(crate) fn accepted_features(&self) -> u64 {
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            self.driver_features
        } else {
            0
        }
    }

    /// Whether the driver uses queue `index`.
    pub(crate) fn is_ready(&self, index: usize) -> bool {
        self.queues.get(index).is_some_and(|queue| queue.ready)
    }

    /// How many buffers of queue `index` the device has taken and not given back.
    pub(crate) fn in_use(&self, index: usize) -> u16 {
        let queue = self.queues.get(index).filter(|queue| queue.ready);
        queue.map_or(0, |queue| queue.next_avail.wrapping_sub(queue.next_used))
    }

    /// The same with a configuration change that a driver at work is told of when the state is restored.
    pub(crate) fn with_config_change(mut self) -> Self {
        if self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.interrupt_status |= VIRTIO_MMIO_INT_CONFIG;
        }
        self
    }

    /// Checks the state against the device of kind `kind` that offers `features` and queues of at
    /// most `queue_sizes` entries, in `memory`.
    pub(super) fn check(
        self,
        kind: Kind,
        features: u64,
        queue_sizes: &[u16],
        memory: &GuestMemory,
    ) -> Result<Checked, Error> {
        let impossible = |reason: String| Error::Impossible { kind, reason };
        let Self {
            status,
            needs_reset,
            interrupt_status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            queues,
        } = self;
        if status & !KNOWN_STATUS != 0 {
            return Err(impossible(format!("device status {status:#x}")));
        }
        if interrupt_status & !(VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG) != 0 {
            return Err(impossible(format!(
                "interrupt status {interrupt_status:#x}"
            )));
        }
        let negotiated = status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        if negotiated && !acceptable(driver_features, features) {
            return Err(impossible(format!(
                "the guest uses features {driver_features:#x}, the device offers {features:#x}"
            )));
        }
        if status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && !negotiated {
            return Err(impossible("it runs without negotiated features".to_owned()));
        }
        if queues.len() != queue_sizes.len() {
            let (saved, has) = (queues.len(), queue_sizes.len());
            return Err(impossible(format!("{saved} queues, the device has {has}")));
        }
        let event_idx = driver_features & EVENT_IDX != 0;
        let queues = queues
            .into_iter()
            .zip(queue_sizes)
            .enumerate()
            .map(|(index, (queue, &max_size))| {
                check_queue(queue.into(), max_size, negotiated, event_idx, memory)
                    .map_err(|reason| impossible(format!("queue {index}: {reason}")))
            })
            .collect::<Result<_, _>>()?;
        Ok(Checked {
            registers: Registers {
                status,
                device_features_sel,
                driver_features_sel,
                driver_features,
                queue_sel,
            },
            needs_reset,
            interrupt_status,
            queues,
        })
    }
}

/// Whether a driver may accept `accepted` of `offered`: nothing else, and not the legacy interface.
pub(super) fn acceptable(accepted: u64, offered: u64) -> bool {
    accepted & !offered == 0 && accepted & VERSION_1 != 0
}

fn check_queue(
    state: QueueState,
    max_size: u16,
    negotiated: bool,
    event_idx: bool,
    memory: &GuestMemory,
) -> Result<Queue, String> {
    if state.max_size != max_size {
        return Err(format!(
            "up to {} entries, the device has up to {max_size}",
            state.max_size
        ));
    }
    let queue = Queue::try_from(state).map_err(|e| e.to_string())?;
    if !queue.ready() {
        return Ok(queue);
    }
    if !negotiated || queue.event_idx_enabled() != event_idx {
        return Err("it is not set up as negotiated".to_owned());
    }
    if !queue.is_valid(memory) {
        return Err("it is not in guest memory".to_owned());
    }
    if queue.next_avail().wrapping_sub(queue.next_used()) > queue.size() {
        return Err("more buffers are in use than it has entries".to_owned());
    }
    Ok(queue)
}

#[cfg(test)]
impl SavedTransport {
    /// That of a driver at work with so many queues, in which no two numbers are alike.
    pub(crate) fn example(queues: u16) -> Self {
        let queue = |index: u16| {
            let page = u64::from(index) << 12;
            SavedQueue {
                max_size: 256,
                next_avail: 300 + index,
                next_used: 298 + index,
                event_idx_enabled: true,
                size: 128,
                ready: index != 1,
                desc_table: 0x10_0000 + page,
                avail_ring: 0x20_0000 + page,
                used_ring: 0x1_0000_0000 + page,
            }
        };
        Self {
            status: 0x0f,
            needs_reset: true,
            interrupt_status: 0x03,
            device_features_sel: 1,
            driver_features_sel: 2,
            driver_features: 0x1_3000_0000,
            queue_sel: 4,
            queues: (0..queues).map(queue).collect(),
        }
    }
}
