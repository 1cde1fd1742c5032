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
        let host = map_anonymous(layout.bytes())?;
        Self::at(host, layout, Vec::new())
    }

    /// Fresh memory that `fill` writes to, before anybody else knows it: all of it as one memory image, zero
    /// where it is not written to.
    ///
    /// # Errors
    ///
    /// [`Error::Map`] when the host has no room for it; what `fill` fails with.
    #[allow(unsafe_code)]
    pub fn filled<E: From<Error>>(
        layout: Layout,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let bytes = layout.bytes();
        let host = map_anonymous(bytes)?;
        // SAFETY: the memory was mapped just now, and nobody is told of it before `fill` has returned.
        fill(unsafe { fresh(host, bytes) })?;
        Ok(Self::at(host, layout, Vec::new())?)
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
        let host = map_anonymous(layout.bytes())?;
        let backed = round_out(data, HUGE_PAGE_BYTES as u64, layout.bytes());
        for range in &backed {
            map_image(host, image, range)?;
        }
        Self::at(host, layout, backed)
    }

    /// Takes the memory image at `host` for a machine's.
    fn at(host: *mut u8, layout: Layout, backed: Vec<Range<u64>>) -> Result<Self, Error> {
        let regions: Result<_, _> = layout
            .regions()
            .iter()
            .map(|region| guest_region(host, region))
            .collect();
        let guest =
            GuestMemory::from_regions(regions?).map_err(|e| Error::Regions(e.to_string()))?;
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

/// Maps `bytes` of zeroed memory at a huge page boundary. Regions lie in it as in a memory image, so that each
/// of them begins at such a boundary too: the hole does, and memory behind it follows what is before it.
#[allow(unsafe_code)]
fn map_anonymous(bytes: u64) -> Result<*mut u8, Error> {
    let refused = |source| Error::Map { bytes, source };
    let too_many = || refused(io::ErrorKind::OutOfMemory.into());
    let size = usize::try_from(bytes).map_err(|_| too_many())?;
    let reserved = size.checked_add(HUGE_PAGE_BYTES).ok_or_else(too_many)?;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let start = unsafe {
        rustix::mm::mmap_anonymous(
            ptr::null_mut(),
            reserved,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
        .map_err(|errno| refused(errno.into()))?
    };
    let head = start.align_offset(HUGE_PAGE_BYTES);
    let host = start.cast::<u8>().wrapping_add(head);
    // A host without transparent huge pages refuses; the guest works, only more slowly.
    // SAFETY: the range lies in the mapping just made, and the advice does not change its content.
    let _ = unsafe { rustix::mm::madvise(host.cast(), size, Advice::LinuxHugepage) };
    Ok(host)
}

/// The memory at `host`.
///
/// # Safety
///
/// `map_anonymous` has mapped `bytes` there, and nobody else uses them while the slice lives.
#[allow(unsafe_code)]
unsafe fn fresh<'a>(host: *mut u8, bytes: u64) -> &'a mut [u8] {
    // SAFETY: mapped for reading and writing and never unmapped; the rest is the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(host, bytes as usize) }
}

/// Maps `range` of `image` over the memory at `host`.
#[allow(unsafe_code)]
fn map_image(host: *mut u8, image: &File, range: &Range<u64>) -> Result<(), Error> {
    let bytes = range.end - range.start;
    let at = host.wrapping_add(range.start as usize);
    // SAFETY: the range lies in the anonymous mapping that `map_anonymous` has just made at `host` and nobody
    // else knows yet.
    unsafe {
        rustix::mm::mmap(
            at.cast(),
            bytes as usize,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
            image,
            range.start,
        )
    }
    .map(drop)
    .map_err(|errno| Error::Map {
        bytes,
        source: errno.into(),
    })
}

/// Makes a region of vm-memory of its part of the mapping at `host`.
#[allow(unsafe_code)]
fn guest_region(host: *mut u8, region: &Region) -> Result<GuestRegionMmap<()>, Error> {
    // SAFETY: `map_anonymous` has mapped all of the image at `host` with this protection; the mapping is never
    // undone, so that it outlives every copy of the region.
    let mapping = unsafe {
        MmapRegion::build_raw(
            host.wrapping_add(region.image_offset as usize),
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
    fn what_fills_memory_is_where_the_guest_looks_for_it() {
        // A page behind the hole; only what is touched is taken from the host.
        let layout = Layout::new(crate::HOLE_START + PAGE_BYTES).unwrap();
        let memory = MachineMemory::filled(layout, |image| {
            image[7] = 1;
            image[crate::HOLE_START as usize] = 2;
            Ok::<_, Error>(())
        })
        .unwrap();
        let byte = |gpa| memory.guest().read_obj::<u8>(GuestAddress(gpa)).unwrap();
        assert_eq!([byte(7), byte(8), byte(crate::HOLE_END)], [1, 0, 2]);
    }

    #[test]
    fn what_fails_to_fill_memory_says_why() {
        #[derive(Debug)]
        enum Failed {
            Map,
            Fill,
        }
        impl From<Error> for Failed {
            fn from(_: Error) -> Self {
                Self::Map
            }
        }
        let layout = Layout::new(MIN_MEMORY_BYTES).unwrap();
        let failed = MachineMemory::filled(layout, |_| Err(Failed::Fill));
        assert!(matches!(failed, Err(Failed::Fill)));
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
