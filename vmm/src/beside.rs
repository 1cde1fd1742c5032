//! Work beside a running guest.

use std::thread;

use crate::error::Error;

/// Of the threads that save a machine while its guest runs, or merge its layers. Where both want all CPUs, the kernel's weights for it and for 0
/// give them a sixth.
const NICENESS: i32 = 7;

/// Does `work`, and lets the guest have the CPUs first.
pub(crate) fn beside_guest<T: Send>(
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> Result<T, Error> {
    let work = || {
        // Threads that are made from here on inherit it. Nobody is refused to be nicer.
        let _ = rustix::process::setpriority_process(None, NICENESS);
        work()
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("saver".to_owned());
        let saver = thread.spawn_scoped(scope, work).map_err(Error::Thread)?;
        saver.join().unwrap_or(Err(Error::Panicked))
    })
}
