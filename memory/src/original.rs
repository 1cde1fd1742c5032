//! Memory that was made of an image, brought back to what it was.
//!
//! It is mapped privately, so that what was written to since, by the guest, by a device or by KVM, is what has pages of the
//! process's own: nobody has to keep a log of writes, nor protect anything. Such a page is given its old content and stays, so that
//! who writes to it the next time meets no fault. One that was not written to for a while goes back to being the image's: what it
//! takes to bring memory back goes with what is written between two times, not with all that ever was.
//!
//! What the guest gave back ([`Discarder`](crate::Discarder)) is mapped anew.

use std::{fmt, io, ops::Range};

use crate::{
    Error, MachineMemory, PAGE_BYTES,
    abort::abort,
    backed::Backed,
    host::{Host, Image},
    map::{ask_for_small_pages, forget, map_image, map_to_read, unmap},
    own_pages::OwnPages,
};

/// A page that was as in the image so many times in a row is the image's again: to have it anew costs the one who writes to it a
/// fault, some ten times what it costs to look at it.
const KEPT_UNCHANGED: u8 = 16;

const ZEROS: &Page = &Page([0; PAGE_BYTES as usize]);

/// Its content, at an address that pages have.
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES as usize]);

/// What a machine's memory was when it was made of an image.
#[derive(Debug)]
pub struct Original {
    host: Host,
    content: Content,
    own_pages: OwnPages,
    /// What the machine has of its own, ascending.
    kept: Vec<Kept>,
    /// Spare.
    found: Vec<Kept>,
    /// Whether it was brought back before.
    begun: bool,
}

/// A page of the machine's own that is as in the image.
#[derive(Clone, Copy, Debug)]
struct Kept {
    /// Its offset in the image.
    offset: u64,
    /// How often it was found unchanged, one time after the other.
    unchanged: u8,
}

/// What was done to bring memory back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BroughtBack {
    /// Pages that had another content, or had been given back.
    pub dirty_pages: u64,
    /// Pages that were looked at.
    pub own_pages: u64,
}

/// The image, to be read.
struct Content {
    image: Image,
    /// Where it is mapped.
    address: *const u8,
    bytes: u64,
}

// SAFETY: it is memory that is only read, and stays where it is for as long as this is there.
#[allow(unsafe_code)]
unsafe impl Send for Content {}

impl Original {
    pub(crate) fn new(memory: &MachineMemory) -> Result<Self, Error> {
        let bytes = memory.layout().bytes();
        let host = memory.host().clone();
        // A page of the machine's own could become the page of zeros that everybody shares, and would not be found any more.
        host.keep_pages_apart(&(0..bytes))
            .map_err(Error::OwnPages)?;
        Ok(Self {
            host,
            content: Content::new(memory.image()?, bytes)?,
            own_pages: OwnPages::new().map_err(Error::OwnPages)?,
            kept: Vec::new(),
            found: Vec::new(),
            begun: false,
        })
    }

    /// Brings memory back. Nobody may write to it meanwhile: the machine stands still.
    ///
    /// # Errors
    ///
    /// When the host refuses; nothing is known of the content of memory then.
    pub fn bring_back(&mut self) -> io::Result<BroughtBack> {
        let mut done = BroughtBack::default();
        let tracked = self.host.tracker().upgrade().is_some();
        if tracked {
            return Err(io::Error::other(
                "somebody is told of what is written to it",
            ));
        }
        done.dirty_pages += self.map_what_was_given_back()? / PAGE_BYTES;
        if !self.begun {
            done.dirty_pages += self.empty_gaps()?;
            self.begun = true;
        }
        self.find()?;
        done.own_pages = self.found.len() as u64;
        for page in &mut self.found {
            if self.content.is_at(&self.host, page.offset) {
                page.unchanged += 1;
            } else {
                self.content.copy_to(&self.host, page.offset);
                page.unchanged = 0;
                done.dirty_pages += 1;
            }
        }
        self.let_go()?;
        std::mem::swap(&mut self.kept, &mut self.found);
        Ok(done)
    }

    /// Has what the guest gave back be mapped from the image again; returns how many bytes it was.
    fn map_what_was_given_back(&self) -> io::Result<u64> {
        let mut backed = self.host.backed();
        let all = &self.content.image.mapped;
        let bytes = |ranges: &[Range<u64>]| -> u64 {
            ranges.iter().map(|range| range.end - range.start).sum()
        };
        let missing = bytes(all) - bytes(&backed.ranges());
        if missing == 0 {
            return Ok(0);
        }
        for range in Backed::put_back(&mut backed, all) {
            if let Err(error) = map_image(self.host.at(0), &self.content.image.file, &range) {
                // Before Linux 6.12, some of guest memory may be mapped no more: nobody sees that.
                abort(format_args!("a machine cannot be brought back: {error}"));
            }
            self.host.keep_pages_apart(&range)?;
        }
        Ok(missing)
    }

