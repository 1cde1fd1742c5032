//! Snapshots of memory that is written to meanwhile.
//!
//! A [`Tracker`] knows of each granule of memory whether it was written to since it was last looked at, by
//! write-protecting it (userfaultfd) and waiting for the first write. [`Tracker::arm`] protects what was written to
//! while the guest runs, over and over, until little is left; so that in [`Tracker::cut`], for which the guest stands
//! still, only that little has to be protected. From then on nobody writes to a granule before what it had at the cut is
//! read, set aside, or known to be in a snapshot that was taken before, or in a copy ([`Tracker::copy`]) that was.
//!
//! Of blocks of which the host has no page, accesses are noticed instead of writes: there is nothing to protect, and a
//! page of zeros for each of theirs would take page tables, and huge pages from the guest.

mod aside;
mod at_cut;
mod copies;
mod granules;
#[cfg(test)]
mod tests;

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    io::Errno,
};

pub use at_cut::{AtCut, Part, PartKind};
pub use granules::{Elsewhere, Outcome};

use crate::{
    Error, HostPages, MachineMemory,
    host::Host,
    populated::PageMap,
    userfault::{Fault, Userfault, Watch},
};
use aside::Aside;
use granules::{BLOCK_BYTES, Flags, GRANULE_BYTES, Granules};

/// A cut with at most so many granules to protect costs the guest less than stopping and going on does.
const FEW: usize = 32;
/// A guest that writes faster than it is tracked is not caught up with; each round makes it slower.
const MAX_ROUNDS: u32 = 8;
/// More blocks than this are not left absent: each may be a mapping of its own, and have another behind it, and Linux gives
/// a process 65,530 (`vm.max_map_count`).
const MAX_ABSENT_BLOCKS: usize = 16_384;
/// Before something is tried again that the kernel refused, while somebody waits for it.
const RETRY_AFTER: Duration = Duration::from_millis(10);

/// Says whether to go on with something long: it fails with why not.
pub type GoOn<'a> = &'a dyn Fn() -> io::Result<()>;

/// Knows what of a machine's memory is written to. Dropped, it no longer does, and everybody goes on.
#[derive(Debug)]
pub struct Tracker {
    shared: Arc<Shared>,
    resolver: Option<JoinHandle<()>>,
}

/// What [`Tracker::arm`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Armed {
    /// How often memory was gone through.
    pub rounds: u32,
    /// Bytes that were written to since and are left for the cut, about.
    pub left_bytes: u64,
}

/// What all who track a memory share. Locks are taken in the order `phase`, a block's. Nobody who has one touches guest
/// memory but to read what is protected or, at a cut, in blocks whose accesses are not noticed, so that nobody who waits for a page
/// has one.
#[derive(Debug)]
pub(crate) struct Shared {
    host: Host,
    userfault: Userfault,
    page_map: PageMap,
    granules: Granules,
    /// A lock for each block.
    blocks: Box<[Mutex<()>]>,
    /// Written to only by who cuts, or ends that.
    phase: RwLock<Phase>,
    aside: Aside,
    /// Blocks of which accesses are noticed.
    absent_blocks: AtomicUsize,
    /// Of some block it is not known what the kernel does with accesses to it: nothing is protected from here on.
    lost_track: AtomicBool,
    /// What memory was at the cut may have been written over.
    torn: AtomicBool,
    /// Can be read once the tracker ends.
    stopped: OwnedFd,
}

/// What is done with what is written over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing.
    Tracking,
    /// It is set aside, if it is owed.
    Saving {
        /// What is not owed, for it is taken from there.
        elsewhere: Elsewhere,
    },
    /// Nothing; what was set aside is being given back to the host.
    Clearing,
}

