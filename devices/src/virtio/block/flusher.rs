//! Flushes on a thread of their own: a disk can take seconds to make durable what was written, and the loop has other devices to
//! serve.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Instant,
};

use rustix::event::{EventfdFlags, eventfd};

use super::disk::Disk;
use crate::sync::lock;

/// The name of such a thread.
const THREAD_NAME: &str = "flush";

/// Flushes one disk, one flush at a time. Its thread is there from the first of them on.
pub(super) struct Flusher {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// It was said that there is no thread.
    is_said: bool,
    /// As if the host had none.
    #[cfg(test)]
    pub(super) is_refused: bool,
}

/// What it has in common with its thread.
struct Shared {
    disk: Arc<Disk>,
    stage: Mutex<Stage>,
    changed: Condvar,
    /// An eventfd that is signalled at the end of each flush.
    ended: OwnedFd,
}

/// How far a flush is.
enum Stage {
    Idle,
    UnderWay,
    /// With what came of it, which nobody has asked for yet.
    Ended(io::Result<()>),
    /// No other will be asked for.
    Left,
}

impl Flusher {
    /// One for `disk`, that has nothing to do yet.
    pub(super) fn new(disk: Arc<Disk>) -> io::Result<Self> {
        let shared = Shared {
            disk,
            stage: Mutex::new(Stage::Idle),
            changed: Condvar::new(),
            ended: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        };
        Ok(Self {
            shared: Arc::new(shared),
            thread: None,
            is_said: false,
            #[cfg(test)]
            is_refused: false,
        })
    }

    /// What becomes readable, as an edge, when a flush has ended.
    pub(super) fn ended(&self) -> BorrowedFd<'_> {
        self.shared.ended.as_fd()
    }

    /// Begins to make durable what was written until now; says whether the host has a thread for it. The disk is not to be used
    /// until it has ended, and none may be under way.
    pub(super) fn begin(&mut self) -> bool {
        #[cfg(test)]
        if self.is_refused {
            return false;
        }
        if self.thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let thread = thread::Builder::new().name(THREAD_NAME.to_owned());
            match thread.spawn(move || shared.work()) {
                Ok(thread) => self.thread = Some(thread),
                Err(error) => {
                    if !std::mem::replace(&mut self.is_said, true) {
                        let path = self.shared.disk.path();
                        tracing::warn!(path, %error, "no thread for flushes: the loop makes them");
                    }
                    return false;
                }
            }
        }
        *lock(&self.shared.stage) = Stage::UnderWay;
        self.shared.changed.notify_all();
        true
    }

    /// Whether there is one that has not ended.
    pub(super) fn is_under_way(&self) -> bool {
        matches!(*lock(&self.shared.stage), Stage::UnderWay)
    }

    /// Waits until none is under way; says whether that is so by then.
    pub(super) fn wait_until(&self, deadline: Instant) -> bool {
        let stage = lock(&self.shared.stage);
        let bound = deadline.saturating_duration_since(Instant::now());
        let is_under_way = |stage: &mut Stage| stage.is_under_way();
        let waited = self
            .shared
            .changed
            .wait_timeout_while(stage, bound, is_under_way);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// What came of the last one, if it has ended and this was not asked before.
    pub(super) fn outcome(&self) -> Option<io::Result<()>> {
        let mut stage = lock(&self.shared.stage);
        match std::mem::replace(&mut *stage, Stage::Idle) {
            Stage::Ended(outcome) => Some(outcome),
            other => {
                *stage = other;
                None
            }
        }
    }
}

impl Drop for Flusher {
    /// Waits for the thread, which has the disk open, unless that waits for the disk: whoever ends a device settles it before.
    fn drop(&mut self) {
        let was = std::mem::replace(&mut *lock(&self.shared.stage), Stage::Left);
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && !was.is_under_way()
        {
            // That it panicked was said.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self) {
        loop {
            let idle = |stage: &mut Stage| !matches!(stage, Stage::UnderWay | Stage::Left);
            let waited = self.changed.wait_while(lock(&self.stage), idle);
            if matches!(*waited.unwrap_or_else(PoisonError::into_inner), Stage::Left) {
                return;
            }
            // Its outcome is waited for, whatever happens.
            let flushed = catch_unwind(AssertUnwindSafe(|| self.disk.flush()));
            let outcome = flushed.unwrap_or_else(|_| Err(io::Error::other("the flush panicked")));
            let mut stage = lock(&self.stage);
            if stage.is_under_way() {
                *stage = Stage::Ended(outcome);
                self.changed.notify_all();
            }
            drop(stage);
            // It fails only where it has been signalled 2^64 times and nobody looked.
            let _ = rustix::io::write(&self.ended, &1u64.to_ne_bytes());
        }
    }
}

impl Stage {
    fn is_under_way(&self) -> bool {
        matches!(self, Self::UnderWay)
    }
}
