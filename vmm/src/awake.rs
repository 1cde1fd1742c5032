//! Waiting without going to sleep, for what comes at once.
//!
//! To be woken up on another CPU takes as long as much of what the threads that reset a machine do for each other; under another
//! hypervisor, longer. Where there are fewer CPUs than threads, who waits keeps another from one: there, nobody waits so. Nor does anybody yield
//! meanwhile, after which the kernel lets whoever else computes go on for milliseconds.

use std::{
    hint,
    sync::mpsc::{Receiver, TryRecvError},
    time::{Duration, Instant},
};

use rustix::thread::sched_getaffinity;

/// How long it is worth it: about as long as a vCPU takes to be stopped and set anew.
pub(crate) const AT_ONCE: Duration = Duration::from_micros(300);

/// The same for who wakes up others that have slept: as long as that takes on a CPU that has nothing to do, under another hypervisor.
pub(crate) const WAKING: Duration = Duration::from_millis(3);

/// Whether so many threads and one more can be awake at the same time. A machine may be bound to other CPUs at any time.
pub(crate) fn pays(threads: usize) -> bool {
    sched_getaffinity(None).is_ok_and(|cpus| cpus.count() as usize > threads)
}

/// What comes within `bound`, or the news that nobody is left to send anything; [`TryRecvError::Empty`] if nothing does.
pub(crate) fn recv<T>(from: &Receiver<T>, bound: Duration) -> Result<T, TryRecvError> {
    let begun = Instant::now();
    loop {
        let received = from.try_recv();
        if !matches!(received, Err(TryRecvError::Empty)) || begun.elapsed() > bound {
            return received;
        }
        hint::spin_loop();
    }
}
