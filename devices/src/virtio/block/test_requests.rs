//! What a driver asks of a disk and is answered, for tests.

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};

pub(super) const OK: u8 = VIRTIO_BLK_S_OK as u8;
pub(super) const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
pub(super) const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// The header of a request (virtio 1.3, 5.2.6).
pub(super) fn header(request: u32, sector: u64) -> Vec<u8> {
    let mut header = u64::from(request).to_le_bytes().to_vec();
    header.extend(sector.to_le_bytes());
    header
}
