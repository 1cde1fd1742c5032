//! Where things are in a layer's file. All of it follows from the size of the disk.

/// The unit of reading, writing and owning, in bytes.
pub const SECTOR_BYTES: u64 = 512;
/// The largest disk, in bytes.
pub const MAX_BYTES: u64 = 8 << 40;
/// The most layers in a chain.
pub const MAX_DEPTH: usize = 1000;

pub(crate) const PAGE_BYTES: usize = 4096;
/// Sectors that a pair of bitmap pages tells of: the bits of a page's content.
pub(crate) const PAIR_SECTORS: u64 = 8 * crate::page::CONTENT_BYTES as u64;

pub(crate) const SEAL_AT: u64 = 4096;
pub(crate) const DESCRIPTOR_AT: u64 = 8192;
const BITMAP_AT: u64 = 16_384;
const DATA_ALIGNMENT: u64 = 64 << 10;

/// A disk's size, and with it the places of everything in a layer of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    sectors: u64,
}

impl Geometry {
    /// For a disk of `bytes`; `None` if there can be no such disk.
    pub(crate) fn of(bytes: u64) -> Option<Self> {
        let fits =
            bytes.is_multiple_of(SECTOR_BYTES) && (SECTOR_BYTES..=MAX_BYTES).contains(&bytes);
        fits.then_some(Self {
            sectors: bytes / SECTOR_BYTES,
        })
    }

    pub(crate) fn sectors(self) -> u64 {
        self.sectors
    }

    pub(crate) fn bytes(self) -> u64 {
        self.sectors * SECTOR_BYTES
    }

    /// Pairs of bitmap pages. Of the largest disk there are half a million.
    pub(crate) fn pairs(self) -> u32 {
        self.sectors.div_ceil(PAIR_SECTORS) as u32
    }

    pub(crate) fn pair_at(self, pair: u32) -> u64 {
        BITMAP_AT + 2 * PAGE_BYTES as u64 * u64::from(pair)
    }

    pub(crate) fn data_at(self) -> u64 {
        self.pair_at(self.pairs()).next_multiple_of(DATA_ALIGNMENT)
    }

    pub(crate) fn map_at(self) -> u64 {
        (self.data_at() + self.bytes()).next_multiple_of(PAGE_BYTES as u64)
    }
}
