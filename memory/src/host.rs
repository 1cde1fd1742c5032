//! What is behind guest memory on the host.
//!
//! The mappings are never undone: vCPUs, devices and the kernel hold addresses into them, and a
//! process has one machine, so that they end when it does. That is what makes handing out
//! [`GuestMemory`] sound. Part of one may be replaced by fresh memory, in one step of the kernel's, when its guest gives
//! pages back ([`Discarder`]): every address stays one of guest memory.

use std::{
    fs::File,
    io,
    ops::Range,
    ptr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        Weak,
    },
};

use rustix::{io::Errno, mm::Advice};
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use crate::{
    Discarder, GuestMemory, Layout, Original, PAGE_BYTES, Region,
    backed::{Backed, MAX_RANGES},
    live::Shared,
    map::{HUGE_PAGE_BYTES, fresh, guest_region, map_anonymous, map_image},
    settled::Settled,
};

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
    /// There are no huge pages for it.
    #[error(
        "the host has no {count} free huge pages of 2 MiB for the guest's memory; reserve them (`sysctl vm.nr_hugepages={count}`, or more with other machines), or do without"
    )]
    HugePages {
        /// How many it takes.
        count: u64,
    },
    /// What the guest writes to cannot be known.
    #[error("what the guest writes to its memory cannot be known: {0}")]
    Untracked(#[source] io::Error),
    /// There is nothing behind it that it could be brought back to.
    #[error("the guest's memory is not mapped from an image, and cannot be what it was again")]
    NoImage,
    /// What was written to cannot be found.
    #[error(
        "what the machine has written to its memory cannot be found: {0}; it needs /proc/self/pagemap and a free file descriptor"
    )]
    OwnPages(#[source] io::Error),
    /// The host does not let this process resolve page faults.
    #[error(
        "the guest's memory cannot come on demand, for the host does not permit it (userfaultfd): {0}; run as root or with access to /dev/userfaultfd, or restore without it"
    )]
    Userfault(#[source] io::Error),
    /// vm-memory refused the regions.
    #[error("the regions of guest memory are not accepted: {0}")]
    Regions(String),
}

/// What pages of the host's guest memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostPages {
    /// Any, taken when they are touched. Transparent huge pages are asked for: they make the guest's first touch of memory
    /// more than ten times cheaper.
    #[default]
    Any,
    /// Huge pages that the host has reserved (hugetlbfs). They are the machine's from the beginning, so that touching them
    /// never fails, and until it ends.
    Reserved,
}

/// A machine's memory.
#[derive(Debug)]
pub struct MachineMemory {
    layout: Layout,
    guest: GuestMemory,
    host: Host,
    image: OnceLock<Image>,
}

/// What memory was mapped from.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) file: File,
    /// The ranges that were mapped, ascending and apart; all else was zero.
    pub(crate) mapped: Vec<Range<u64>>,
}

/// Where a machine's memory is on the host: all of it as one memory image.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    /// Host-virtual address of the image's first byte.
    address: usize,
    /// Bytes of the image.
    bytes: u64,
    pages: HostPages,
    backed: Arc<Mutex<Backed>>,
    /// Who knows what is written to, if anybody does.
    tracker: Arc<RwLock<Weak<Shared>>>,
    /// Of memory whose content comes while its machine runs.
    settled: Option<Arc<Settled>>,
}

impl Host {
    /// The host-virtual address of the byte at `image_offset`.
    pub(crate) fn at(&self, image_offset: u64) -> *mut u8 {
        ptr::with_exposed_provenance_mut::<u8>(self.address).wrapping_add(image_offset as usize)
    }

    /// The image offset of the byte at a host-virtual address.
    pub(crate) fn offset(&self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(self.address as u64)?;
        (offset < self.bytes).then_some(offset)
    }

    /// Bytes of the image.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What it is made of.
    pub(crate) fn pages(&self) -> HostPages {
        self.pages
    }

    /// Who knows what is written to, and has to be told before memory is changed by any other way than writing to it; while this
    /// is held, it is nobody else.
    pub(crate) fn tracker(&self) -> RwLockReadGuard<'_, Weak<Shared>> {
        self.tracker.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn tracker_alone(&self) -> RwLockWriteGuard<'_, Weak<Shared>> {
        self.tracker.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills `content` with what is at `offset` of the image.
    ///
    /// # Errors
    ///
    /// When the image ends before.
    #[allow(unsafe_code)]
    pub(crate) fn read(&self, offset: u64, content: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(content.len() as u64);
        if end.is_none_or(|end| end > self.bytes) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // SAFETY: it lies within the mapping, which is never undone; whoever else has it takes it for something that can
        // change at any time, as this does.
        let memory = unsafe { VolatileSlice::new(self.at(offset), content.len()) };
        memory.copy_to(content);
        Ok(())
    }

