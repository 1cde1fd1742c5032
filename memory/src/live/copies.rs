//! Copies of memory that are made before the cut, while the guest runs and writes to it.

use std::io;

use super::{Elsewhere, Flags, GRANULE_BYTES, GoOn, Shared, Tracker};

impl Tracker {
    /// Begins with copies: there are none.
    ///
    /// # Errors
    ///
    /// When the last cut has not ended.
    pub fn begin_copies(&self) -> io::Result<()> {
        let Shared { granules, .. } = &*self.shared;
        for granule in 0..granules.count() {
            let phase = self.shared.phase();
            self.shared.check_ready(*phase)?;
            let _turn = self.shared.block_of(granule);
            granules.set(granule, granules.flags(granule).without(Flags::COPIED));
        }
        Ok(())
    }

    /// Protects what was written to, and lists what is still to be copied: the offset of each granule, of
    /// [`AtCut::UNIT_BYTES`](super::AtCut::UNIT_BYTES), of which there is no copy or that was written to since. If `building`, what
    /// is in the base is not.
    ///
    /// # Errors
    ///
    /// As of [`Tracker::arm`].
    pub fn to_copy(&self, building: bool, go_on: GoOn<'_>) -> io::Result<Vec<u64>> {
        self.shared.arm_written(go_on)?;
        let granules = &self.shared.granules;
        let elsewhere = Elsewhere {
            base: building,
            copies: true,
        };
        let unknown = (0..granules.count()).filter(|at| !granules.flags(*at).is_known(elsewhere));
        Ok(unknown
            .map(|granule| granule as u64 * GRANULE_BYTES)
            .collect())
    }

    /// Fills `content` with the granule at `offset`, all of it; that is its copy until it is written to. Says whether it is: a
    /// granule that has been written to since [`Tracker::to_copy`] listed it is for the next time.
    ///
    /// # Errors
    ///
    /// When `content` is not of the granule's length, or the last cut has not ended.
    pub fn copy(&self, offset: u64, content: &mut [u8]) -> io::Result<bool> {
        let Shared { granules, host, .. } = &*self.shared;
        let granule = (offset / GRANULE_BYTES) as usize;
        let image = granules.image(&(granule..granule + 1));
        if image != (offset..offset + content.len() as u64) || image.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let phase = self.shared.phase();
        self.shared.check_ready(*phase)?;
        let _turn = self.shared.block_of(granule);
        let flags = granules.flags(granule);
        if !flags.has(Flags::PROTECTED) || flags.has(Flags::ABSENT) {
            return Ok(false);
        }
        host.read(offset, content)?;
        granules.set(granule, flags.with(Flags::COPIED));
        Ok(true)
    }
}
