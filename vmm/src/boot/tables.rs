//! The descriptor table and the page tables that a 64-bit kernel is entered with.

use memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;

/// Nothing, nothing, flat 64-bit code, flat data: the boot protocol wants code at 0x10 and data at 0x18.
pub(crate) const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const PAGE_BYTES: u64 = 4096;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const ENTRIES: u64 = 512;
/// The first 4 GiB are mapped one to one: kernel, parameters, command line and initial RAM disk.
const DIRECTORIES: u64 = 4;

pub(crate) fn write(guest: &GuestMemory) -> Result<(), GuestMemoryError> {
    for (entry, at) in GDT_ENTRIES.iter().zip((layout::GDT..).step_by(8)) {
        guest.write_obj(*entry, GuestAddress(at))?;
    }
    let pointers = layout::PAGE_TABLES + PAGE_BYTES;
    let directories = pointers + PAGE_BYTES;
    guest.write_obj(
        pointers | PRESENT_WRITABLE,
        GuestAddress(layout::PAGE_TABLES),
    )?;
    for i in 0..DIRECTORIES {
        let directory = directories + i * PAGE_BYTES;
        guest.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pointers + i * 8))?;
    }
    for i in 0..DIRECTORIES * ENTRIES {
        let page = (i * LARGE_PAGE_BYTES) | PRESENT_WRITABLE | LARGE;
        guest.write_obj(page, GuestAddress(directories + i * 8))?;
    }
    Ok(())
}
