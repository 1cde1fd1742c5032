//! Work that a guest stands still for.

#![allow(unsafe_code)]

use std::{io, marker::PhantomData};

/// The lowest of the real-time priorities: before all that has none.
const PRIORITY: libc::c_int = 1;
/// The kernel's name for the calling thread.
const CALLER: libc::pid_t = 0;

/// While it lives, the thread that it is of is not kept from its CPU by threads of no real-time priority. Else the kernel's own may take it for
/// as long as a tick, which is many times what a stop takes, and another CPU that idles meanwhile does not help. Threads that are
/// started meanwhile have none of it. Where the host does not permit it (`CAP_SYS_NICE`, or `RLIMIT_RTPRIO`), or somebody has chosen how
/// the thread is scheduled, nothing changes.
#[must_use = "it ends when this is dropped"]
#[derive(Debug)]
pub(crate) struct Urgent {
    _not_send: PhantomData<*const ()>,
}

impl Urgent {
    /// Of the calling thread, if the host permits it.
    pub(crate) fn new() -> Option<Self> {
        Self::give(CALLER).then(Self::taken)
    }

    /// Gives a thread the priority, if that can be, and says whether it has. Such a thread is to call [`Urgent::taken`], and has the
    /// priority from now on: also one that waits for a CPU. The caller has it already, or would have to wait for the one that it gives it to.
    pub(crate) fn give(thread: libc::pid_t) -> bool {
        if !is_usual(thread) {
            return false;
        }
        let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
        schedule(thread, policy, PRIORITY)
            .inspect_err(|error| tracing::debug!(%error, "a stop has no priority"))
            .is_ok()
    }

    /// What the calling thread was given.
    pub(crate) fn taken() -> Self {
        Self {
            _not_send: PhantomData,
        }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        // Its nice value was not touched. The flag stays, for it takes a privilege to take it back: what the thread starts has no nice value below 0.
        let policy = libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK;
        if let Err(error) = schedule(CALLER, policy, 0) {
            tracing::warn!(%error, "a thread keeps its real-time priority");
        }
    }
}

/// Whether a thread is scheduled as all are of which nobody has said anything else.
fn is_usual(thread: libc::pid_t) -> bool {
    // SAFETY: it takes and returns plain numbers.
    let policy = unsafe { libc::sched_getscheduler(thread) };
    policy >= 0 && policy & !libc::SCHED_RESET_ON_FORK == libc::SCHED_OTHER
}

/// Has the kernel schedule a thread so.
fn schedule(thread: libc::pid_t, policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    let parameters = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: the kernel reads the structure, which outlives the call.
    match unsafe { libc::sched_setscheduler(thread, policy, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> libc::c_int {
        // SAFETY: 0 is the calling thread.
        (unsafe { libc::sched_getscheduler(0) }) & !libc::SCHED_RESET_ON_FORK
    }

    #[test]
    fn it_ends_where_it_began_and_is_not_inherited() {
        // A thread of its own, which is as the test's is.
        let tested = || {
            let begun = policy();
            let urgent = Urgent::new();
            let meanwhile = policy();
            assert_eq!(urgent.is_some(), meanwhile != begun);
            if urgent.is_some() {
                assert_eq!(meanwhile, libc::SCHED_FIFO);
                assert!(Urgent::new().is_none(), "it has it already");
                assert_eq!(policy(), libc::SCHED_FIFO);
            }
            let child = std::thread::spawn(policy).join().unwrap();
            assert_eq!(child, begun);
            drop(urgent);
            assert_eq!(policy(), begun);
        };
        std::thread::spawn(tested).join().unwrap();
    }

    #[test]
    fn who_is_scheduled_otherwise_stays_so() {
        let tested = || {
            schedule(CALLER, libc::SCHED_BATCH, 0).unwrap();
            let urgent = Urgent::new();
            assert!(urgent.is_none());
            drop(urgent);
            assert_eq!(policy(), libc::SCHED_BATCH);
        };
        std::thread::spawn(tested).join().unwrap();
    }
}
