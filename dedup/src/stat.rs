//! What is in a store, in numbers.

use crate::backend::Area;
use crate::error::{Error, Result};
use crate::store::Store;

/// Numbers about a store.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Stat {
    /// Bytes in a chunk.
    pub chunk_size: u64,
    /// zstd's level for new chunks; 0 where they are not compressed.
    pub level: i32,
    /// Snapshots that can be read; the other numbers about snapshots are of these.
    pub snapshots: u64,
    /// Snapshots that cannot.
    pub unreadable: u64,
    /// Images in all snapshots.
    pub images: u64,
    /// Bytes of all images.
    pub image_bytes: u64,
    /// Bytes of their chunks that are zeros.
    pub zero_bytes: u64,
    /// Packs.
    pub packs: u64,
    /// Bytes of the packs' files.
    pub pack_bytes: u64,
    /// Bytes of the snapshots' files.
    pub snapshot_bytes: u64,
    /// Annotations of snapshots.
    pub annotations: u64,
    /// Bytes of the annotations' files.
    pub annotation_bytes: u64,
    /// Segments of the index.
    pub index_segments: u64,
    /// Bytes of the index.
    pub index_bytes: u64,
}

impl Stat {
    /// Bytes of everything that is stored.
    pub fn stored_bytes(&self) -> u64 {
        self.pack_bytes + self.snapshot_bytes + self.annotation_bytes + self.index_bytes
    }
}

impl Store {
    /// Counts what is there, but for snapshots that cannot be read.
    ///
    /// # Errors
    ///
    /// A list cannot be made.
    pub fn stat(&self) -> Result<Stat> {
        let mut stat = Stat {
            chunk_size: u64::from(self.shared.config.chunk_size),
            level: self.shared.config.level,
            ..Stat::default()
        };
        let listing = self.list()?;
        stat.unreadable = listing.unreadable.len() as u64;
        for entry in listing.snapshots {
            stat.snapshots += 1;
            stat.snapshot_bytes += entry.file_bytes;
            stat.images += entry.facts.images.len() as u64;
            stat.image_bytes += entry
                .facts
                .images
                .iter()
                .map(|image| image.size)
                .sum::<u64>();
            let zero_chunks: u64 = entry
                .facts
                .images
                .iter()
                .map(|image| image.zero_chunks)
                .sum();
            stat.zero_bytes += zero_chunks * stat.chunk_size;
        }
        (stat.packs, stat.pack_bytes) = self.count(Area::Packs)?;
        (stat.annotations, stat.annotation_bytes) = self.count(Area::Annotations)?;
        (stat.index_segments, stat.index_bytes) = self.count(Area::Index)?;
        Ok(stat)
    }

    /// Number and bytes of the files of an area.
    fn count(&self, area: Area) -> Result<(u64, u64)> {
        let files = self
            .shared
            .backend
            .list(area)
            .map_err(Error::file(format!("list {}", area.dir())))?;
        Ok((files.len() as u64, files.iter().map(|file| file.size).sum()))
    }
}