impl MachineMemory {
    /// Begins to know what of it is written to. It must be memory of the machine's own, of the pages that any process has.
    ///
    /// # Errors
    ///
    /// [`Error::Untracked`] when it is not, or the host does not permit it.
    pub fn track(&self) -> Result<Tracker, Error> {
        let untracked = |reason: &str| Error::Untracked(io::Error::other(reason.to_owned()));
        if self.host().pages() != HostPages::Any {
            return Err(untracked("it is made of reserved huge pages"));
        }
        if !self.backed().is_empty() {
            return Err(untracked("it is mapped from a memory file"));
        }
        if !self.host().has_all() {
            return Err(untracked("not all of it has come yet"));
        }
        let shared = Shared::new(self.host().clone()).map_err(Error::Untracked)?;
        let shared = Arc::new(shared);
        let resolver = thread::Builder::new().name("resolver".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.resolve()
        });
        let resolver = Some(resolver.map_err(Error::Untracked)?);
        *self.host().tracker_alone() = Arc::downgrade(&shared);
        Ok(Tracker { shared, resolver })
    }
}

impl Tracker {
    /// Goes through memory and protects what was written to, while the guest runs, until little is left or each round
    /// leaves no less than the one before; and until `go_on` says no, which is asked for each 2 MiB.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, the last cut has not ended, or `go_on` says so; the guest is none the worse.
    pub fn arm(&self, go_on: GoOn<'_>) -> io::Result<Armed> {
        let mut left = usize::MAX;
        let mut rounds = 0;
        while left > FEW && rounds < MAX_ROUNDS {
            self.shared.arm_written(go_on)?;
            rounds += 1;
            let now = self.shared.granules.written();
            if now >= left {
                break;
            }
            left = now;
        }
        let left_bytes = self.shared.granules.written() as u64 * GRANULE_BYTES;
        Ok(Armed { rounds, left_bytes })
    }

    /// Lets these bytes of the image be written to, as if somebody had begun to: who writes there then takes no fault.
    ///
    /// # Errors
    ///
    /// When the kernel refuses; who writes there takes a fault, then.
    pub fn expect_write(&self, image: &Range<u64>) -> io::Result<()> {
        let Shared { granules, .. } = &*self.shared;
        for granule in granules.touched(image) {
            let flags = granules.flags(granule);
            if flags.has(Flags::PROTECTED) && !flags.has(Flags::ABSENT) {
                self.shared.write(granule)?;
            }
        }
        Ok(())
    }

    /// Keeps what memory has now until it is saved. The guest stands still, and nobody else writes to it. The snapshot takes from
    /// `elsewhere` what is there.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, or the last cut has not ended; nothing is kept.
    pub fn cut(&self, elsewhere: Elsewhere) -> io::Result<AtCut> {
        AtCut::new(Arc::clone(&self.shared), elsewhere)
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        // It fails when it can be read for a very long time already.
        let _ = rustix::io::write(&self.shared.stopped, &1u64.to_ne_bytes());
        if let Some(resolver) = self.resolver.take() {
            let _ = resolver.join();
        }
        // A cut may still be read.
        self.shared.torn.store(true, Ordering::SeqCst);
        // Who waited, or comes now, goes on.
        let all = 0..self.shared.host.bytes();
        if let Err(error) = self.shared.userfault.unregister(&all) {
            tracing::warn!("guest memory stays protected until the machine ends: {error}");
        }
    }
}

impl Shared {
    fn new(host: Host) -> io::Result<Self> {
        // A page that is merged with others loses its protection.
        let bytes = host.bytes();
        host.keep_pages_apart(&(0..bytes))?;
        let userfault = Userfault::new(host.clone())?;
        userfault.register(&(0..bytes), Watch::Writes)?;
        let granules = Granules::new(bytes);
        Ok(Self {
            userfault,
            page_map: PageMap::open()?,
            blocks: (0..granules.blocks()).map(|_| Mutex::new(())).collect(),
            granules,
            phase: RwLock::new(Phase::Tracking),
            aside: Aside::new(bytes)?,
            absent_blocks: AtomicUsize::new(0),
            lost_track: AtomicBool::new(false),
            torn: AtomicBool::new(false),
            stopped: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            host,
        })
    }

    /// Has those go on who wait, until the tracker ends.
    fn resolve(&self) {
        let mut ready = [
            PollFd::from_borrowed_fd(self.userfault.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.stopped.as_fd(), PollFlags::IN),
        ];
        loop {
            let polled = match poll(&mut ready, None) {
                Err(Errno::INTR) => continue,
                polled => polled.map_err(io::Error::from),
            };
            if ready[1].revents().contains(PollFlags::IN) {
                return;
            }
            match polled.and_then(|_| self.userfault.faults()) {
                Ok(faults) => faults.into_iter().for_each(|fault| self.touched(fault)),
                Err(error) => {
                    tracing::error!("it is not known who waits for guest memory: {error}");
                    thread::sleep(RETRY_AFTER);
                }
            }
        }
    }

