//! The boot parameters and the command line.

use linux_loader::{
    bootparam::{boot_e820_entry, boot_params},
    configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator},
};
use memory::{GuestMemory, MachineMemory};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{
    Error,
    kernel::{Initrd, Kernel},
    layout,
};

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// A loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const E820_ACPI: u32 = 3;

/// Writes the command line.
pub(crate) fn write_cmdline(guest: &GuestMemory, cmdline: &str) -> Result<(), Error> {
    if cmdline.len() > layout::CMDLINE_MAX_BYTES {
        return Err(Error::CommandLine(format!("{} characters", cmdline.len())));
    }
    if let Some(odd) = cmdline.chars().find(|c| !matches!(c, ' '..='~')) {
        return Err(Error::CommandLine(format!("it has the character {odd:?}")));
    }
    let bytes: Vec<u8> = cmdline.bytes().chain([0]).collect();
    guest.write_slice(&bytes, GuestAddress(layout::CMDLINE))?;
    Ok(())
}

/// Writes the boot parameters.
pub(crate) fn write_boot_params(
    memory: &MachineMemory,
    kernel: &Kernel,
    initrd: Option<Initrd>,
    cmdline: &str,
    acpi_root: u64,
) -> Result<(), Error> {
    let mut params = boot_params {
        // An ELF kernel has no header; these are the fields that it looks at.
        hdr: kernel.setup_header.unwrap_or_default(),
        acpi_rsdp_addr: acpi_root,
        ..Default::default()
    };
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;
    if kernel.setup_header.is_none() {
        params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    }
    if let Some(Initrd { gpa, bytes }) = initrd {
        // The kernel's own limit keeps both below 4 GiB.
        params.hdr.ramdisk_image = gpa as u32;
        params.hdr.ramdisk_size = bytes as u32;
    }
    let map = memory_map(memory);
    params.e820_table[..map.len()].copy_from_slice(&map);
    params.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(layout::BOOT_PARAMS)),
        memory.guest(),
    )
    .map_err(|_| GuestMemoryError::InvalidGuestAddress(GuestAddress(layout::BOOT_PARAMS)))?;
    Ok(())
}

/// What of the address space is memory, and what of that is free.
fn memory_map(memory: &MachineMemory) -> Vec<boot_e820_entry> {
    let entry = |addr, end: u64, kind| boot_e820_entry {
        addr,
        size: end - addr,
        r#type: kind,
    };
    let mut map = vec![
        entry(0, layout::LOW_MEMORY_END, E820_RAM),
        entry(layout::LOW_MEMORY_END, layout::ACPI, E820_RESERVED),
        entry(layout::ACPI, layout::HIGH_MEMORY, E820_ACPI),
    ];
    map.extend(memory.layout().regions().iter().map(|region| {
        let start = region.gpa.max(layout::HIGH_MEMORY);
        entry(start, region.gpa + region.bytes, E820_RAM)
    }));
    map
}
