//! Pages that a guest gives back.
//!
//! What is discarded takes no memory of the host's any more, and nothing in the next snapshot: it reads as zero, from the
//! page map as from the guest. With memory of the machine's own, forgetting its content does that. Where memory is
//! mapped from an image, a page whose content is forgotten has the image's again, which is the guest's of long ago; there,
//! fresh memory takes the place of the mapping, as long as the process can have mappings for it; and where the
//! content is still to come, it is no longer wanted. Huge pages that the host has
//! reserved stay the machine's: they would not be sure to be had again. What is discarded there is made zero, and so is what
//! would take too many mappings.

use std::{io, ops::Range};

use vm_memory::{Bytes, GuestAddress};

use crate::{
    GuestMemory, HostPages, Layout, PAGE_BYTES,
    host::Host,
    map::{forget, renew},
};

/// Takes pages of a machine's memory that its guest has no use for.
#[derive(Clone, Debug)]
pub struct Discarder {
    layout: Layout,
    guest: GuestMemory,
    host: Host,
}

impl Discarder {
    pub(crate) fn new(layout: Layout, guest: GuestMemory, host: Host) -> Self {
        Self {
            layout,
            guest,
            host,
        }
    }

    /// Number of pages of guest memory.
    pub fn pages(&self) -> u64 {
        self.layout.bytes() / PAGE_BYTES
    }

    /// Discards the whole pages at the guest-physical addresses `gpas`, as far as there is memory; returns the bytes that the host
    /// has again, which are none of reserved huge pages and of those pages for which the process would need too many mappings.
    ///
    /// All of them are zero then. What a cut ([`AtCut`](crate::AtCut)) still has to have read is set aside; who reads memory without one
    /// must not be at it.
    ///
    /// # Errors
    ///
    /// When the host refuses; pages keep their content then, or do not.
    pub fn discard(&self, gpas: Range<u64>) -> io::Result<u64> {
        let start = gpas.start.checked_next_multiple_of(PAGE_BYTES);
        let Some(start) = start else { return Ok(0) };
        let end = gpas.end - gpas.end % PAGE_BYTES;
        let mut bytes = 0;
        for range in self.layout.image_ranges(start..end) {
            match self.host.pages() {
                HostPages::Any => bytes += self.discard_image(&range)?,
                HostPages::Reserved => self.zero(&range)?,
            }
        }
        Ok(bytes)
    }

    fn discard_image(&self, range: &Range<u64>) -> io::Result<u64> {
        match self.host.settled() {
            Some(settled) => settled
                .give_back(range, || self.forget(range))
                .map(|()| range.end - range.start),
            None => self.discard_backed(range),
        }
    }

    fn discard_backed(&self, range: &Range<u64>) -> io::Result<u64> {
        let bytes = |range: &Range<u64>| range.end - range.start;
        let mut kept = 0;
        let mut backed = self.host.backed();
        let mut at = range.start;
        for part in backed.within(range) {
            self.forget(&(at..part.start))?;
            let fresh = || renew(self.host.at(part.start), bytes(&part));
            if !backed.take_out(&part, fresh) {
                // What was written is forgotten, and the image's content must not come back.
                self.forget(&part)?;
                self.zero(&part)?;
                kept += bytes(&part);
            }
            at = part.end;
        }
        self.forget(&(at..range.end))?;
        Ok(bytes(range) - kept)
    }

    fn zero(&self, range: &Range<u64>) -> io::Result<()> {
        const ZEROS: [u8; PAGE_BYTES as usize] = [0; PAGE_BYTES as usize];
        for offset in range.clone().step_by(PAGE_BYTES as usize) {
            let gpa = self.layout.gpa(offset).ok_or(io::ErrorKind::InvalidInput)?;
            let gpa = GuestAddress(gpa);
            let mut page = ZEROS;
            self.guest
                .read_slice(&mut page, gpa)
                .map_err(io::Error::other)?;
            // A page of an image's that is zero need not become one of the machine's own.
            if page != ZEROS {
                self.guest
                    .write_slice(&ZEROS, gpa)
                    .map_err(io::Error::other)?;
            }
        }
        Ok(())
    }

