//! The vmclock page: by it a guest sees that its clocks and it itself are not what they were.
//!
//! A structure in guest memory, where ACPI says, that a guest's kernel and programs can read at any time (Linux,
//! include/uapi/linux/vmclock-abi.h and drivers/ptp/ptp_vmclock.c). It does not say what time it is, which kvmclock does. It says when
//! what a guest has measured of the relation between its TSC and the world's time is void: when guest time stood still,
//! or the machine is one that was saved. It has no state of its own: what is saved is in memory.

use memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::{boot::VMCLOCK, error::Error};

/// Bytes of the page, all of which the structure claims.
const PAGE_BYTES: u32 = 4096;
const MAGIC: u32 = u32::from_le_bytes(*b"VCLK");
const VERSION: u16 = 1;
/// The page does not relate any counter to time.
const NO_COUNTER: u8 = 0xff;
/// There is a generation in the page.
const GENERATION_PRESENT: u64 = 1 << 8;

// Offsets of the fields that are written.
const MAGIC_AT: u64 = 0;
const SIZE_AT: u64 = 4;
const VERSION_AT: u64 = 8;
const COUNTER_AT: u64 = 10;
const SEQUENCE_AT: u64 = 12;
const DISRUPTION_MARKER_AT: u64 = 16;
const FLAGS_AT: u64 = 24;
const GENERATION_AT: u64 = 104;

/// What has happened since the guest last ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disruption {
    /// Its clocks stood still while the world's went on.
    Held,
    /// It was saved, and this machine is another.
    Copied,
}

/// Makes the page of a machine that has not run.
pub(crate) fn begin(guest: &GuestMemory) -> Result<(), Error> {
    put(guest, MAGIC_AT, MAGIC.to_le_bytes())?;
    put(guest, SIZE_AT, PAGE_BYTES.to_le_bytes())?;
    put(guest, VERSION_AT, VERSION.to_le_bytes())?;
    put(guest, COUNTER_AT, [NO_COUNTER])?;
    put(guest, FLAGS_AT, GENERATION_PRESENT.to_le_bytes())?;
    tell(guest, Disruption::Copied)
}

/// Tells the guest. No vCPU may be running. A guest that was booted by a release without the page has none to be told by.
pub(crate) fn tell(guest: &GuestMemory, what: Disruption) -> Result<(), Error> {
    if get(guest, MAGIC_AT)? != MAGIC.to_le_bytes() {
        return Ok(());
    }
    // One who was reading when the machine was stopped finds another number than before, and reads again.
    let sequence = u32::from_le_bytes(get(guest, SEQUENCE_AT)?);
    let settled = (sequence | 1).wrapping_add(1);
    put(guest, DISRUPTION_MARKER_AT, random()?)?;
    if what == Disruption::Copied {
        put(guest, GENERATION_AT, random()?)?;
    }
    put(guest, SEQUENCE_AT, settled.to_le_bytes())
}

/// A number that does not come a second time.
fn random() -> Result<[u8; 8], Error> {
    let mut number = [0; 8];
    rustix::rand::getrandom(&mut number, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| Error::Host(errno.into()))?;
    Ok(number)
}

fn put<const N: usize>(guest: &GuestMemory, at: u64, bytes: [u8; N]) -> Result<(), Error> {
    let written = guest.write_slice(&bytes, GuestAddress(VMCLOCK + at));
    Ok(written.map_err(crate::boot::Error::from)?)
}

fn get<const N: usize>(guest: &GuestMemory, at: u64) -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    let read = guest.read_slice(&mut bytes, GuestAddress(VMCLOCK + at));
    read.map_err(crate::boot::Error::from)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use memory::{Layout, MIN_MEMORY_BYTES, MachineMemory};

    use super::*;

    /// Sequence, marker and generation.
    fn shown(guest: &GuestMemory) -> (u32, u64, u64) {
        let long = |at| u64::from_le_bytes(get(guest, at).unwrap());
        let sequence = u32::from_le_bytes(get(guest, SEQUENCE_AT).unwrap());
        (sequence, long(DISRUPTION_MARKER_AT), long(GENERATION_AT))
    }

    #[test]
    fn a_hold_is_a_disruption_and_a_copy_another_machine_too() {
        let memory = MachineMemory::zeroed(Layout::new(MIN_MEMORY_BYTES).unwrap()).unwrap();
        let guest = memory.guest();
        begin(guest).unwrap();
        let first = shown(guest);
        assert_eq!(first.0 % 2, 0);
        tell(guest, Disruption::Held).unwrap();
        let held = shown(guest);
        assert_eq!(held.0, first.0 + 2);
        assert_ne!(held.1, first.1);
        assert_eq!(held.2, first.2);
        tell(guest, Disruption::Copied).unwrap();
        let copied = shown(guest);
        assert_ne!((copied.1, copied.2), (held.1, held.2));
        assert_ne!(copied.2, held.2);
        // What a guest has written there itself does no harm.
        put(guest, SEQUENCE_AT, [0xff; 4]).unwrap();
        tell(guest, Disruption::Held).unwrap();
        assert_eq!(shown(guest).0, 0);
    }

    #[test]
    fn memory_without_the_page_is_left_alone() {
        let memory = MachineMemory::zeroed(Layout::new(MIN_MEMORY_BYTES).unwrap()).unwrap();
        tell(memory.guest(), Disruption::Copied).unwrap();
        assert_eq!(shown(memory.guest()), (0, 0, 0));
    }
}
