//! From a disk of a request, or what is to change of one, to what a VMM is told.

use api_types::Disk;
use control::{DiskChange, DiskConfig, DiskFormat, DiskLimits, DiskLimitsChange};

use crate::tree::{PathError, Tree};

/// A disk that a machine boots with.
pub(super) fn attached(tree: &Tree, disk: &Disk) -> Result<DiskConfig, PathError> {
    Ok(DiskConfig {
        path: tree.input("disks", &disk.path)?,
        read_only: disk.read_only,
        format: match disk.format {
            api_types::DiskFormat::Raw => DiskFormat::Raw,
            api_types::DiskFormat::Branch => DiskFormat::Branch,
        },
        serial: disk.serial.clone(),
        limits: limits(disk.limits),
    })
}

/// What is to change of one that a machine has.
pub(crate) fn change(change: api_types::DiskChange) -> DiskChange {
    let api_types::DiskChange {
        size_bytes,
        bytes_per_second,
        operations_per_second,
        read_bytes_per_second,
        read_operations_per_second,
        write_bytes_per_second,
        write_operations_per_second,
    } = change;
    DiskChange {
        bytes: size_bytes,
        limits: DiskLimitsChange {
            bytes_per_second,
            operations_per_second,
            read_bytes_per_second,
            read_operations_per_second,
            write_bytes_per_second,
            write_operations_per_second,
        },
    }
}

fn limits(limits: api_types::DiskLimits) -> DiskLimits {
    let api_types::DiskLimits {
        bytes_per_second,
        operations_per_second,
        read_bytes_per_second,
        read_operations_per_second,
        write_bytes_per_second,
        write_operations_per_second,
    } = limits;
    DiskLimits {
        bytes_per_second,
        operations_per_second,
        read_bytes_per_second,
        read_operations_per_second,
        write_bytes_per_second,
        write_operations_per_second,
    }
}
