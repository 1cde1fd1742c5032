//! A kernel and its initial RAM disk into guest memory.

use std::{fs::File, path::Path};

use linux_loader::{
    bootparam::setup_header,
    loader::{BzImage, Elf, Error as LoaderError, KernelLoader, KernelLoaderResult, bzimage, elf},
};
use memory::{HOLE_START, MachineMemory, PAGE_BYTES};
use vm_memory::{Bytes, GuestAddress};

use super::{Error, layout};

/// A 64-bit bzImage is entered this far behind its 32-bit entry.
const ENTRY_64_OFFSET: u64 = 0x200;
/// Flag of the setup header: there is a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;

/// A kernel in guest memory.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// Address of its first instruction.
    pub(crate) entry: u64,
    /// The header of a bzImage.
    pub(crate) setup_header: Option<setup_header>,
    /// First address that it needs neither for itself nor to unpack itself.
    end: u64,
}

/// An initial RAM disk in guest memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Initrd {
    pub(crate) gpa: u64,
    pub(crate) bytes: u64,
}

/// Loads the kernel at `path`, whichever of the two formats it has.
pub(crate) fn load(memory: &MachineMemory, path: &Path) -> Result<Kernel, Error> {
    let mut file = open(path)?;
    let not_a_kernel = |reason: String| Error::NotAKernel {
        path: path.to_owned(),
        reason,
    };
    let guest = memory.guest();
    let high = Some(GuestAddress(layout::HIGH_MEMORY));
    let kernel = match Elf::load(guest, None, &mut file, high) {
        Ok(loaded) => elf_kernel(&loaded),
        Err(LoaderError::Elf(elf::Error::InvalidElfMagicNumber)) => {
            match BzImage::load(guest, None, &mut file, high) {
                Ok(loaded) => bzimage_kernel(&loaded).map_err(not_a_kernel)?,
                Err(LoaderError::Bzimage(bzimage::Error::ReadBzImageCompressedKernel)) => {
                    return Err(too_large(path, file_bytes(&file, path)?));
                }
                Err(e) => return Err(not_a_kernel(e.to_string())),
            }
        }
        Err(LoaderError::Elf(elf::Error::ReadKernelImage)) => {
            return Err(too_large(path, file_bytes(&file, path)?));
        }
        Err(e) => return Err(not_a_kernel(e.to_string())),
    };
    if kernel.end > low_memory_end(memory) {
        return Err(too_large(path, kernel.end));
    }
    Ok(kernel)
}

fn elf_kernel(loaded: &KernelLoaderResult) -> Kernel {
    Kernel {
        entry: loaded.kernel_load.0,
        setup_header: None,
        end: loaded.kernel_end,
    }
}

fn bzimage_kernel(loaded: &KernelLoaderResult) -> Result<Kernel, String> {
    let Some(header) = loaded.setup_header else {
        return Err("it has no setup header".to_owned());
    };
    let (version, xloadflags) = (header.version, header.xloadflags);
    if version < 0x020c || xloadflags & XLF_KERNEL_64 == 0 {
        return Err("it has no 64-bit entry".to_owned());
    }
    // It unpacks itself to the address it prefers, if that is higher than where it was loaded.
    let unpacked_at = loaded.kernel_load.0.max(header.pref_address);
    Ok(Kernel {
        entry: loaded.kernel_load.0 + ENTRY_64_OFFSET,
        setup_header: Some(header),
        end: unpacked_at
            .saturating_add(u64::from(header.init_size))
            .max(loaded.kernel_end),
    })
}

/// Loads the initial RAM disk at `path` as high as the kernel can have it.
pub(crate) fn load_initrd(
    memory: &MachineMemory,
    path: &Path,
    kernel: &Kernel,
) -> Result<Initrd, Error> {
    let mut file = open(path)?;
    let bytes = file_bytes(&file, path)?;
    let limit = kernel.setup_header.map_or(u64::from(u32::MAX), |header| {
        u64::from(header.initrd_addr_max)
    });
    let end = low_memory_end(memory).min(limit.saturating_add(1));
    let gpa = end
        .checked_sub(bytes)
        .map(|gpa| gpa - gpa % PAGE_BYTES)
        .filter(|gpa| *gpa >= kernel.end)
        .ok_or_else(|| Error::TooLittleMemory {
            what: format!("the kernel with the initial RAM disk {}", path.display()),
            needed: mib(kernel.end.saturating_add(bytes)),
        })?;
    let length = usize::try_from(bytes).unwrap_or(usize::MAX);
    memory
        .guest()
        .read_exact_volatile_from(GuestAddress(gpa), &mut file, length)?;
    Ok(Initrd { gpa, bytes })
}

fn open(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })
}

fn file_bytes(file: &File, path: &Path) -> Result<u64, Error> {
    let metadata = file.metadata().map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })?;
    Ok(metadata.len())
}

fn too_large(path: &Path, bytes: u64) -> Error {
    Error::TooLittleMemory {
        what: format!("the kernel {}", path.display()),
        needed: mib(bytes),
    }
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// End of the memory below the hole.
fn low_memory_end(memory: &MachineMemory) -> u64 {
    memory.layout().bytes().min(HOLE_START)
}
