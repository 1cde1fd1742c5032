//! Memory whose content comes while its machine runs already.
//!
//! Where there is content to come, whoever touches a page that is not there waits, and [`Arrivals`] says so to who brings
//! it. Everywhere else memory is fresh and zero.
//!
//! Who brings pages must never wait for one: its threads do not touch guest memory, and take no lock that somebody has who
//! does. The kernel's own do not count: a thread that waits for a page has let go of the process's mappings.

use std::{
    io,
    mem::ManuallyDrop,
    ops::Range,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    io::Errno,
};

use crate::{
    Error, MachineMemory, PAGE_BYTES,
    host::{Host, few_of},
    map::{ask_for_huge_pages, ask_for_small_pages},
    settled::Settled,
    userfault::{Userfault, Watch},
};

/// More ranges than this are not watched each on its own: each is a mapping of the process, as is what lies between two,
/// and Linux gives a process 65,530 (`vm.max_map_count`).
const MAX_WATCHED: usize = 16_384;

/// Brings content to a machine's memory.
#[derive(Debug)]
pub struct Arrivals {
    /// Never closed before everything has come: who waits for a page would go on, with zeros.
    userfault: ManuallyDrop<Userfault>,
    host: Host,
    settled: Arc<Settled>,
    /// What is watched.
    ranges: Vec<Range<u64>>,
    /// Can be read once [`Arrivals::stop`] was called.
    stopped: OwnedFd,
}

impl MachineMemory {
    /// Makes it memory whose content [`Arrivals`] brings: it must be all zero, of pages that any process has, and neither a guest
    /// nor a device may have come to it yet. It stays where it is, so that a machine can be made around it before it is known
    /// which. `data` are the ranges of the image, ascending, in which there may be other than zeros.
    ///
    /// # Errors
    ///
    /// [`Error::Userfault`] when the host does not permit this.
    pub fn arriving(self, data: &[Range<u64>]) -> Result<(Self, Arrivals), Error> {
        let settled = Arc::new(Settled::new(self.layout().bytes()));
        let memory = self.with_settled(Arc::clone(&settled));
        let host = memory.host().clone();
        let arrivals = Arrivals::watch(host, settled, data).map_err(Error::Userfault)?;
        Ok((memory, arrivals))
    }
}

