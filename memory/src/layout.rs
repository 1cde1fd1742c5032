//! Where guest memory lies in the guest-physical address space.

use std::ops::Range;

use crate::PAGE_BYTES;

/// First address of the hole below 4 GiB that is kept for devices: virtio-mmio, IOAPIC, LAPIC, and
/// the pages that KVM needs on Intel hosts.
pub const HOLE_START: u64 = 0xc000_0000;

/// First address behind the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// The least memory a machine can have: a stock kernel does not unpack itself in less.
pub const MIN_MEMORY_BYTES: u64 = 64 << 20;

/// The most memory a machine can have: 2 TiB, well inside 46 bits of physical address.
const MAX_MEMORY_BYTES: u64 = 2 << 40;

/// A contiguous piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Its size in bytes.
    pub bytes: u64,
    /// Offset of its first byte in a memory image.
    pub image_offset: u64,
}

/// The amount of memory asked for is not one that a machine can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a machine cannot have {0} bytes of memory; choose whole pages between 64 MiB and 2 TiB")]
pub struct InvalidSize(pub u64);

/// The regions of a machine's memory: one below the hole, and one behind it when there is more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    regions: Vec<Region>,
}

impl Layout {
    /// The layout of `bytes` of guest memory.
    ///
    /// # Errors
    ///
    /// [`InvalidSize`] when it is not a whole number of pages between 64 MiB and 2 TiB.
    pub fn new(bytes: u64) -> Result<Self, InvalidSize> {
        if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&bytes)
            || !bytes.is_multiple_of(PAGE_BYTES)
        {
            return Err(InvalidSize(bytes));
        }
        let low = bytes.min(HOLE_START);
        let mut regions = vec![Region {
            gpa: 0,
            bytes: low,
            image_offset: 0,
        }];
        if bytes > low {
            regions.push(Region {
                gpa: HOLE_END,
                bytes: bytes - low,
                image_offset: low,
            });
        }
        Ok(Self { regions })
    }

    /// The regions, by ascending address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Bytes of guest memory, which is also the length of a memory image.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.bytes).sum()
    }

    /// The parts of a memory image that the guest sees at the guest-physical addresses `gpas`, as far as there is memory.
    pub fn image_ranges(&self, gpas: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        self.regions.iter().filter_map(move |region| {
            let start = gpas.start.max(region.gpa);
            let end = gpas.end.min(region.gpa + region.bytes);
            let offset = |gpa| region.image_offset + (gpa - region.gpa);
            (start < end).then(|| offset(start)..offset(end))
        })
    }

    /// Guest-physical address of the byte at `image_offset`, if the image has one there.
    pub fn gpa(&self, image_offset: u64) -> Option<u64> {
        self.regions
            .iter()
            .find(|region| {
                (region.image_offset..region.image_offset + region.bytes).contains(&image_offset)
            })
            .map(|region| region.gpa + (image_offset - region.image_offset))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn memory_that_fits_below_the_hole_is_one_region() {
        for bytes in [MIN_MEMORY_BYTES, HOLE_START] {
            assert_eq!(Layout::new(bytes).unwrap().regions().len(), 1);
        }
        assert_eq!(
            Layout::new(HOLE_START + PAGE_BYTES)
                .unwrap()
                .regions()
                .len(),
            2
        );
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for bytes in [
            0,
            MIN_MEMORY_BYTES - PAGE_BYTES,
            MIN_MEMORY_BYTES + 1,
            u64::MAX,
        ] {
            assert_eq!(Layout::new(bytes), Err(InvalidSize(bytes)));
        }
    }

    #[test]
    fn addresses_without_memory_are_nowhere_in_the_image() {
        let layout = Layout::new(HOLE_START + 2 * PAGE_BYTES).unwrap();
        let ranges = |gpas| layout.image_ranges(gpas).collect::<Vec<_>>();
        let page = PAGE_BYTES;
        assert_eq!(ranges(page..3 * page), vec![page..3 * page; 1]);
        let below = HOLE_START - page..HOLE_START;
        let behind = HOLE_START..HOLE_START + page;
        assert_eq!(ranges(below.start..HOLE_END + page), [below, behind]);
        assert_eq!(ranges(HOLE_START..HOLE_END), []);
        assert_eq!(ranges(HOLE_END + 2 * page..u64::MAX), []);
        assert_eq!(ranges(page..page), []);
    }

    proptest! {
        #[test]
        fn an_image_holds_every_page_once_and_nothing_of_the_hole(pages in 16_384u64..4_000_000) {
            let layout = Layout::new(pages * PAGE_BYTES).unwrap();
            prop_assert_eq!(layout.bytes(), pages * PAGE_BYTES);
            let mut next = 0;
            for region in layout.regions() {
                prop_assert_eq!(region.image_offset, next);
                prop_assert_eq!(layout.gpa(next), Some(region.gpa));
                prop_assert!(region.gpa + region.bytes <= HOLE_START || region.gpa >= HOLE_END);
                next += region.bytes;
            }
            prop_assert_eq!(layout.gpa(next), None);
        }
    }
}
