//! Which pages of a private mapping are the process's own: those that were written to, by whoever it was.
//!
//! `PAGEMAP_SCAN` (Documentation/admin-guide/mm/pagemap.rst, from Linux 6.7 on) tells them by walking page tables, so that it takes
//! as long as there are pages mapped. Where the kernel does not have it, the page map is read, at eight bytes a page.

use std::{fs::File, io, ops::Range};

use rustix::{
    io::Errno,
    ioctl::{self, Opcode, Updater, opcode},
};

use crate::{host::Host, populated::PageMap};

const SCAN: Opcode = opcode::read_write::<ScanArgument>(b'f', 16);

// Categories of pages.
const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const IS_ZEROS: u64 = 1 << 5;

/// Ranges that are asked for at a time.
const RANGES: usize = 256;

/// The kernel's `struct page_region`, by host-virtual addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// The kernel's `struct pm_scan_arg`.
#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Who finds them.
#[derive(Debug)]
pub(crate) enum OwnPages {
    /// The kernel walks its page tables.
    Scanned {
        page_map: File,
        regions: Box<[PageRegion]>,
    },
    /// The page map is read.
    Read(PageMap),
}

impl OwnPages {
    /// By the way that the kernel has.
    pub(crate) fn new() -> io::Result<Self> {
        let mut scanned = Self::scanned()?;
        match scanned.scan(&(0..0)) {
            Ok(_) => Ok(scanned),
            // It does not know the request.
            Err(Errno::NOTTY | Errno::INVAL) => Self::read(),
            Err(errno) => Err(errno.into()),
        }
    }

    fn scanned() -> io::Result<Self> {
        Ok(Self::Scanned {
            page_map: File::open("/proc/self/pagemap")?,
            regions: vec![PageRegion::default(); RANGES].into(),
        })
    }

    pub(crate) fn read() -> io::Result<Self> {
        PageMap::open().map(Self::Read)
    }

    /// Calls `found` with each run of pages of the memory image at `host` that are the process's own, as a range of the image,
    /// ascending. One of anonymous memory that is zero because it was only read may be among them, or not.
    pub(crate) fn find(
        &mut self,
        host: &Host,
        mut found: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        if let Self::Read(page_map) = self {
            return page_map.own(host, found);
        }
        let first = host.at(0) as u64;
        let end = first + host.bytes();
        let mut at = first;
        while at < end {
            at = self.scan(&(at..end))?;
            if let Self::Scanned { regions, .. } = self {
                let filled = regions.iter().take_while(|region| region.end != 0);
                filled.for_each(|region| found(region.start - first..region.end - first));
            }
        }
        Ok(())
    }

    /// Has the kernel tell of as much of `addresses` as there is room for; returns where that ends.
    fn scan(&mut self, addresses: &Range<u64>) -> Result<u64, Errno> {
        let Self::Scanned { page_map, regions } = self else {
            return Err(Errno::INVAL);
        };
        // So that it can be seen how many were filled.
        regions.fill(PageRegion::default());
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            flags: 0,
            start: addresses.start,
            end: addresses.end,
            walk_end: 0,
            regions: regions.as_mut_ptr().expose_provenance() as u64,
            regions_len: regions.len() as u64,
            max_pages: 0,
            category_inverted: IS_FILE | IS_ZEROS,
            category_mask: IS_FILE | IS_ZEROS,
            category_anyof_mask: IS_PRESENT | IS_SWAPPED,
            return_mask: 0,
        };
        // SAFETY: the kernel reads and writes its `struct pm_scan_arg`, which the argument is in size and layout.
        #[allow(unsafe_code)]
        let request = unsafe { Updater::<SCAN, _>::new(&mut argument) };
        // SAFETY: of the process's memory the kernel writes only to the regions, of which it is told how many there are.
        #[allow(unsafe_code)]
        unsafe { ioctl::ioctl(page_map, request) }?;
        Ok(argument.walk_end)
    }
}
