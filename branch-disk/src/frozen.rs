//! What of a disk does not change any more.

use std::{path::Path, sync::Arc, sync::atomic::AtomicU64};

use crate::{
    Disk, Error, Mode,
    bits::Bits,
    chain::{Bottom, whole_map},
    layer::Layer,
};

/// The layers of a disk that do not change any more, and what is below them. To be read while the disk is in use, without
/// a file being opened once more.
#[derive(Clone, Debug)]
pub struct Frozen {
    bottom: Option<Arc<Bottom>>,
    layers: Vec<Arc<Layer>>,
}

impl Disk {
    /// Everything below the head; of a disk that is only read all of it. After a cut that is the disk as it was then.
    pub fn frozen(&self) -> Frozen {
        let below = match self.read_only() {
            true => self.layers(),
            false => &self.layers()[..self.layers().len().saturating_sub(1)],
        };
        Frozen {
            bottom: self.bottom.clone(),
            layers: below.to_vec(),
        }
    }
}

impl Frozen {
    /// The disk that this is, to be read. Of a cut, not before that is finished.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn open(self) -> Result<Disk, Error> {
        let Self { bottom, layers } = self;
        let Some(top) = layers.last() else {
            return Err(Error::damaged(Path::new("/"), "nothing is below its head"));
        };
        let geometry = top.header.geometry;
        Ok(Disk {
            path: top.path().to_owned(),
            bottom,
            map: whole_map(&layers)?,
            bits: Bits::none(geometry),
            geometry,
            layers,
            unsynced: false,
            seals: Vec::new(),
            mode: Mode::Read,
            failed: false,
            lookups: AtomicU64::new(0),
            fleeting: false,
            touched: false,
            replaced: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::{Disk, Foundation, Mode, anything};

    fn all(disk: &Disk) -> Vec<u8> {
        let mut content = vec![0; disk.bytes() as usize];
        disk.read(0, &mut &mut content[..]).unwrap();
        content
    }

    #[test]
    fn what_was_cut_is_read_while_the_disk_is_written_to() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().join("base");
        std::fs::write(&base, [1; 1024]).unwrap();
        let path = directory.path().join("disk");
        let on = Foundation::Raw(base);
        let mut disk = Disk::create(&path, Some(2048), &on, &anything).unwrap();
        // Nothing is below it yet.
        assert!(disk.frozen().open().is_err());
        disk.write(512, &mut &[2; 512][..]).unwrap();
        let then = all(&disk);
        let cut = disk.cut(disk.prepare().unwrap()).unwrap();
        let frozen = disk.frozen();
        disk.write(0, &mut &[3; 2048][..]).unwrap();
        let layer = cut.finish().unwrap();
        let frozen = frozen.open().unwrap();
        assert_eq!(frozen.id(), Some(layer.id));
        assert!(frozen.read_only());
        assert_eq!(all(&frozen), then);

        let read = Disk::open(&layer.path, Mode::Read, &anything).unwrap();
        assert_eq!(all(&read.frozen().open().unwrap()), then);
    }
}
