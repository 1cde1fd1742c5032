//! Work that a guest stands still for.

#![allow(unsafe_code)]

use std::{io, marker::PhantomData};

/// The lowest of the real-time priorities: before all that has none.
const PRIORITY: libc::c_int = 1;
/// The kernel's name for the calling thread.
const CALLER: libc::pid_t = 0;

/// While it lives, the thread that it is of is not kept from its CPU by threads of no real-time priority. Else the kernel's own may take it for
/// as long as a tick, which is many times what a stop takes, and another CPU that idles meanwhile does not help. Threads that are
/// started meanwhile have none of it. Where the host does not permit it (`CAP_SYS_NICE`, or `RLIMIT_RTPRIO`), nothing changes.
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

    /// Gives a thread the priority, if the host permits it, and says whether it does. The thread is to call [`Urgent::taken`], and has the
    /// priority from now on: also one that waits for a CPU.
    pub(crate) fn give(thread: libc::pid_t) -> bool {
        let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
        schedule(thread, policy, PRIORITY)
            .inspect_err(|error| tracing::debug!(%error, "a stop has no priority"))
            .is_ok()
    }

    /// What the calling thread was given, if it was.
    pub(crate) fn taken() -> Self {
        Self {
            _not_send: PhantomData,
        }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        // Its nice value was not touched. The flag, which could be taken back only with privileges, changes nothing of that.
        let policy = libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK;
        if let Err(error) = schedule(CALLER, policy, 0) {
            tracing::warn!(%error, "a thread keeps its real-time priority");
        }
    }
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
        assert_eq!(policy(), libc::SCHED_OTHER);
        let urgent = Urgent::new();
        let expected = match urgent {
            Some(_) => libc::SCHED_FIFO,
            None => libc::SCHED_OTHER,
        };
        assert_eq!(policy(), expected);
        let child = std::thread::spawn(policy).join().unwrap();
        assert_eq!(child, libc::SCHED_OTHER);
        drop(urgent);
        assert_eq!(policy(), libc::SCHED_OTHER);
    }
}
