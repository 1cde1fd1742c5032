//! `PATCH /vms/<pid>/disks/<n>`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::DiskLimits;

/// What is to change of a disk: at least one thing. What is left out, or null, stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"size_bytes": 21474836480_u64, "write_bytes_per_second": 20000000, "operations_per_second": 0}))]
pub struct DiskChange {
    /// The bytes that it is to have; a multiple of 512, and not less than it has.
    pub size_bytes: Option<u64>,
    /// Bytes that are read and written in a second, at most; 0 for no limit.
    pub bytes_per_second: Option<u64>,
    /// Operations of all kinds; 0 for no limit.
    pub operations_per_second: Option<u64>,
    /// Bytes that are read; 0 for no limit.
    pub read_bytes_per_second: Option<u64>,
    /// Reads; 0 for no limit.
    pub read_operations_per_second: Option<u64>,
    /// Bytes that are written; 0 for no limit.
    pub write_bytes_per_second: Option<u64>,
    /// Writes, flushes, discards and zeroes; 0 for no limit.
    pub write_operations_per_second: Option<u64>,
}

/// A disk as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskStatus {
    /// Its bytes.
    pub size_bytes: u64,
    /// The most that it may do.
    #[serde(flatten)]
    pub limits: DiskLimits,
}
