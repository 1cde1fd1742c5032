//! The host's side of a disk: what is changed of it while its guest uses it.

use std::sync::{Arc, Mutex};

use super::{
    SECTOR_BYTES,
    disk::{Disk, DiskError},
    throttle::DiskLimits,
};
use crate::sync::lock;

/// What can be changed of a disk that a device has.
#[derive(Clone, Debug)]
pub struct DiskControl {
    disk: Arc<Disk>,
    limits: Arc<Mutex<DiskLimits>>,
}

impl DiskControl {
    pub(super) fn new(disk: Arc<Disk>, limits: Arc<Mutex<DiskLimits>>) -> Self {
        Self { disk, limits }
    }

    /// Bytes of the disk.
    pub fn bytes(&self) -> u64 {
        self.disk.sectors() * SECTOR_BYTES
    }

    /// Has the disk have `bytes`; what is new reads as zeros. The driver does not know before
    /// [`HostSide::refresh_config`](crate::virtio::HostSide::refresh_config). A disk that branches gets another layer,
    /// which syncs files.
    ///
    /// # Errors
    ///
    /// [`DiskError`]; the disk is as it was then.
    pub fn grow(&self, bytes: u64) -> Result<(), DiskError> {
        self.disk.grow(bytes)
    }

    /// Has the disk have the size that what is behind it has, which is another disk than it was. The driver is not told.
    pub fn refresh_size(&self) {
        self.disk.refresh_size();
    }

    /// The most that the disk may do in a second.
    pub fn limits(&self) -> DiskLimits {
        *lock(&self.limits)
    }

    /// Has the disk have other limits. Of a rate that is another than it was, nothing is used up. Requests that wait are looked at
    /// again with the next round over the queue, for which who does not wait uses
    /// [`HostSide::look_again`](crate::virtio::HostSide::look_again).
    pub fn set_limits(&self, limits: DiskLimits) {
        *lock(&self.limits) = limits;
    }
}
