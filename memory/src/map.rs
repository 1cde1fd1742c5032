//! How guest memory is mapped into the process, replaced and given back: all that is asked of the kernel for it.

use std::{fs::File, io, ops::Range, ptr};

use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

use crate::{Error, HostPages, Region, abort::abort};

/// Guest memory begins at such a boundary of the host's address space, so that the kernel can back
/// and KVM can map it with huge pages.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Maps `bytes` of zeroed memory, made of `pages`, at a huge page boundary. Regions lie in it as in a memory image, so that each
/// of them begins at such a boundary too: the hole does, and memory behind it follows what is before it.
#[allow(unsafe_code)]
pub(crate) fn map_anonymous(bytes: u64, pages: HostPages) -> Result<*mut u8, Error> {
    if pages == HostPages::Reserved {
        return map_reserved(bytes);
    }
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
    ask_for_huge_pages(host, bytes);
    Ok(host)
}

/// Maps `bytes` of zeroed memory, made of huge pages that the host has reserved: so many, or it fails. The end of the last may be of
/// no use.
#[allow(unsafe_code)]
fn map_reserved(bytes: u64) -> Result<*mut u8, Error> {
    let count = bytes.div_ceil(HUGE_PAGE_BYTES as u64);
    let size = usize::try_from(count).ok();
    let size = size.and_then(|count| count.checked_mul(HUGE_PAGE_BYTES));
    let size = size.ok_or(Error::HugePages { count })?;
    // Without `MAP_NORESERVE`, so that there is a page for every touch.
    let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let host = unsafe {
        rustix::mm::mmap_anonymous(
            ptr::null_mut(),
            size,
            ProtFlags::READ | ProtFlags::WRITE,
            flags,
        )
    };
    host.map(<*mut _>::cast)
        .map_err(|_| Error::HugePages { count })
}

/// Maps `bytes` of `image` from its beginning, to be read. Privately, for Linux before 6.7 has no shared mappings of what is sealed.
#[allow(unsafe_code)]
pub(crate) fn map_to_read(image: &File, bytes: u64) -> Result<*const u8, Error> {
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let mapped = unsafe {
        rustix::mm::mmap(
            ptr::null_mut(),
            bytes as usize,
            ProtFlags::READ,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
            image,
            0,
        )
    };
    let mapped = mapped.map_err(|errno| Error::Map {
        bytes,
        source: errno.into(),
    })?;
    Ok(mapped.cast_const().cast())
}

/// Undoes what [`map_to_read`] did.
///
/// # Safety
///
/// It mapped `bytes` at `image`, and nobody reads there from now on.
#[allow(unsafe_code)]
pub(crate) unsafe fn unmap(image: *const u8, bytes: u64) {
    // SAFETY: that is the caller's promise.
    if let Err(error) = unsafe { rustix::mm::munmap(image.cast_mut().cast(), bytes as usize) } {
        tracing::debug!(%error, "an image stays mapped");
    }
}

/// Asks for transparent huge pages in `bytes` of guest memory at `host`.
#[allow(unsafe_code)]
pub(crate) fn ask_for_huge_pages(host: *mut u8, bytes: u64) {
    // A host without them refuses; the guest works, only more slowly.
    // SAFETY: guest memory is never unmapped, and the advice does not change its content.
    let _ = unsafe { rustix::mm::madvise(host.cast(), bytes as usize, Advice::LinuxHugepage) };
}

/// Asks for no transparent huge pages there.
#[allow(unsafe_code)]
pub(crate) fn ask_for_small_pages(host: *mut u8, bytes: u64) {
    // A host without huge pages refuses, and gives none.
    // SAFETY: as of `ask_for_huge_pages`.
    let _ = unsafe { rustix::mm::madvise(host.cast(), bytes as usize, Advice::LinuxNoHugepage) };
}

/// The memory at `host`.
///
/// # Safety
///
/// `map_anonymous` has mapped `bytes` there, and nobody else uses them while the slice lives.
#[allow(unsafe_code)]
pub(crate) unsafe fn fresh<'a>(host: *mut u8, bytes: u64) -> &'a mut [u8] {
    // SAFETY: mapped for reading and writing and never unmapped; the rest is the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(host, bytes as usize) }
}

/// Maps `range` of `image` over the memory at `host`.
#[allow(unsafe_code)]
pub(crate) fn map_image(host: *mut u8, image: &File, range: &Range<u64>) -> Result<(), Error> {
    let bytes = range.end - range.start;
    let at = host.wrapping_add(range.start as usize);
    // SAFETY: the range lies in the mapping of guest memory at `host`, which stays mapped throughout and which nobody has references
    // into: whoever reads or writes there does so as if another thread could write at any time.
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

/// Gives `bytes` of guest memory at `host` back to the kernel. They are zero then, unless they are mapped from a file,
/// whose content they have again.
#[allow(unsafe_code)]
pub(crate) fn forget(host: *mut u8, bytes: u64) -> io::Result<()> {
    // SAFETY: the range is guest memory, which is never unmapped and which nobody has references into: whoever
    // reads or writes there does so as if another thread could write at any time.
    unsafe { rustix::mm::madvise(host.cast(), bytes as usize, Advice::LinuxDontNeed) }?;
    Ok(())
}

/// Puts fresh memory, all zero, in the place of `bytes` of guest memory at `host`. If the kernel cannot, the process ends.
#[allow(unsafe_code)]
pub(crate) fn renew(host: *mut u8, bytes: u64) {
    // SAFETY: as of `forget`. The kernel replaces one mapping by the other in one step, so that no address is
    // without memory meanwhile. If it fails, Linux before 6.12 may have taken the old one away already; nobody sees that hole,
    // nor what could come into it, for the process does not go on.
    let renewed = unsafe {
        rustix::mm::mmap_anonymous(
            host.cast(),
            bytes as usize,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
        )
    };
    if let Err(error) = renewed {
        abort(format_args!(
            "the host cannot replace {bytes} bytes of guest memory, of which some may be gone: {error}"
        ));
    }
    ask_for_huge_pages(host, bytes);
}

/// Makes a region of vm-memory of its part of the mapping at `host`.
#[allow(unsafe_code)]
pub(crate) fn guest_region(host: *mut u8, region: &Region) -> Result<GuestRegionMmap<()>, Error> {
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
    use std::{os::unix::process::ExitStatusExt, process::Command};

    use super::*;
    use crate::PAGE_BYTES;

    #[test]
    fn a_process_that_cannot_replace_memory_ends() {
        const CHILD: &str = "FERMATA_TEST_RENEW";
        if std::env::var_os(CHILD).is_some() {
            // No address of a page's.
            renew(
                ptr::without_provenance_mut(PAGE_BYTES as usize + 1),
                PAGE_BYTES,
            );
            return;
        }
        let ended = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "map::tests::a_process_that_cannot_replace_memory_ends",
                "--nocapture",
            ])
            .env(CHILD, "1")
            .output()
            .unwrap();
        assert_eq!(ended.status.signal(), Some(libc::SIGABRT), "{ended:?}");
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(said.contains("cannot replace 4096 bytes"), "{said}");
    }
}
