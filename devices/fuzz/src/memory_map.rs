//! Guest memory between pages that nobody may touch.
//!
//! It is in pieces, of which two are neighbours for the guest and not on the host: who goes past the end of one does not come
//! to another by luck.

use memory::GuestMemory;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MmapRegion};

const GUARD_BYTES: usize = 4096;

/// Guest-physical address and bytes of each piece.
pub(crate) const PIECES: [(u64, usize); 3] =
    [(0, 0x2_0000), (0x2_0000, 0x2_0000), (1 << 32, 0x4000)];

/// Guest memory, full of zeros. It is the process's only one.
pub(crate) fn memory() -> GuestMemory {
    static ZEROS: [u8; 0x2_0000] = [0; 0x2_0000];
    thread_local! {
        static MEMORY: GuestMemory = map();
    }
    let memory = MEMORY.with(GuestMemory::clone);
    for (address, bytes) in PIECES {
        memory
            .write_slice(&ZEROS[..bytes], GuestAddress(address))
            .expect("it is in memory");
    }
    memory
}

fn map() -> GuestMemory {
    let regions = PIECES.map(|(address, bytes)| {
        let region = guarded(bytes);
        GuestRegionMmap::new(region, GuestAddress(address)).expect("addresses do not overflow")
    });
    GuestMemory::from_regions(regions.into()).expect("pieces do not overlap")
}

/// So many bytes, with pages before and after them that cannot be accessed. They stay as long as the process.
fn guarded(bytes: usize) -> MmapRegion {
    let whole = bytes + 2 * GUARD_BYTES;
    // SAFETY: a new mapping at an address of the kernel's choice takes nobody's.
    let start = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            whole,
            ProtFlags::empty(),
            MapFlags::PRIVATE,
        )
    };
    let inside = start
        .expect("there is room")
        .cast::<u8>()
        .wrapping_add(GUARD_BYTES);
    // SAFETY: these are pages of the mapping that was just made, of which nobody knows.
    unsafe {
        mprotect(
            inside.cast(),
            bytes,
            MprotectFlags::READ | MprotectFlags::WRITE,
        )
    }
    .expect("the pages are mapped");
    let protection = (ProtFlags::READ | ProtFlags::WRITE).bits() as i32;
    let flags = MapFlags::PRIVATE.bits() as i32;
    // SAFETY: the pages are mapped so, belong to nobody else, and are never unmapped.
    unsafe { MmapRegion::build_raw(inside, bytes, protection, flags) }.expect("pages are aligned")
}