    fn touched(&self, fault: Fault) {
        let granule = (fault.page / GRANULE_BYTES) as usize;
        let resolved = match fault.watch {
            Watch::Missing => self.appear((fault.page / BLOCK_BYTES) as usize),
            Watch::Writes => self.write(granule),
        };
        if let Err(error) = resolved {
            tracing::error!(page = fault.page, "guest memory cannot be used: {error}");
            thread::sleep(RETRY_AFTER);
            // Who waits tries again, and with that, so do we.
            let page = fault.page..fault.page + crate::PAGE_BYTES;
            let _ = self.userfault.wake(&page);
        }
    }

    /// Somebody writes to a granule.
    fn write(&self, granule: usize) -> io::Result<()> {
        let phase = self.phase();
        let _turn = self.block_of(granule);
        let image = self.granules.image(&(granule..granule + 1));
        if self
            .granules
            .flags(granule)
            .has(Flags::ABSENT.with(Flags::PROTECTED))
        {
            // That was before the guest gave the block back, and whoever it was has gone on since.
            return self.userfault.wake(&image);
        }
        self.give_up(granule, *phase);
        self.userfault.unprotect(&image)
    }

    /// Notes that a granule is about to be written to, and sets aside what it has, if that is owed. The caller has its
    /// block's lock.
    fn give_up(&self, granule: usize, phase: Phase) {
        let flags = self.granules.flags(granule);
        let flags = match phase {
            Phase::Saving { elsewhere } if flags.is_owed(elsewhere) => {
                if let Err(error) = self.set_aside(granule) {
                    // The guest is not to suffer from it, only the snapshot.
                    tracing::warn!("memory at the cut cannot be kept: {error}");
                    self.torn.store(true, Ordering::Release);
                }
                flags.with(Flags::ASIDE)
            }
            Phase::Saving { .. } | Phase::Tracking | Phase::Clearing => flags,
        };
        let written = flags.written(matches!(phase, Phase::Saving { .. }));
        self.granules.set(granule, written);
    }

    fn set_aside(&self, granule: usize) -> io::Result<()> {
        let image = self.granules.image(&(granule..granule + 1));
        let mut content = vec![0; (image.end - image.start) as usize];
        self.host.read(image.start, &mut content)?;
        self.aside.put(image.start, &content)
    }

    /// Somebody touches a block of which the host has no page.
    fn appear(&self, block: usize) -> io::Result<()> {
        let phase = self.phase();
        let _turn = self.block(block);
        let granules = self.granules.of_block(block);
        let image = self.granules.image(&granules);
        // Also of one that is known to have pages: it must not stay like this, for whoever touches it waits.
        self.userfault.register(&image, Watch::Writes)?;
        if self.is_absent(block) {
            self.absent_blocks.fetch_sub(1, Ordering::Relaxed);
            granules.for_each(|granule| self.give_up(granule, *phase));
        }
        self.userfault.wake(&image)
    }

    /// Whether accesses to a block are noticed.
    fn is_absent(&self, block: usize) -> bool {
        let absent = Flags::ABSENT.with(Flags::PROTECTED);
        self.granules.all(self.granules.of_block(block), absent)
    }

