//! A disk that grows while its guest uses it.

use std::sync::Arc;

use super::{
    SECTOR_BYTES,
    disk::{Disk, DiskError},
};

/// The size of a disk that a device has.
#[derive(Clone, Debug)]
pub struct DiskSize(Arc<Disk>);

impl DiskSize {
    pub(super) fn of(disk: Arc<Disk>) -> Self {
        Self(disk)
    }

    /// Bytes of it.
    pub fn bytes(&self) -> u64 {
        self.0.sectors() * SECTOR_BYTES
    }

    /// Has the disk have `bytes`; what is new reads as zeros. The driver does not know before
    /// [`MmioTransport::refresh_config`](crate::virtio::MmioTransport::refresh_config). A disk that branches gets another layer,
    /// which syncs files.
    ///
    /// # Errors
    ///
    /// [`DiskError`]; the disk is as it was then.
    pub fn grow(&self, bytes: u64) -> Result<(), DiskError> {
        self.0.grow(bytes)
    }

    /// Has the disk have the size that what is behind it has, which is another disk than it was. The driver is not told.
    pub fn refresh(&self) {
        self.0.refresh_size();
    }
}
