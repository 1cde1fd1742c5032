//! Disks of a machine, as images of its snapshot in a store.

use std::{io, ops::Range};

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

    /// Calls `found` with each range, in bytes and ascending, that is not zeros. No content is read for that.
    ///
    /// # Errors
    ///
    /// When it cannot be told.
    pub fn each_data(&self, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
        for part in self.0.parts() {
            let runs = self.0.data_in(part).map_err(io::Error::other)?;
            runs.into_iter().for_each(&mut found);
        }
        Ok(())
    }

    /// Forgets what is open and decoded: what could not be read may be there again.
    pub fn refresh(&self) {
        self.0.refresh();
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
