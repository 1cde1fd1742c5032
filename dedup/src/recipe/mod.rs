//! Recipes: which chunk of an image is where.

mod block;
mod directory;

pub(crate) use block::{BLOCK_CHUNKS, BlockCoder, MAX_STORED_BYTES};
pub(crate) use directory::{Directory, chunks_of};

/// Where a chunk is: a pack, as counted in some table of packs, and a slot of it; or zeros.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(crate) struct Place(u64);

impl Place {
    /// A chunk of zeros.
    pub(crate) const ZERO: Place = Place(0);

    pub(crate) fn new(pack: u32, slot: u32, pack_slots: u32) -> Self {
        Place(1 + u64::from(pack) * u64::from(pack_slots) + u64::from(slot))
    }

    pub(crate) fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// Whether this is the slot after another place's.
    pub(crate) fn follows(self, other: Place) -> bool {
        self.0 == other.0 + 1
    }

    /// The pack; `None` for zeros.
    pub(crate) fn pack(self, pack_slots: u32) -> Option<u32> {
        self.get(pack_slots).map(|(pack, _)| pack)
    }

    /// Pack and slot; `None` for zeros.
    pub(crate) fn get(self, pack_slots: u32) -> Option<(u32, u32)> {
        let value = self.0.checked_sub(1)?;
        // A value that a parser let through has a pack below 2^32.
        Some((
            (value / u64::from(pack_slots)) as u32,
            (value % u64::from(pack_slots)) as u32,
        ))
    }
}
