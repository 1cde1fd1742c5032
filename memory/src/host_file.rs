//! Files that are in the host's memory.

use std::{fs::File, io};

use rustix::fs::{MemfdFlags, memfd_create};

/// A file of so many zeros without a name, in memory of the host's that is taken for what is not zero. The kernel shows it as `called`.
///
/// # Errors
///
/// When the host gives none.
pub fn host_file(called: &str, bytes: u64) -> io::Result<File> {
    let make = |flags| memfd_create(called, MemfdFlags::CLOEXEC | flags);
    // A host may refuse what could become a program (`vm.memfd_noexec`), and one before Linux 6.3 has no word for what cannot.
    let made = make(MemfdFlags::NOEXEC_SEAL).or_else(|_| make(MemfdFlags::empty()))?;
    let file = File::from(made);
    file.set_len(bytes)?;
    Ok(file)
}