    /// Has `forget` forget the content of each part of `image`, which the guest gives back.
    pub(crate) fn give_back(
        &self,
        image: &Range<u64>,
        forget: impl Fn(&Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        let phase = self.phase();
        let mut at = image.start;
        while at < image.end {
            let end = ((at / BLOCK_BYTES + 1) * BLOCK_BYTES).min(image.end);
            self.give_back_of_block(&(at..end), *phase, &forget)?;
            at = end;
        }
        Ok(())
    }

    fn give_back_of_block(
        &self,
        part: &Range<u64>,
        phase: Phase,
        forget: impl Fn(&Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        let block = (part.start / BLOCK_BYTES) as usize;
        let _turn = self.block(block);
        if self.is_absent(block) {
            return Ok(());
        }
        let granules = self.granules.touched(part);
        granules
            .clone()
            .for_each(|granule| self.give_up(granule, phase));
        self.userfault.unprotect(&self.granules.image(&granules))?;
        forget(part)
    }

    /// Protects what was written to.
    fn arm_written(&self, go_on: GoOn<'_>) -> io::Result<()> {
        for block in 0..self.granules.blocks() {
            go_on()?;
            if self.granules.unprotected(block) == 0 {
                continue;
            }
            let granules = self.granules.of_block(block);
            let phase = self.phase();
            self.check_ready(*phase)?;
            let _turn = self.block(block);
            if self.granules.all(granules, Flags::WRITTEN) && self.leave_absent(block)? {
                continue;
            }
            self.protect_written(block)?;
        }
        Ok(())
    }

    /// Protects the granules of a block that were written to. The caller has its lock.
    fn protect_written(&self, block: usize) -> io::Result<()> {
        let granules = self.granules.of_block(block);
        let is_written = |granule: &usize| !self.granules.flags(*granule).has(Flags::PROTECTED);
        let mut at = granules.start;
        while let Some(first) = (at..granules.end).find(is_written) {
            let end = (first..granules.end).find(|granule| !is_written(granule));
            let run = first..end.unwrap_or(granules.end);
            let image = self.granules.image(&run);
            // Only what is there can be protected.
            self.host.populate(&image)?;
            self.userfault.protect(&image)?;
            at = run.end;
            run.for_each(|granule| self.granules.set(granule, Flags::PROTECTED));
        }
        Ok(())
    }

    /// Sets aside what the granules of a block have that were written to, which stay as they are. The caller has its lock.
    fn set_written_aside(&self, block: usize) -> io::Result<()> {
        for granule in self.granules.of_block(block) {
            if !self.granules.flags(granule).has(Flags::PROTECTED) {
                self.set_aside(granule)?;
                self.granules.set(granule, Flags::ASIDE);
            }
        }
        Ok(())
    }

    /// Notices accesses to a block from now on, if the host has no page of it. The caller has its lock.
    fn leave_absent(&self, block: usize) -> io::Result<bool> {
        let granules = self.granules.of_block(block);
        let image = self.granules.image(&granules);
        let enough = self.absent_blocks.load(Ordering::Relaxed) >= MAX_ABSENT_BLOCKS;
        if enough || self.page_map.holds_any(&self.host, &image)? {
            return Ok(false);
        }
        self.userfault.register(&image, Watch::Missing)?;
        // Somebody may have touched it before that.
        match self.page_map.holds_any(&self.host, &image) {
            Ok(false) => {
                self.absent_blocks.fetch_add(1, Ordering::Relaxed);
                let absent = Flags::ABSENT.with(Flags::PROTECTED);
                granules.for_each(|granule| self.granules.set(granule, absent));
                Ok(true)
            }
            looked => {
                let undone = self.userfault.register(&image, Watch::Writes);
                // Its pages can neither be protected nor left out.
                undone.inspect_err(|_| self.lost_track.store(true, Ordering::Release))?;
                self.userfault.wake(&image)?;
                looked.map(|_| false)
            }
        }
    }

    /// Whether memory can be protected for a cut.
    fn check_ready(&self, phase: Phase) -> io::Result<()> {
        if self.lost_track.load(Ordering::Acquire) {
            return Err(io::Error::other(
                "the host has refused before to watch a part of it",
            ));
        }
        match phase {
            Phase::Tracking => Ok(()),
            Phase::Saving { .. } | Phase::Clearing => {
                Err(io::Error::other("another snapshot is not done yet"))
            }
        }
    }

    fn phase(&self) -> RwLockReadGuard<'_, Phase> {
        self.phase.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn phase_alone(&self) -> RwLockWriteGuard<'_, Phase> {
        self.phase.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn block_of(&self, granule: usize) -> MutexGuard<'_, ()> {
        self.block(granule / (BLOCK_BYTES / GRANULE_BYTES) as usize)
    }

    fn block(&self, block: usize) -> MutexGuard<'_, ()> {
        // Callers have offsets of the image, which all have a block; and what it guards is right after each step.
        let turn = &self.blocks[block.min(self.blocks.len() - 1)];
        turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
