//! What a machine may have: what who starts it permits, and what its CPUs and this host can.

use std::{path::Path, thread};

use control::Confinement;
use hypervisor::GuestCpuid;
use memory::{Layout, MachineMemory};
use saved_state::Header;

use crate::{disks, error::Error, state::DiskState};

/// Whether what a state file asks for is what this process may give: the file may come from anybody.
pub(crate) fn confined(
    confinement: &Confinement,
    header: &Header,
    disks: &[DiskState],
) -> Result<(), Error> {
    let mib = header.memory_bytes >> 20;
    if header.vcpus > confinement.vcpus || mib > confinement.memory_mib {
        return Err(Error::TooLarge {
            vcpus: header.vcpus,
            mib,
        });
    }
    for disk in disks {
        if disk.layer().is_ok_and(|layer| layer.is_some())
            && !disks::is_there(Path::new(&disk.path))
        {
            // It may be in the snapshot; what is opened in its place is asked for again.
            continue;
        }
        // One that is not there is refused when it is opened, by the same path.
        let path = Path::new(&disk.path);
        let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        if !disks::allows(Some(confinement), &real) {
            return Err(Error::DiskOutside {
                path: disk.path.clone(),
            });
        }
    }
    Ok(())
}

/// Whether the guest's CPUs have address bits for all of its memory.
pub(crate) fn addressable(memory: &MachineMemory, cpuid: &GuestCpuid) -> Result<(), Error> {
    let regions = memory.layout().regions();
    let end = regions.iter().map(|region| region.gpa + region.bytes).max();
    match end {
        Some(end) if end > 1 << cpuid.address_bits() => Err(Error::NoAddressBits {
            mib: memory.layout().bytes() >> 20,
            bits: cpuid.address_bits(),
        }),
        _ => Ok(()),
    }
}

/// Warns of more vCPUs than there are CPUs for them. The guest waits for locks whose holders do not run, which costs it most of its
/// time where the processor does not tell KVM that it spins (`docs/benchmarks.md`, *Why one vCPU*).
pub(crate) fn warn_if_crowded(vcpus: u32) {
    // Of this process: it may be bound to a few of them, or have a share.
    let cpus = thread::available_parallelism()
        .map_or(vcpus, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX));
    if vcpus > cpus {
        tracing::warn!(
            vcpus,
            cpus,
            "the machine has more vCPUs than there are CPUs for it: its guest may be many times slower than with as many"
        );
    }
}

/// The layout of `bytes` of guest memory, if this host can hold it at all.
pub(crate) fn layout_of(bytes: u64) -> Result<Layout, Error> {
    let layout = Layout::new(bytes)?;
    let info = rustix::system::sysinfo();
    let host = (info.totalram as u64 + info.totalswap as u64) * u64::from(info.mem_unit);
    if bytes > host {
        return Err(Error::HostTooSmall {
            guest_mib: bytes >> 20,
            host_mib: host >> 20,
        });
    }
    Ok(layout)
}
