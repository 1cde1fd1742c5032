//! What is behind guest memory on the host.
//!
//! The mappings are never undone: vCPUs, devices and the kernel hold addresses into them, and a
//! process has one machine, so that they end when it does. That is what makes handing out
//! [`GuestMemory`] sound.

use std::{fs::File, io, ops::Range, ptr};

use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap, MmapRegion};

use crate::{GuestMemory, Layout, Region};

/// Guest memory begins at such a boundary of the host's address space, so that the kernel can back
/// and KVM can map it with huge pages.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Why memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused to map it.
    #[error(
        "the host cannot map {bytes} bytes of guest memory: {source}; give the machine less, or the host more"
    )]
    Map {
        /// Bytes asked for.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// vm-memory refused the regions.
    #[error("the regions of guest memory are not accepted: {0}")]
    Regions(String),
}

/// A machine's memory.
#[derive(Debug)]
pub struct MachineMemory {
    layout: Layout,
    guest: GuestMemory,
    /// Ranges of the image below a private file mapping: pages there have content even if they
    /// were never touched.
    backed: Vec<Range<u64>>,
}

impl MachineMemory {
    /// Fresh memory, all zero and not yet taken from the host. Transparent huge pages are asked for:
    /// they make the guest's first touch of memory more than ten times cheaper.
    ///
    /// # Errors
    ///
    /// [`Error::Map`] when the host has no room for it.
    pub fn zeroed(layout: Layout) -> Result<Self, Error> {
        Self::map(layout, None, Vec::new())
    }

    /// The content of `image`, whose bytes from 0 on are a memory image of this layout. It is mapped
    /// privately: the guest's writes never reach the file, and machines restored from one file share
    /// what they do not write. `data` are the ranges of the image that are not all zero, ascending;
    /// only they are mapped from the file, rounded out to huge pages.
    ///
    /// The file's content must not change while the machine lives; replacing the file by renaming
    /// another over it is fine.
    ///
    /// # Errors
    ///
    /// [`Error::Map`] when the host has no room for it.
    pub fn from_image(layout: Layout, image: &File, data: &[Range<u64>]) -> Result<Self, Error> {
        let backed = round_out(data, HUGE_PAGE_BYTES as u64, layout.bytes());
        Self::map(layout, Some(image), backed)
    }

    fn map(layout: Layout, image: Option<&File>, backed: Vec<Range<u64>>) -> Result<Self, Error> {
        let mut regions = Vec::new();
        for region in layout.regions() {
            let host = map_anonymous(region).map_err(|source| Error::Map {
                bytes: region.bytes,
                source,
            })?;
            if let Some(image) = image {
                for range in &backed {
                    map_image(host, region, image, range).map_err(|source| Error::Map {
                        bytes: range.end - range.start,
                        source,
                    })?;
                }
            }
            regions.push(guest_region(host, region)?);
        }
        let guest =
            GuestMemory::from_regions(regions).map_err(|e| Error::Regions(e.to_string()))?;
        Ok(Self {
            layout,
            guest,
            backed,
        })
    }

    /// Where memory lies in the guest.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The view that devices and the loader have of it; cheap to clone.
    pub fn guest(&self) -> &GuestMemory {
        &self.guest
    }

    /// Host-virtual address of each region, in the layout's order.
    pub fn host_addresses(&self) -> impl Iterator<Item = (Region, u64)> + '_ {
        self.layout
            .regions()
            .iter()
            .copied()
            .zip(self.guest.iter().map(|region| region.as_ptr() as u64))
    }

    pub(crate) fn backed(&self) -> &[Range<u64>] {
        &self.backed
    }
}

/// Rounds `ranges` out to multiples of `unit`, not past `end`, and joins those that touch.
fn round_out(ranges: &[Range<u64>], unit: u64, end: u64) -> Vec<Range<u64>> {
    let mut rounded: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let start = range.start - range.start % unit;
        let stop = range.end.next_multiple_of(unit).min(end);
        match rounded.last_mut() {
            Some(last) if last.end >= start => last.end = last.end.max(stop),
            _ => rounded.push(start..stop),
        }
    }
    rounded
}

