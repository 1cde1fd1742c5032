//! What programs run in a [session](crate::session) find in their environment.

use std::path::PathBuf;

use anyhow::{Context, Result};

/// Path of the `fermata` program.
pub const BIN: &str = "FERMATA_BIN";
/// Path of the `fermata-vmm` program.
pub const VMM_BIN: &str = "FERMATA_VMM_BIN";
/// Path of the guest's kernel, a bzImage.
pub const GUEST_KERNEL: &str = "FERMATA_GUEST_KERNEL";
/// Path of the guest's initial RAM disk.
pub const GUEST_INITRD: &str = "FERMATA_GUEST_INITRD";
/// Path of a kernel that has what the guest's lacks, a bzImage.
pub const GUEST_GENERIC_KERNEL: &str = "FERMATA_GUEST_GENERIC_KERNEL";
/// Path of the initial RAM disk that goes with it, without drivers.
pub const GUEST_GENERIC_INITRD: &str = "FERMATA_GUEST_GENERIC_INITRD";
/// Path of the pristine disk image: an empty ext4 file system. Copy it, never attach it.
pub const GUEST_DISK: &str = "FERMATA_GUEST_DISK";
/// Path of the directory with the [Debian guest's](crate::debian::Guest) files.
pub const DEBIAN: &str = "FERMATA_DEBIAN";
/// Path of a directory for results: writable, the same inside and outside, kept afterwards.
pub const SHARE: &str = "FERMATA_SHARE";

/// The path that the variable `name`, one of this module's constants, holds.
///
/// # Errors
/// When the variable is not set: the program was not started by `cargo xtask`.
pub fn path(name: &str) -> Result<PathBuf> {
    std::env::var_os(name).map(PathBuf::from).with_context(|| {
        format!("{name} is not set: start this by `cargo xtask test`, `demo` or `bench`")
    })
}