    fn forget(&self, range: &Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let forget =
            |range: &Range<u64>| forget(self.host.at(range.start), range.end - range.start);
        let tracker = self.host.tracker();
        match tracker.upgrade() {
            Some(tracker) => tracker.give_back(range, forget),
            None => forget(range),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::FileExt};

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::{HOLE_END, HOLE_START, MIN_MEMORY_BYTES, MachineMemory};

    const HUGE: u64 = 2 << 20;
    const PAGE: u64 = PAGE_BYTES;

    fn byte(memory: &MachineMemory, gpa: u64) -> u8 {
        memory.guest().read_obj(GuestAddress(gpa)).unwrap()
    }

    fn write(memory: &MachineMemory, gpa: u64) {
        memory.guest().write_obj(7u8, GuestAddress(gpa)).unwrap();
    }

    fn is_populated(memory: &MachineMemory, offset: u64) -> bool {
        let ranges = memory.populated().unwrap();
        ranges.iter().any(|range| range.contains(&offset))
    }

    /// An image whose first pages are full of ones.
    fn image(bytes: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MIN_MEMORY_BYTES).unwrap();
        file.write_all_at(&vec![1; bytes as usize], 0).unwrap();
        file
    }

    #[test]
    fn fresh_memory_that_is_discarded_is_zero_and_not_there() {
        let memory = MachineMemory::zeroed(Layout::new(MIN_MEMORY_BYTES).unwrap()).unwrap();
        for gpa in [0, HUGE, HUGE + PAGE, 2 * HUGE] {
            write(&memory, gpa);
        }
        let discarder = memory.discarder();
        assert_eq!(discarder.discard(HUGE..2 * HUGE).unwrap(), HUGE);
        for (gpa, there) in [
            (0, true),
            (HUGE, false),
            (HUGE + PAGE, false),
            (2 * HUGE, true),
        ] {
            assert_eq!(is_populated(&memory, gpa), there, "{gpa:x}");
        }
        assert_eq!([0, HUGE, 2 * HUGE].map(|gpa| byte(&memory, gpa)), [7, 0, 7]);
        write(&memory, HUGE);
        assert_eq!(byte(&memory, HUGE), 7);
    }

    #[test]
    fn what_is_mapped_from_an_image_does_not_come_back() {
        let file = image(2 * HUGE);
        let layout = Layout::new(MIN_MEMORY_BYTES).unwrap();
        let memory = MachineMemory::from_image(layout, &file, &vec![0..2 * HUGE; 1]).unwrap();
        write(&memory, PAGE);
        let discarder = memory.discarder();
        // One that was written to, two that were not, and one that reaches into memory of its own.
        discarder.discard(PAGE..2 * PAGE).unwrap();
        discarder.discard(5 * PAGE..7 * PAGE).unwrap();
        discarder.discard(2 * HUGE - PAGE..2 * HUGE + PAGE).unwrap();
        let gone = [PAGE, 5 * PAGE, 6 * PAGE, 2 * HUGE - PAGE];
        for gpa in gone {
            assert!(!is_populated(&memory, gpa), "{gpa:x}");
        }
        for gpa in gone {
            assert_eq!(byte(&memory, gpa), 0, "{gpa:x}");
        }
        for gpa in [0, 2 * PAGE, 4 * PAGE, 7 * PAGE, 2 * HUGE - 2 * PAGE] {
            assert!(is_populated(&memory, gpa), "{gpa:x}");
            assert_eq!(byte(&memory, gpa), 1, "{gpa:x}");
        }
        let mut unchanged = [0];
        file.read_exact_at(&mut unchanged, PAGE).unwrap();
        assert_eq!(unchanged, [1]);
    }

