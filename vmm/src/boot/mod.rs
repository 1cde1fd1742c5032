//! Everything that is in a machine's memory and registers when its kernel's first instruction runs.
//!
//! The kernel is entered in 64-bit mode by Linux's own boot protocol
//! (Documentation/arch/x86/boot.rst); there is no firmware.

mod acpi;
mod kernel;
mod layout;
mod params;
mod tables;

use std::path::PathBuf;

use control::MachineConfig;
use hypervisor::BootRegisters;
use memory::MachineMemory;

pub(crate) use acpi::MmioDevice;
pub(crate) use layout::{GENERATION, VMCLOCK};

/// Why a kernel could not be put into memory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A file cannot be read.
    #[error("{path} cannot be read: {source}; check the path and its permissions")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The file is no kernel.
    #[error(
        "{path} is not a kernel that can be booted ({reason}); give a bzImage or an x86_64 ELF vmlinux"
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What the loader said.
        reason: String,
    },
    /// The kernel, or what goes with it, does not fit.
    #[error("{what} needs {needed} MiB of guest memory; give the machine more than that")]
    TooLittleMemory {
        /// What does not fit.
        what: String,
        /// MiB it would take.
        needed: u64,
    },
    /// The command line is too long or has a character that cannot be in one.
    #[error("the kernel command line is not acceptable ({0}); it may have up to {max} characters of ASCII", max = layout::CMDLINE_MAX_BYTES)]
    CommandLine(String),
    /// Guest memory does not take the bytes.
    #[error("guest memory cannot be written: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Puts kernel, initial RAM disk, command line and tables into `memory`; returns where to begin.
///
/// # Errors
///
/// An [`Error`] that says what to change.
pub(crate) fn load(
    memory: &MachineMemory,
    config: &MachineConfig,
    devices: &[MmioDevice],
) -> Result<BootRegisters, Error> {
    let guest = memory.guest();
    let kernel = kernel::load(memory, &config.kernel)?;
    let initrd = match &config.initrd {
        Some(path) => Some(kernel::load_initrd(memory, path, &kernel)?),
        None => None,
    };
    params::write_cmdline(guest, &config.cmdline)?;
    let acpi = acpi::write(guest, config.vcpus, devices)?;
    params::write_boot_params(memory, &kernel, initrd, &config.cmdline, acpi)?;
    tables::write(guest)?;
    Ok(BootRegisters {
        entry: kernel.entry,
        boot_params: layout::BOOT_PARAMS,
        page_table: layout::PAGE_TABLES,
        gdt: layout::GDT,
        gdt_entries: tables::GDT_ENTRIES,
    })
}
