//! The end of a process that may have lost guest memory.

use std::{
    fmt,
    io::{self, Write},
    process,
};

use rustix::{
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    stdio::stderr,
};

/// Says why, if standard error takes that at once, and ends the process.
pub(crate) fn abort(why: fmt::Arguments<'_>) -> ! {
    // As long as a terminal that nobody reads were waited for, other threads would see memory that is not the guest's.
    if let Ok(flags) = fcntl_getfl(stderr()) {
        let _ = fcntl_setfl(stderr(), flags | OFlags::NONBLOCK);
    }
    let _ = writeln!(io::stderr(), "{why}");
    process::abort();
}