    #[test]
    fn huge_pages_are_the_machines_or_refused_and_what_is_discarded_is_zero() {
        let layout = Layout::new(MIN_MEMORY_BYTES + PAGE).unwrap();
        // As many as there are: whether a host has any is its operator's choice.
        let memory = match MachineMemory::zeroed_of(HostPages::Reserved, layout.clone()) {
            Ok(memory) => memory,
            Err(error) => {
                let said = error.to_string();
                assert!(said.contains("no 33 free huge pages"), "{said}");
                assert!(said.contains("vm.nr_hugepages=33"), "{said}");
                return;
            }
        };
        assert_eq!(memory.populated().unwrap(), []);
        write(&memory, HUGE);
        write(&memory, HUGE + PAGE);
        write(&memory, MIN_MEMORY_BYTES + 7);
        for (gpa, there) in [
            (0, false),
            (HUGE, true),
            (2 * HUGE, false),
            (MIN_MEMORY_BYTES, true),
        ] {
            assert_eq!(is_populated(&memory, gpa), there, "{gpa:x}");
        }
        memory.discarder().discard(HUGE..HUGE + PAGE).unwrap();
        assert_eq!([0, PAGE].map(|at| byte(&memory, HUGE + at)), [0, 7]);
        let filled = MachineMemory::filled(layout, HostPages::Reserved, |image| {
            image[3] = 3;
            Ok::<_, crate::Error>(())
        });
        // There may be enough for one and not for two.
        if let Ok(filled) = filled {
            assert_eq!(byte(&filled, 3), 3);
        }
    }

    #[test]
    fn only_whole_pages_of_memory_are_discarded() {
        let layout = Layout::new(HOLE_START + PAGE).unwrap();
        let memory = MachineMemory::zeroed(layout).unwrap();
        write(&memory, 2 * PAGE - 1);
        write(&memory, HOLE_END);
        let discarder = memory.discarder();
        assert_eq!(discarder.discard(PAGE..2 * PAGE - 1).unwrap(), 0);
        assert_eq!(discarder.discard(PAGE + 1..2 * PAGE).unwrap(), 0);
        assert_eq!(byte(&memory, 2 * PAGE - 1), 7);
        assert_eq!(discarder.discard(HOLE_START..HOLE_END).unwrap(), 0);
        assert_eq!(byte(&memory, HOLE_END), 7);
        assert_eq!(
            discarder.discard(HOLE_START - PAGE..u64::MAX).unwrap(),
            2 * PAGE
        );
        assert_eq!(byte(&memory, HOLE_END), 0);
        assert_eq!(discarder.discard(u64::MAX - 1..u64::MAX).unwrap(), 0);
    }

    /// Mappings that the process has.
    fn mappings() -> usize {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().count()
    }

    #[test]
    fn so_many_holes_that_the_host_would_have_no_mapping_left_do_not_fail_and_are_zero() {
        const BYTES: u64 = 320 << 20;
        const CHUNK: u64 = 512 * PAGE;
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES).unwrap();
        for at in (0..BYTES).step_by(PAGE as usize) {
            // All others are zero: those need no page of the machine's own.
            if at % CHUNK < 8 * PAGE {
                file.write_all_at(&[1], at).unwrap();
            }
        }
        let layout = Layout::new(BYTES).unwrap();
        let memory = MachineMemory::from_image(layout, &file, &vec![0..BYTES; 1]).unwrap();
        let discarder = memory.discarder();
        let mut given_back = 0;
        // Every other page is discarded and written to, and then those between them: they are mappings of their own, although
        // hardly any part of the image is left.
        for chunk in (0..BYTES).step_by(CHUNK as usize) {
            for first in [PAGE, 0] {
                for at in (chunk + first..chunk + CHUNK).step_by(2 * PAGE as usize) {
                    given_back += discarder.discard(at..at + PAGE).unwrap();
                    assert_eq!(byte(&memory, at), 0, "{at:x}");
                    if first == PAGE {
                        write(&memory, at);
                    }
                }
            }
        }
        assert!(mappings() < 34_000, "{}", mappings());
        assert!(
            (BYTES / 4..BYTES / 2 + BYTES / 4).contains(&given_back),
            "{given_back}"
        );
        // They are zero again, and one that the image has as zero is none that was touched.
        let last = BYTES - CHUNK;
        for at in [last + PAGE, last + 9 * PAGE] {
            assert_eq!(
                (byte(&memory, at), discarder.discard(at..at + PAGE).unwrap()),
                (7, 0)
            );
            assert_eq!(byte(&memory, at), 0);
        }
        // All at once, it is one part that needs no further mapping.
        assert_ne!(discarder.discard(0..BYTES).unwrap(), 0);
    }
}