impl Arrivals {
    fn watch(host: Host, settled: Arc<Settled>, data: &[Range<u64>]) -> io::Result<Self> {
        let ranges = few_of(data, MAX_WATCHED, host.bytes());
        let userfault = Userfault::new(host.clone())?;
        for range in &ranges {
            // Else the kernel would make a huge page for each first touch, and throw it away when it finds that the touch
            // is somebody else's business.
            ask_for_small_pages(host.at(range.start), range.end - range.start);
            userfault.register(range, Watch::Missing)?;
        }
        Ok(Self {
            userfault: ManuallyDrop::new(userfault),
            host,
            settled,
            ranges,
            stopped: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Waits until somebody waits for pages, and gives their image offsets; several threads may. `None` once this was stopped.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn wanted(&self) -> io::Result<Option<Vec<u64>>> {
        let mut ready = [
            PollFd::from_borrowed_fd(self.userfault.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.stopped.as_fd(), PollFlags::IN),
        ];
        loop {
            match poll(&mut ready, None) {
                Err(Errno::INTR) => continue,
                polled => polled?,
            };
            if ready[1].revents().contains(PollFlags::IN) {
                return Ok(None);
            }
            let faults = self.userfault.faults()?;
            // Another thread may have been faster.
            if !faults.is_empty() {
                return Ok(Some(faults.into_iter().map(|fault| fault.page).collect()));
            }
        }
    }

    /// Has all who are in [`Arrivals::wanted`], or come there, return.
    pub fn stop(&self) {
        // It fails when it can be read for a very long time already.
        let _ = rustix::io::write(&self.stopped, &1u64.to_ne_bytes());
    }

    /// Puts `content`, whole pages, at `offset` of the image, where there is none yet, and has those go on who wait for it.
    /// Returns how many bytes that were.
    ///
    /// # Errors
    ///
    /// When the host has no memory for it.
    pub fn put(&self, offset: u64, content: &[u8]) -> io::Result<u64> {
        let range = offset..offset.saturating_add(content.len() as u64);
        let put = self.settled.settle(&range, |run| {
            let from = (run.start - offset) as usize;
            let content = &content[from..from + (run.end - run.start) as usize];
            self.resolve(&run, |at| {
                let content = &content[(at - run.start) as usize..];
                self.userfault.copy(at, content)
            })
        })?;
        self.wake_the_rest(&range, put)?;
        Ok(put)
    }

    /// As [`Arrivals::put`], with zeros.
    ///
    /// # Errors
    ///
    /// When the host has no memory for it.
    pub fn put_zeros(&self, range: &Range<u64>) -> io::Result<u64> {
        let put = self.settled.settle(range, |run| self.zero(&run))?;
        self.wake_the_rest(range, put)?;
        Ok(put)
    }

    /// Has those look again who wait for what was left out of `range`, of which `put` bytes were put: the guest may have given it
    /// back since they were told of, and then nothing comes that would wake them.
    fn wake_the_rest(&self, range: &Range<u64>, put: u64) -> io::Result<()> {
        if put == range.end - range.start {
            return Ok(());
        }
        if self.is_complete() {
            // Some of it may still be watched, if the kernel refused: what is not there is zero. A page at a time, for the rest is not.
            for offset in range.clone().step_by(PAGE_BYTES as usize) {
                self.zero(&(offset..offset + PAGE_BYTES))?;
            }
        }
        self.userfault.wake(range)
    }

    /// Has those go on who wait for the page at `offset`, which needs no content any more: it is there, or its guest has given
    /// it back, and it is zero.
    ///
    /// # Errors
    ///
    /// As of [`Arrivals::put`].
    pub fn release(&self, offset: u64) -> io::Result<()> {
        let page = offset..offset + PAGE_BYTES;
        match self.settled.put_again(|| self.zero(&page))? {
            true => Ok(()),
            false => self.wake_the_rest(&page, 0),
        }
    }

    fn zero(&self, range: &Range<u64>) -> io::Result<()> {
        self.resolve(range, |at| self.userfault.zero(&(at..range.end)))
    }

    /// Has `place` make pages from an offset on, until all of `range` are there. It ends before one that is there already.
    fn resolve(
        &self,
        range: &Range<u64>,
        mut place: impl FnMut(u64) -> io::Result<u64>,
    ) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            match place(at) {
                Ok(placed) => at += placed,
                // Nothing is watched any more, as everything is there.
                Err(e) if Errno::from_io_error(&e) == Some(Errno::NOENT) && self.is_complete() => {
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
            if at < range.end {
                // Somebody else was faster, who has also woken who waits; but who looks for that here is not to wait.
                self.userfault.wake(&(at..at + PAGE_BYTES))?;
                at += PAGE_BYTES;
            }
        }
        Ok(())
    }

    /// Whether any page of `range` still needs its content.
    pub fn is_missing(&self, range: &Range<u64>) -> bool {
        self.settled.is_open(range)
    }

    /// Says that everything has come but zeros. Memory is then like any other.
    ///
    /// # Errors
    ///
    /// When the kernel refuses; memory is right, but every first touch of a page of zeros still waits for who brings it.
    pub fn complete(&self) -> io::Result<()> {
        // First: what a guest gives back from now on needs no mark, for nothing that has come comes again.
        self.settled.complete();
        for range in &self.ranges {
            self.userfault.unregister(range)?;
            ask_for_huge_pages(self.host.at(range.start), range.end - range.start);
        }
        Ok(())
    }

    /// Whether everything has come.
    pub fn is_complete(&self) -> bool {
        self.settled.is_complete()
    }
}

impl Drop for Arrivals {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // A process that ends before everything has come ends whoever waits, too.
        if self.is_complete() {
            // SAFETY: it is not used any more.
            unsafe { ManuallyDrop::drop(&mut self.userfault) };
        }
    }
}

#[cfg(test)]
mod tests;
