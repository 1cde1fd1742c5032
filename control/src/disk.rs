//! What is changed of a machine's disk while its guest uses it.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use crate::DiskLimits;

/// What is to change of a disk; what is left out stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskChange {
    /// Bytes that it is to have, which are not less than it has.
    pub bytes: Option<u64>,
    /// The most that it may do.
    pub limits: DiskLimitsChange,
}

/// Other limits in place of a disk's [`DiskLimits`]: 0 for none, and those that are left out stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskLimitsChange {
    /// Bytes that are read and written.
    pub bytes_per_second: Option<u64>,
    /// Operations of all kinds.
    pub operations_per_second: Option<u64>,
    /// Bytes that are read.
    pub read_bytes_per_second: Option<u64>,
    /// Reads.
    pub read_operations_per_second: Option<u64>,
    /// Bytes that are written.
    pub write_bytes_per_second: Option<u64>,
    /// Writes, flushes, discards and zeroes.
    pub write_operations_per_second: Option<u64>,
}

/// A disk as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its bytes.
    pub bytes: u64,
    /// The most that it may do.
    pub limits: DiskLimits,
}

impl DiskLimitsChange {
    /// What becomes of `limits`.
    #[must_use]
    pub fn of(self, limits: DiskLimits) -> DiskLimits {
        let Self {
            bytes_per_second,
            operations_per_second,
            read_bytes_per_second,
            read_operations_per_second,
            write_bytes_per_second,
            write_operations_per_second,
        } = self;
        let or = |asked: Option<u64>, now| asked.map_or(now, NonZeroU64::new);
        DiskLimits {
            bytes_per_second: or(bytes_per_second, limits.bytes_per_second),
            operations_per_second: or(operations_per_second, limits.operations_per_second),
            read_bytes_per_second: or(read_bytes_per_second, limits.read_bytes_per_second),
            read_operations_per_second: or(
                read_operations_per_second,
                limits.read_operations_per_second,
            ),
            write_bytes_per_second: or(write_bytes_per_second, limits.write_bytes_per_second),
            write_operations_per_second: or(
                write_operations_per_second,
                limits.write_operations_per_second,
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_is_replaced_zero_is_no_limit_and_the_rest_stays() {
        let number = NonZeroU64::new;
        let limits = DiskLimits {
            bytes_per_second: number(1),
            operations_per_second: number(2),
            read_bytes_per_second: number(3),
            read_operations_per_second: number(4),
            write_bytes_per_second: number(5),
            write_operations_per_second: None,
        };
        assert_eq!(DiskLimitsChange::default().of(limits), limits);
        let change = DiskLimitsChange {
            bytes_per_second: Some(0),
            read_operations_per_second: Some(40),
            write_operations_per_second: Some(60),
            ..DiskLimitsChange::default()
        };
        let expected = DiskLimits {
            bytes_per_second: None,
            read_operations_per_second: number(40),
            write_operations_per_second: number(60),
            ..limits
        };
        assert_eq!(change.of(limits), expected);
        let others = DiskLimitsChange {
            operations_per_second: Some(20),
            read_bytes_per_second: Some(0),
            write_bytes_per_second: Some(50),
            ..DiskLimitsChange::default()
        };
        let expected = DiskLimits {
            operations_per_second: number(20),
            read_bytes_per_second: None,
            write_bytes_per_second: number(50),
            ..limits
        };
        assert_eq!(others.of(limits), expected);
    }
}
