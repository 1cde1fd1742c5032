//! Which pages of guest memory can be other than zero.
//!
//! A guest rarely touches all the memory it was given. What it never touched has no page on the
//! host, and `/proc/self/pagemap` (Documentation/admin-guide/mm/pagemap.rst) says so at eight bytes
//! a page, without reading or, worse, creating it. `mincore` would not do: it takes a page that was
//! swapped out for one that was never there. Of huge pages that are reserved, which are never swapped out, it is the
//! other way round: `pagemap` takes one that the kernel just moves for one that was never there, and `mincore` does not.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use crate::{HostPages, MachineMemory, PAGE_BYTES, Region, host::Host, map::HUGE_PAGE_BYTES};

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_OR_SHARED: u64 = 1 << 61;
const ENTRY_BYTES: usize = 8;
const PAGES_A_READ: u64 = 8192;

impl MachineMemory {
    /// The ranges of the memory image that may hold other than zeros, ascending and apart, in bytes
    /// and whole pages.
    ///
    /// # Errors
    ///
    /// When the kernel's page map cannot be read, or knows nothing of content that has not come yet ([`Arrivals`](crate::Arrivals)).
    pub fn populated(&self) -> io::Result<Vec<Range<u64>>> {
        if !self.host().has_all() {
            return Err(io::Error::other("not all of it has come yet"));
        }
        if self.host().pages() == HostPages::Reserved {
            return in_core(self.host());
        }
        let page_map = PageMap::open()?;
        let mut ranges = Runs::default();
        let mut backed = self.backed().into_iter().peekable();
        for (region, host) in self.host_addresses() {
            find(&page_map, &region, host, is_there, |touched| {
                while let Some(range) = backed.next_if(|range| range.start <= touched.start) {
                    ranges.push(range);
                }
                ranges.push(touched);
            })?;
        }
        backed.for_each(|range| ranges.push(range));
        Ok(ranges.joined)
    }
}

/// The ranges of `host` that are in the host's memory.
fn in_core(host: &Host) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Runs::default();
    let mut found = vec![0; PAGES_A_READ as usize];
    for start in (0..host.bytes()).step_by((PAGES_A_READ * PAGE_BYTES) as usize) {
        let end = (start + PAGES_A_READ * PAGE_BYTES).min(host.bytes());
        host.in_core(&(start..end), &mut found)?;
        let pages = (start..end).step_by(PAGE_BYTES as usize).zip(&found);
        for (page, _) in pages.filter(|(_, found)| **found & 1 != 0) {
            ranges.push(page..page + PAGE_BYTES);
        }
    }
    Ok(ranges.joined)
}

/// What the host has of this process's pages.
#[derive(Debug)]
pub(crate) struct PageMap(File);

impl PageMap {
    pub(crate) fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// Fills `entries`, whole ones, with those of the pages from a host-virtual address on.
    fn read(&self, address: u64, entries: &mut [u8]) -> io::Result<()> {
        let at = address / PAGE_BYTES * ENTRY_BYTES as u64;
        self.0.read_exact_at(entries, at)
    }

    /// Calls `found` with each run of pages of the memory image at `host` that are the machine's own, as a range of the image,
    /// ascending.
    pub(crate) fn own(&self, host: &Host, found: impl FnMut(Range<u64>)) -> io::Result<()> {
        let image = Region {
            gpa: 0,
            bytes: host.bytes(),
            image_offset: 0,
        };
        find(self, &image, host.at(0) as u64, is_own, found)
    }

    /// Whether the host has any page of `image`, which is not more than a huge page.
    pub(crate) fn holds_any(&self, host: &Host, image: &Range<u64>) -> io::Result<bool> {
        let mut buffer = [0; (HUGE_PAGE_BYTES as u64 / PAGE_BYTES) as usize * ENTRY_BYTES];
        let pages = (image.end - image.start).div_ceil(PAGE_BYTES) as usize;
        let bytes = buffer.get_mut(..pages * ENTRY_BYTES);
        let bytes = bytes.ok_or(io::ErrorKind::InvalidInput)?;
        self.read(host.at(image.start) as u64, bytes)?;
        Ok(bytes.as_chunks().0.iter().any(is_there))
    }
}

fn is_there(entry: &[u8; ENTRY_BYTES]) -> bool {
    u64::from_ne_bytes(*entry) & (PRESENT | SWAPPED) != 0
}

/// Whether a page is there and of this process alone: one of a file's is not, nor is one that is shared.
fn is_own(entry: &[u8; ENTRY_BYTES]) -> bool {
    is_there(entry) && u64::from_ne_bytes(*entry) & FILE_OR_SHARED == 0
}

