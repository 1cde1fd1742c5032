//! Kicking a vCPU out of the guest, so that it cannot miss the kick.
//!
//! A vCPU thread that gets SIGRTMIN while it is inside `KVM_RUN` comes back with `EINTR`. One that gets it
//! just before would go in and stay. So the signal handler sets `immediate_exit` in the vCPU's shared
//! page: the next `KVM_RUN` finishes what the last exit left undone and returns at once
//! (Documentation/virt/kvm/api.rst, `KVM_RUN`).

#![allow(unsafe_code)]

use std::{cell::Cell, io, ptr, thread, time::Duration};

use kvm_bindings::kvm_run;
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::HostTsc;

/// How often a kick that the kernel refuses is sent again, and after how long. Who waits for the vCPU has a longer bound, and names it.
const TRIES: u32 = 1000;
const RETRY_INTERVAL: Duration = Duration::from_millis(1);

thread_local! {
    /// The shared page of the vCPU that this thread runs.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
    /// When the last kick came that has not been answered.
    static KICKED: Cell<Option<HostTsc>> = const { Cell::new(None) };
}

/// Installs the handler of SIGRTMIN for the whole process. Once is enough; more does no harm.
///
/// # Errors
///
/// When the kernel refuses the handler.
pub fn install_kick_handler() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), on_kick)
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

/// Only stores a byte and a number: safe in a signal handler. The thread-locals have constant initial values and
/// no destructors, so that reaching them neither allocates nor takes a lock.
extern "C" fn on_kick(_signal: c_int, _info: *mut siginfo_t, _context: *mut c_void) {
    // First: the guest's time is to end as close to its last instruction as can be told.
    KICKED.set(Some(HostTsc::now()));
    store(RUN.get(), 1);
}

fn store(run: *mut kvm_run, immediate_exit: u8) {
    if run.is_null() {
        return;
    }
    // SAFETY: `Bound` keeps `RUN` null unless the page is mapped.
    let field = unsafe { &raw mut (*run).immediate_exit };
    // SAFETY: as above; volatile, because the kernel and a signal handler look at it meanwhile.
    unsafe { field.write_volatile(immediate_exit) };
}

/// While it lives, kicks to this thread reach the vCPU whose page it was given.
#[derive(Debug)]
pub(crate) struct Bound {
    /// A thread-local is no good on another thread.
    _not_send: std::marker::PhantomData<*mut kvm_run>,
}

impl Bound {
    /// `run` must stay mapped until the value is dropped.
    pub(crate) fn new(run: &mut kvm_run) -> Self {
        RUN.set(run);
        // A kick that came before, when there was nothing to kick.
        if KICKED.get().is_some() {
            store(run, 1);
        }
        Self {
            _not_send: std::marker::PhantomData,
        }
    }

    /// Has the next `KVM_RUN` return at once, as a kick does.
    pub(crate) fn disarm(&self) {
        store(RUN.get(), 1);
    }

    /// Bytes of each access to a port that the vCPU has just come back for. KVM makes one exit of many accesses of a string instruction.
    pub(crate) fn port_access_bytes(&self) -> usize {
        let run = RUN.get();
        // SAFETY: the page is mapped while this lives.
        let size = unsafe { &raw const (*run).__bindgen_anon_1.io.size };
        // SAFETY: as above; any byte is a number, and after such an exit the kernel has written this one.
        usize::from(unsafe { size.read() })
    }

    /// Arms `KVM_RUN` again, after a kick, and tells when that came: the guest has not run since. Whatever the kick announced
    /// must be looked at after this: a kick that comes in between is then not lost but answered once too often.
    pub(crate) fn rearm(&self) -> HostTsc {
        store(RUN.get(), 0);
        // Taken, so that none is ever told of two kicks: the guest may have run between them.
        KICKED.take().unwrap_or_else(HostTsc::now)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        RUN.set(ptr::null_mut());
    }
}

/// Kicks one vCPU's thread.
#[derive(Clone, Copy, Debug)]
pub struct Kick {
    thread: libc::pid_t,
}

impl Kick {
    /// Kicks the calling thread's vCPU.
    pub fn this_thread() -> Self {
        Self {
            // SAFETY: gettid only returns a number.
            thread: unsafe { libc::gettid() },
        }
    }

    /// The id of the thread that it kicks.
    pub fn thread(self) -> libc::pid_t {
        self.thread
    }

    /// Sends the kick. To a thread that has ended it does nothing.
    pub fn kick(self) {
        for _ in 0..TRIES {
            if self.send() {
                return;
            }
            thread::sleep(RETRY_INTERVAL);
        }
    }

    /// Whether the kernel has taken it, or there is nobody to be kicked. Unlike others, a real-time signal is refused when as many wait as
    /// the user may have waiting (`RLIMIT_SIGPENDING`), all processes together.
    fn send(self) -> bool {
        // SAFETY: getpid only returns a number.
        let process = unsafe { libc::getpid() };
        // SAFETY: tgkill with plain numbers; the handler is installed before the first vCPU exists,
        // and does nothing on threads that run none.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, process, self.thread, SIGRTMIN()) };
        sent == 0 || io::Error::last_os_error().kind() != io::ErrorKind::WouldBlock
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    /// Sets how many signals may wait.
    fn limit_waiting(to: libc::rlim_t) {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: it is written to and lives.
        let got = unsafe { libc::getrlimit(libc::RLIMIT_SIGPENDING, &mut limit) };
        assert_eq!(got, 0);
        limit.rlim_cur = to.min(limit.rlim_max);
        // SAFETY: it is read and lives.
        let set = unsafe { libc::setrlimit(libc::RLIMIT_SIGPENDING, &limit) };
        assert_eq!(set, 0);
    }

    #[test]
    fn a_kick_that_is_refused_comes_later() {
        install_kick_handler().unwrap();
        let (tell, told) = channel();
        let (look, looks) = channel();
        let kicked = thread::spawn(move || {
            tell.send(Kick::this_thread()).unwrap();
            looks.recv().unwrap();
            KICKED.get().is_some()
        });
        let kick = told.recv().unwrap();
        limit_waiting(0);
        assert!(!kick.send());
        let kicker = thread::spawn(move || kick.kick());
        // It would be long done.
        thread::sleep(20 * RETRY_INTERVAL);
        assert!(!kicker.is_finished());
        limit_waiting(libc::RLIM_INFINITY);
        kicker.join().unwrap();
        look.send(()).unwrap();
        assert!(kicked.join().unwrap());
        assert!(kick.send(), "to nobody");
    }
}