    /// Empties what is not of the image, which then reads as zeros, and has it be of small pages from here on: of a huge page that
    /// was written to, all has to be looked at. Returns how many pages were other than zero.
    fn empty_gaps(&mut self) -> io::Result<u64> {
        let mut dirty = 0;
        let (host, content) = (&self.host, &self.content);
        self.own_pages.find(host, |own| {
            let pages = pages(&own).filter(|page| !content.has(*page));
            dirty += pages.filter(|page| !content.is_at(host, *page)).count() as u64;
        })?;
        let mut at = 0;
        let end = host.bytes()..host.bytes();
        for range in content.image.mapped.iter().chain([&end]) {
            if at < range.start {
                ask_for_small_pages(host.at(at), range.start - at);
                forget(host.at(at), range.start - at)?;
            }
            at = range.end;
        }
        Ok(dirty)
    }

    /// Finds what the machine has of its own now.
    fn find(&mut self) -> io::Result<()> {
        let Self {
            host,
            own_pages,
            kept,
            found,
            ..
        } = self;
        let mut kept = kept.iter().peekable();
        found.clear();
        own_pages.find(host, |own| {
            for offset in pages(&own) {
                while kept.next_if(|page| page.offset < offset).is_some() {}
                let known = kept.next_if(|page| page.offset == offset);
                found.push(known.copied().unwrap_or(Kept {
                    offset,
                    unchanged: 0,
                }));
            }
        })
    }

    /// Has those pages be the image's again that were not written to for long.
    fn let_go(&mut self) -> io::Result<()> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        self.found.retain(|page| {
            if page.unchanged < KEPT_UNCHANGED {
                return true;
            }
            match runs.last_mut() {
                Some(run) if run.end == page.offset => run.end += PAGE_BYTES,
                _ => runs.push(page.offset..page.offset + PAGE_BYTES),
            }
            false
        });
        for run in runs {
            forget(self.host.at(run.start), run.end - run.start)?;
        }
        Ok(())
    }
}

impl Content {
    fn new(image: &Image, bytes: u64) -> Result<Self, Error> {
        let file = image.file.try_clone().map_err(Error::OwnPages)?;
        Ok(Self {
            address: map_to_read(&file, bytes)?,
            bytes,
            image: Image {
                file,
                mapped: image.mapped.clone(),
            },
        })
    }

    /// Whether the page at `offset` is of the image, and not zero because nothing was mapped there.
    fn has(&self, offset: u64) -> bool {
        let mapped = &self.image.mapped;
        let behind = mapped.partition_point(|range| range.start <= offset);
        let range = behind.checked_sub(1).and_then(|last| mapped.get(last));
        range.is_some_and(|range| offset < range.end)
    }

    /// The page at `offset`, which is within memory.
    fn page(&self, offset: u64) -> *const u8 {
        debug_assert!(offset < self.bytes);
        match self.has(offset) {
            true => self.address.wrapping_add(offset as usize),
            false => ZEROS.0.as_ptr(),
        }
    }

    /// Whether memory at `host` has at `offset` what the image has there.
    #[allow(unsafe_code)]
    fn is_at(&self, host: &Host, offset: u64) -> bool {
        let bytes = PAGE_BYTES as usize;
        // SAFETY: both are pages that are mapped and that nobody writes to meanwhile.
        let compared =
            unsafe { libc::memcmp(host.at(offset).cast(), self.page(offset).cast(), bytes) };
        compared == 0
    }

    /// Has memory at `host` have at `offset` what the image has there.
    #[allow(unsafe_code)]
    fn copy_to(&self, host: &Host, offset: u64) {
        let (from, to) = (self.page(offset), host.at(offset));
        // SAFETY: both are pages that are mapped, of two mappings; nobody has references into guest memory, and nobody else reads or
        // writes it meanwhile.
        unsafe { from.copy_to_nonoverlapping(to, PAGE_BYTES as usize) }
    }
}

impl Drop for Content {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: `new` mapped it, and what it is read by has no copy of the address.
        unsafe { unmap(self.address, self.bytes) }
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Content")
            .field("image", &self.image)
            .finish_non_exhaustive()
    }
}

/// The offset of each page of a range of whole ones.
fn pages(range: &Range<u64>) -> impl Iterator<Item = u64> + use<> {
    range.clone().step_by(PAGE_BYTES as usize)
}

#[cfg(test)]
mod tests;