/// Maps zeroed memory for `region` at a huge page boundary.
#[allow(unsafe_code)]
fn map_anonymous(region: &Region) -> io::Result<*mut u8> {
    let bytes = usize::try_from(region.bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
    let reserved = bytes
        .checked_add(HUGE_PAGE_BYTES)
        .ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let start = unsafe {
        rustix::mm::mmap_anonymous(
            ptr::null_mut(),
            reserved,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )?
    };
    let head = start.align_offset(HUGE_PAGE_BYTES);
    let host = start.cast::<u8>().wrapping_add(head);
    // A host without transparent huge pages refuses; the guest works, only more slowly.
    // SAFETY: the range lies in the mapping just made, and the advice does not change its content.
    let _ = unsafe { rustix::mm::madvise(host.cast(), bytes, Advice::LinuxHugepage) };
    Ok(host)
}

/// Maps what of `range` lies in `region` from `image` over the memory at `host`.
#[allow(unsafe_code)]
fn map_image(host: *mut u8, region: &Region, image: &File, range: &Range<u64>) -> io::Result<()> {
    let start = range.start.max(region.image_offset);
    let end = range.end.min(region.image_offset + region.bytes);
    if start >= end {
        return Ok(());
    }
    let at = host.wrapping_add((start - region.image_offset) as usize);
    // SAFETY: the range lies in the anonymous mapping of `region` that `map_anonymous` has just made
    // and nobody else knows yet.
    unsafe {
        rustix::mm::mmap(
            at.cast(),
            (end - start) as usize,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
            image,
            start,
        )?;
    }
    Ok(())
}

/// Makes a region of vm-memory of the mapping at `host`.
#[allow(unsafe_code)]
fn guest_region(host: *mut u8, region: &Region) -> Result<GuestRegionMmap<()>, Error> {
    // SAFETY: `map_anonymous` has mapped `bytes` at `host` with this protection; the mapping is
    // never undone, so that it outlives every copy of the region.
    let mapping = unsafe {
        MmapRegion::build_raw(
            host,
            region.bytes as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        )
    }
    .map_err(|e| Error::Regions(e.to_string()))?;
    GuestRegionMmap::new(mapping, GuestAddress(region.gpa))
        .ok_or_else(|| Error::Regions("a region wraps around the address space".to_owned()))
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::FileExt};

    use vm_memory::Bytes;

    use super::*;
    use crate::{MIN_MEMORY_BYTES, PAGE_BYTES};

    #[test]
    fn ranges_are_rounded_out_and_joined() {
        assert_eq!(
            round_out(&[1..2, 3..4, 25..26, 95..99], 10, 97),
            [0..10, 20..30, 90..97]
        );
        assert_eq!(round_out(&[5..15, 15..26], 10, 100), vec![0..30; 1]);
    }

    #[test]
    fn an_image_is_mapped_privately_and_the_rest_is_zero() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(MIN_MEMORY_BYTES).unwrap();
        file.write_all_at(b"first", 0).unwrap();
        let last = MIN_MEMORY_BYTES - PAGE_BYTES;
        file.write_all_at(b"last", last).unwrap();
        file.flush().unwrap();
        let layout = Layout::new(MIN_MEMORY_BYTES).unwrap();
        let data = [0..PAGE_BYTES, last..MIN_MEMORY_BYTES];
        let memory = MachineMemory::from_image(layout, &file, &data).unwrap();
        let mut five = [0; 5];
        memory
            .guest()
            .read_slice(&mut five, GuestAddress(0))
            .unwrap();
        assert_eq!(&five, b"first");
        memory
            .guest()
            .read_slice(&mut five, GuestAddress(last))
            .unwrap();
        assert_eq!(&five, b"last\0");
        memory
            .guest()
            .read_slice(&mut five, GuestAddress(32 << 20))
            .unwrap();
        assert_eq!(five, [0; 5]);
        memory
            .guest()
            .write_slice(b"other", GuestAddress(0))
            .unwrap();
        file.read_exact_at(&mut five, 0).unwrap();
        assert_eq!(&five, b"first");
    }
}
