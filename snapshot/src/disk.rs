//! Disks of a machine, as images of its snapshot in a store.

use std::io;

use dedup::ImageReader;

use crate::Error;

/// The name of the image of the disk with this number.
pub(crate) fn image_name(number: usize) -> String {
    format!("disk{number}")
}

/// A disk's content in a store.
pub struct StoredDisk(ImageReader);

impl StoredDisk {
    /// That of the disk with this number; `None` when the snapshot has none.
    pub(crate) fn open(
        snapshot: &dedup::SnapshotReader,
        number: usize,
    ) -> Result<Option<Self>, Error> {
        let name = image_name(number);
        if !snapshot.images().any(|image| image == name) {
            return Ok(None);
        }
        let image = snapshot.image(&name).map_err(Error::store(&name))?;
        Ok(Some(Self(image)))
    }

    /// Size of the disk.
    pub fn bytes(&self) -> u64 {
        self.0.size()
    }

    /// Fills `buffer` with what is at `offset`, verified.
    ///
    /// # Errors
    ///
    /// When it is damaged, or not there.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buffer).map_err(io::Error::other)
    }
}