/// Calls `found` with each run of pages of `region` whose entries are `wanted`, as a range of the image.
fn find(
    page_map: &PageMap,
    region: &Region,
    host: u64,
    wanted: impl Fn(&[u8; ENTRY_BYTES]) -> bool,
    mut found: impl FnMut(Range<u64>),
) -> io::Result<()> {
    let pages = region.bytes / PAGE_BYTES;
    let mut buffer = vec![0; PAGES_A_READ as usize * ENTRY_BYTES];
    let mut page = 0;
    while page < pages {
        let batch = (pages - page).min(PAGES_A_READ) as usize;
        let bytes = &mut buffer[..batch * ENTRY_BYTES];
        page_map.read(host + page * PAGE_BYTES, bytes)?;
        let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
        let mut start = None;
        for at in 0..=batch {
            let there = entries.get(at).is_some_and(&wanted);
            match (there, start) {
                (true, None) => start = Some(at as u64),
                (false, Some(first)) => {
                    let offset = |at| region.image_offset + (page + at) * PAGE_BYTES;
                    found(offset(first)..offset(at as u64));
                    start = None;
                }
                _ => {}
            }
        }
        page += batch as u64;
    }
    Ok(())
}

/// Ranges that come by ascending start, joined where they touch or overlap.
#[derive(Default)]
struct Runs {
    joined: Vec<Range<u64>>,
}

impl Runs {
    fn push(&mut self, range: Range<u64>) {
        match self.joined.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => self.joined.push(range),
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::{Layout, MIN_MEMORY_BYTES};

    const HUGE: u64 = 2 << 20;

    fn covers(ranges: &[Range<u64>], offset: u64) -> bool {
        ranges.iter().any(|range| range.contains(&offset))
    }

    #[test]
    fn untouched_memory_is_not_populated() {
        let memory = MachineMemory::zeroed(Layout::new(MIN_MEMORY_BYTES).unwrap()).unwrap();
        assert_eq!(memory.populated().unwrap(), []);
        memory
            .guest()
            .write_slice(b"x", GuestAddress(5 * HUGE))
            .unwrap();
        let ranges = memory.populated().unwrap();
        assert!(covers(&ranges, 5 * HUGE));
        assert!(!covers(&ranges, 4 * HUGE));
        assert!(!covers(&ranges, 6 * HUGE));
    }

    #[test]
    fn what_is_touched_of_memory_is_in_core() {
        let memory = MachineMemory::zeroed(Layout::new(MIN_MEMORY_BYTES).unwrap()).unwrap();
        assert_eq!(in_core(memory.host()).unwrap(), []);
        for touched in [5 * HUGE, MIN_MEMORY_BYTES - 1] {
            let written = memory.guest().write_slice(b"x", GuestAddress(touched));
            written.unwrap();
        }
        let ranges = in_core(memory.host()).unwrap();
        assert!(covers(&ranges, 5 * HUGE) && covers(&ranges, MIN_MEMORY_BYTES - 1));
        assert!(!covers(&ranges, 4 * HUGE) && !covers(&ranges, 6 * HUGE));
    }

    #[test]
    fn reserved_huge_pages_that_are_touched_are_populated() {
        let layout = Layout::new(MIN_MEMORY_BYTES).unwrap();
        // Where the host has none to spare.
        let Ok(memory) = MachineMemory::zeroed_of(HostPages::Reserved, layout) else {
            return;
        };
        assert_eq!(memory.populated().unwrap(), []);
        let written = memory.guest().write_slice(b"x", GuestAddress(5 * HUGE));
        written.unwrap();
        let ranges = memory.populated().unwrap();
        assert_eq!((ranges.len(), ranges[0].clone()), (1, 5 * HUGE..6 * HUGE));
    }

    #[test]
    fn what_the_image_holds_is_populated_before_it_is_touched() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MIN_MEMORY_BYTES).unwrap();
        let data = [4 * HUGE..5 * HUGE, 8 * HUGE..8 * HUGE + PAGE_BYTES];
        let layout = Layout::new(MIN_MEMORY_BYTES).unwrap();
        let memory = MachineMemory::from_image(layout, &file, &data).unwrap();
        assert_eq!(
            memory.populated().unwrap(),
            [4 * HUGE..5 * HUGE, 8 * HUGE..9 * HUGE]
        );
        for touched in [0, 4 * HUGE + PAGE_BYTES, 20 * HUGE] {
            memory
                .guest()
                .write_slice(b"x", GuestAddress(touched))
                .unwrap();
        }
        let ranges = memory.populated().unwrap();
        assert!(ranges.is_sorted_by(|a, b| a.end < b.start), "{ranges:?}");
        for offset in [0, 4 * HUGE, 4 * HUGE + PAGE_BYTES, 8 * HUGE, 20 * HUGE] {
            assert!(covers(&ranges, offset), "{offset:x} in {ranges:?}");
        }
        assert!(!covers(&ranges, 12 * HUGE));
    }
}
