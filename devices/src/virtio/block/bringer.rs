//! Reads that have to wait for the host's disk: what they want is brought into the page cache beside the loop.
//!
//! What is in the host's page cache is copied at once, which costs less than to hand it to anybody. What is not is kept until
//! the round ends, and then brought there together with the others by [`Ring`], or by [`Fetch`] if it is not on this host; a disk does many at once several times as fast as
//! one after the other (`docs/decisions/io-uring.md`). Meanwhile the loop serves other devices. Then the reads are made, and need not
//! wait: no device touches guest memory beside the loop. Should what was brought be gone by then, they wait.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex},
    time::Instant,
};

use branch_disk::Awaited;
use rustix::event::{EventfdFlags, eventfd};

use super::{
    disk::{Disk, Left, Peek},
    fetch::{Fetch, Missing},
    ring::{Part, Ring},
};
use crate::sync::lock;

/// After so many failures it is not tried again: the kernel has no io_uring for us, and is not only short of memory.
const TRIES: u32 = 8;

/// Brings what one disk's reads want.
pub(super) struct Bringer {
    disk: Arc<Disk>,
    /// An eventfd that is signalled when something was brought.
    ended: Arc<OwnedFd>,
    state: Mutex<State>,
    fetch: Fetch,
}

#[derive(Default)]
struct State {
    /// Made when something has to wait for the first time, and anew when it has failed.
    ring: Option<Box<Ring>>,
    failures: u32,
}

/// What was begun. With any of it, its end will be told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    /// What is not on this host is fetched.
    pub(super) fetches: bool,
    /// What is not in the page cache is read.
    pub(super) reads: bool,
}

impl Begun {
    pub(super) fn is_any(self) -> bool {
        self.fetches || self.reads
    }
}

impl Bringer {
    pub(super) fn new(disk: Arc<Disk>) -> io::Result<Self> {
        let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let ended = Arc::new(ended);
        Ok(Self {
            disk,
            fetch: Fetch::new(Arc::clone(&ended)),
            ended,
            state: Mutex::default(),
        })
    }

    /// The same with this ring, or where there is none.
    #[cfg(test)]
    pub(super) fn with(disk: Arc<Disk>, ring: Option<Ring>) -> Self {
        let bringer = Self::new(disk).unwrap();
        let failures = if ring.is_some() { 0 } else { TRIES };
        if ring.is_none() {
            bringer.disk.set_peek(Peek::Wait);
        }
        let ring = ring.map(Box::new);
        *lock(&bringer.state) = State { ring, failures };
        bringer
    }

    /// What becomes readable, as an edge, when something was brought, so that it may be all.
    pub(super) fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Begins to bring what is `left` of reads. Nothing may be under way.
    pub(super) fn begin(&self, left: Left) -> Begun {
        let Left { parts, awaited } = left;
        Begun {
            fetches: !awaited.is_empty() && self.begin_to_fetch(awaited),
            reads: !parts.is_empty() && self.begin_to_read(&parts),
        }
    }

    fn begin_to_fetch(&self, awaited: Vec<Awaited>) -> bool {
        let begun = self.fetch.begin(awaited);
        if let Err(error) = &begun {
            let path = self.disk.path();
            tracing::debug!(path, %error, "no thread to fetch a part of a disk");
        }
        begun.is_ok()
    }

    fn begin_to_read(&self, parts: &[Part]) -> bool {
        let state = &mut *lock(&self.state);
        match self.try_to_begin(state, parts) {
            Ok(begun) => begun,
            Err(error) => {
                state.ring = None;
                state.failures += 1;
                if state.failures == TRIES {
                    self.disk.set_peek(Peek::Wait);
                    tracing::warn!(
                        path = self.disk.path(),
                        %error,
                        "io_uring is not to be had here; the disk is read one request after the other, and other devices wait for it"
                    );
                }
                false
            }
        }
    }

    fn try_to_begin(&self, state: &mut State, parts: &[Part]) -> io::Result<bool> {
        let ring = match &mut state.ring {
            Some(ring) => ring,
            none => none.insert(Box::new(Ring::new(self.ended())?)),
        };
        ring.begin(parts)
    }

    /// Whether something is being brought.
    pub(super) fn is_under_way(&self) -> bool {
        self.fetch.is_under_way() || self.is_reading()
    }

    fn is_reading(&self) -> bool {
        let ring = &mut lock(&self.state).ring;
        ring.as_mut().is_some_and(|ring| ring.is_under_way())
    }

    /// Has nothing more be fetched of what was begun.
    pub(super) fn end_early(&self) {
        self.fetch.end_early();
    }

    /// What of [`Left::awaited`] of what was begun last has not come. It is said once.
    pub(super) fn take_missing(&self) -> Missing {
        self.fetch.take_missing()
    }

    /// Waits until nothing is; says whether that is so by `deadline`.
    pub(super) fn wait_until(&self, deadline: Instant) -> bool {
        let ring = &mut lock(&self.state).ring;
        ring.as_mut().is_none_or(|ring| ring.wait_until(deadline))
            && self.fetch.wait_until(deadline)
    }
}

impl Drop for Bringer {
    /// Of a disk that hangs, the kernel may not have looked for the files yet: they stay open.
    fn drop(&mut self) {
        self.fetch.end_early();
        if self.is_reading() {
            std::mem::forget(Arc::clone(&self.disk));
        }
    }
}
