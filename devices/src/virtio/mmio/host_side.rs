//! The host's side of a device: it is used while vCPUs use the transport, which therefore must not be locked for it. Who waits
//! here for a slow disk holds up no vCPU.

use std::sync::{Arc, Mutex};

use crate::{
    sync::lock,
    virtio::{Worker, shared::Shared},
};

/// Tells a device, and its driver, of what was changed from outside.
pub struct HostSide {
    pub(super) shared: Arc<Shared>,
    pub(super) worker: Arc<Mutex<Worker>>,
}

impl HostSide {
    /// Has the driver know the configuration space as the device has it now, if that is not what it knows. It waits until
    /// the device's round is over.
    pub fn refresh_config(&self) {
        let worker = lock(&self.worker);
        let config = worker.device.config();
        if self.shared.config() != config {
            self.shared.change_config(config, worker.active);
        }
    }

    /// Has the loop look at all queues, as if the driver had notified them: the device may now do what it could not before.
    pub fn look_again(&self) {
        self.shared.signal_all();
    }
}