    /// Has the kernel merge no pages of what is mapped at `image` with equal ones (KSM), which a process can inherit.
    #[allow(unsafe_code)]
    pub(crate) fn keep_pages_apart(&self, image: &Range<u64>) -> io::Result<()> {
        if image.start > image.end || image.end > self.bytes {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = (image.end - image.start) as usize;
        let start = self.at(image.start).cast();
        // SAFETY: it lies within the mapping, and its content does not change.
        let asked = unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxUnmergeable) };
        match asked {
            // A kernel that merges nothing.
            Err(Errno::INVAL) => Ok(()),
            asked => Ok(asked?),
        }
    }

    /// Has every page of `image` be there: one that was not is the page of zeros that everybody shares.
    #[allow(unsafe_code)]
    pub(crate) fn populate(&self, image: &Range<u64>) -> io::Result<()> {
        if image.start > image.end || image.end > self.bytes {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = (image.end - image.start) as usize;
        let start = self.at(image.start).cast();
        // SAFETY: it lies within the mapping, and its content does not change.
        unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxPopulateRead) }?;
        Ok(())
    }

    /// Sets the lowest bit of an entry of `found` for each page of `image` from its beginning on that the host has in memory (mincore(2)).
    #[allow(unsafe_code)]
    pub(crate) fn in_core(&self, image: &Range<u64>, found: &mut [u8]) -> io::Result<()> {
        let bytes = image.end.saturating_sub(image.start);
        if image.end > self.bytes || (found.len() as u64) < bytes.div_ceil(PAGE_BYTES) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let start = self.at(image.start).cast();
        // SAFETY: it lies within the mapping, of which nothing changes, and there is an entry for each of its pages.
        match unsafe { libc::mincore(start, bytes as usize, found.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Which pages have come, if they come while the machine runs.
    pub(crate) fn settled(&self) -> Option<&Settled> {
        self.settled.as_deref()
    }

    /// Whether no content is still to come.
    pub(crate) fn has_all(&self) -> bool {
        self.settled().is_none_or(Settled::is_complete)
    }

    /// The ranges that are mapped from a file. While this is held, none of them changes.
    pub(crate) fn backed(&self) -> MutexGuard<'_, Backed> {
        // A range is put in or taken out whole.
        self.backed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MachineMemory {
    /// Fresh memory, all zero and not yet taken from the host.
    ///
    /// # Errors
    ///
    /// [`Error::Map`] when the host has no room for it.
    pub fn zeroed(layout: Layout) -> Result<Self, Error> {
        Self::zeroed_of(HostPages::Any, layout)
    }

    /// As [`MachineMemory::zeroed`], of such pages.
    ///
    /// # Errors
    ///
    /// [`Error::Map`] and [`Error::HugePages`] when the host has no room for it.
    pub fn zeroed_of(pages: HostPages, layout: Layout) -> Result<Self, Error> {
        let host = map_anonymous(layout.bytes(), pages)?;
        Self::at(host, layout, pages, Vec::new())
    }

    /// Fresh memory that `fill` writes to, before anybody else knows it: all of it as one memory image, zero
    /// where it is not written to. It is made of `pages`.
    ///
    /// # Errors
    ///
    /// [`Error::Map`] and [`Error::HugePages`] when the host has no room for it; what `fill` fails with.
    #[allow(unsafe_code)]
    pub fn filled<E: From<Error>>(
        layout: Layout,
        pages: HostPages,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let bytes = layout.bytes();
        let host = map_anonymous(bytes, pages)?;
        // SAFETY: the memory was mapped just now, and nobody is told of it before `fill` has returned.
        fill(unsafe { fresh(host, bytes) })?;
        Ok(Self::at(host, layout, pages, Vec::new())?)
    }

    /// The content of `image`, whose bytes from 0 on are a memory image of this layout. It is mapped
    /// privately: the guest's writes never reach the file, and machines restored from one file share
    /// what they do not write. `data` are the ranges of the image that are not all zero, ascending;
    /// only they are mapped from the file, rounded out to huge pages, or further if that would take the process too many mappings.
    ///
    /// The file's content must not change while the machine lives; replacing the file by renaming
    /// another over it is fine.
    ///
    /// # Errors
    ///
    /// [`Error::Map`] when the host has no room for it.
    pub fn from_image(layout: Layout, image: &File, data: &[Range<u64>]) -> Result<Self, Error> {
        let memory = Self::zeroed(layout)?;
        memory.map_over(image, data)?;
        Ok(memory)
    }

    /// Gives memory of any pages that is all zero, and that no guest and no device has come to yet, the content of `image`, as
    /// [`MachineMemory::from_image`] does: it stays where it is, so that a machine can be made around it before there is an image.
    ///
    /// # Errors
    ///
    /// [`Error::Map`] when the host has no room for it; the memory is of no use then.
    pub fn map_over(&self, image: &File, data: &[Range<u64>]) -> Result<(), Error> {
        let bytes = self.layout.bytes();
        let mapped = few_of(data, MAX_RANGES, bytes);
        let file = image.try_clone();
        let file = file.map_err(|source| Error::Map { bytes, source })?;
        for range in &mapped {
            map_image(self.host.at(0), image, range)?;
        }
        *self.host.backed() = Backed::new(mapped.clone());
        // The first stays, which is the only one: memory that has an image is not all zero.
        let _ = self.image.set(Image { file, mapped });
        Ok(())
    }

    /// Whether it was made of an image, so that there can be an [`Original`] of it.
    pub fn has_image(&self) -> bool {
        self.image.get().is_some()
    }

    /// What it was mapped from.
    pub(crate) fn image(&self) -> Result<&Image, Error> {
        self.image.get().ok_or(Error::NoImage)
    }

    /// What it was when it was made of an image, which it can be again.
    ///
    /// # Errors
    ///
    /// [`Error::NoImage`] when it was not, or [`Error::Map`].
    pub fn original(&self) -> Result<Original, Error> {
        Original::new(self)
    }

    /// The same, of which `settled` says what has come.
    pub(crate) fn with_settled(mut self, settled: Arc<Settled>) -> Self {
        self.host.settled = Some(settled);
        self
    }

    /// Takes the memory image at `host` for a machine's.
    fn at(
        host: *mut u8,
        layout: Layout,
        pages: HostPages,
        backed: Vec<Range<u64>>,
    ) -> Result<Self, Error> {
        let regions: Result<_, _> = layout
            .regions()
            .iter()
            .map(|region| guest_region(host, region))
            .collect();
        let guest =
            GuestMemory::from_regions(regions?).map_err(|e| Error::Regions(e.to_string()))?;
        let bytes = layout.bytes();
        Ok(Self {
            layout,
            guest,
            host: Host {
                address: host.expose_provenance(),
                bytes,
                pages,
                backed: Arc::new(Mutex::new(Backed::new(backed))),
                tracker: Arc::default(),
                settled: None,
            },
            image: OnceLock::new(),
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

    /// Fills `content` with what is at `offset` of the memory image.
    ///
    /// # Errors
    ///
    /// When the image ends before.
    pub fn read_image(&self, offset: u64, content: &mut [u8]) -> io::Result<()> {
        self.host.read(offset, content)
    }

    pub(crate) fn host(&self) -> &Host {
        &self.host
    }

    /// Host-virtual address of each region, in the layout's order.
    pub fn host_addresses(&self) -> impl Iterator<Item = (Region, u64)> + '_ {
        self.layout
            .regions()
            .iter()
            .copied()
            .zip(self.guest.iter().map(|region| region.as_ptr() as u64))
    }

    /// What takes pages that its guest gives back.
    pub fn discarder(&self) -> Discarder {
        Discarder::new(self.layout.clone(), self.guest.clone(), self.host.clone())
    }

    pub(crate) fn backed(&self) -> Vec<Range<u64>> {
        self.host.backed().ranges()
    }
}

/// At most `count` ranges that have all of `ranges` in them: these, rounded out to huge pages or as far as that takes.
pub(crate) fn few_of(ranges: &[Range<u64>], count: usize, end: u64) -> Vec<Range<u64>> {
    let mut unit = HUGE_PAGE_BYTES as u64;
    loop {
        let rounded = round_out(ranges, unit, end);
        if rounded.len() <= count {
            return rounded;
        }
        unit *= 2;
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

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::FileExt};

    use vm_memory::{Bytes, GuestAddress};

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
    fn there_are_never_more_ranges_than_may_be() {
        const HUGE: u64 = HUGE_PAGE_BYTES as u64;
        let data: Vec<_> = (0..40_000u64)
            .map(|n| 4 * n * HUGE..(4 * n + 1) * HUGE)
            .collect();
        let ranges = few_of(&data, 16_384, 4 * 40_000 * HUGE);
        assert!(ranges.len() <= 16_384);
        for data in data {
            let covers = |range: &Range<u64>| range.start <= data.start && data.end <= range.end;
            assert!(ranges.iter().any(covers), "{data:?}");
        }
        assert_eq!(
            few_of(&[PAGE_BYTES..2 * PAGE_BYTES; 1], 1, HUGE / 2),
            vec![0..HUGE / 2; 1]
        );
    }

    #[test]
    fn what_fills_memory_is_where_the_guest_looks_for_it() {
        // A page behind the hole; only what is touched is taken from the host.
        let layout = Layout::new(crate::HOLE_START + PAGE_BYTES).unwrap();
        let memory = MachineMemory::filled(layout, HostPages::Any, |image| {
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
        let failed = MachineMemory::filled(layout, HostPages::Any, |_| Err(Failed::Fill));
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
