//! What there is to say of a disk.

use std::path::PathBuf;

use crate::{disk::Disk, error::Error, header::LayerId, layer::Layer, layout::SECTOR_BYTES};

/// A disk, from the top down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Size of the disk.
    pub bytes: u64,
    /// The topmost layer first.
    pub layers: Vec<LayerInfo>,
    /// What is below all layers, if anything is.
    pub base: Option<BaseInfo>,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerInfo {
    /// Its file.
    pub path: PathBuf,
    /// Its id.
    pub id: LayerId,
    /// Size of the disk as this layer has it.
    pub bytes: u64,
    /// Bytes that it owns: written or discarded while it was the topmost.
    pub owned_bytes: u64,
    /// Bytes that it takes on the host.
    pub allocated_bytes: u64,
    /// Whether it is never written to again.
    pub sealed: bool,
    /// Whether it has the map of all below it.
    pub mapped: bool,
}

/// The raw image below all layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseInfo {
    /// Its file.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
}

impl Disk {
    /// What there is to say of it. Reads every layer's bitmap.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn info(&self) -> Result<Info, Error> {
        let layers = self.layers().iter().rev();
        Ok(Info {
            bytes: self.bytes(),
            layers: layers
                .map(|layer| describe(layer))
                .collect::<Result<_, _>>()?,
            base: self.bottom().map(|base| BaseInfo {
                path: base.media.path().to_owned(),
                bytes: base.bytes,
            }),
        })
    }
}

fn describe(layer: &Layer) -> Result<LayerInfo, Error> {
    let path = layer.path().to_owned();
    let bits = layer.bits()?;
    let sealed = layer.sealed()?;
    Ok(LayerInfo {
        id: layer.header.id,
        bytes: layer.header.geometry.bytes(),
        owned_bytes: bits.count() * SECTOR_BYTES,
        allocated_bytes: layer.media.allocated_bytes()?,
        sealed,
        mapped: sealed && layer.descriptor()?.is_some(),
        path,
    })
}
