//! A machine's balloon: memory that its guest gives back.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A balloon that a machine is booted with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// Memory that is to be in it, in MiB: the guest does without.
    #[serde(default)]
    pub target_mib: u64,
    /// Whether the guest may take some back when it has no other left.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Whether the guest reports what it has no use for at the moment.
    #[serde(default)]
    pub free_page_reporting: bool,
    /// Seconds between two times that the guest is asked for statistics; 0 if it is asked on demand only.
    #[serde(default)]
    pub statistics_interval_s: u32,
}

/// What is to change of a balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonChange {
    /// Memory that is to be in it, in MiB.
    #[serde(default)]
    pub target_mib: Option<u64>,
    /// Seconds between two times that the guest is asked for statistics; 0 for on demand only.
    #[serde(default)]
    pub statistics_interval_s: Option<u32>,
}

/// How it stands with a balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatus {
    /// Whether the guest has a driver for it at work.
    pub driver: bool,
    /// Memory that is to be in it, in MiB.
    pub target_mib: u64,
    /// Memory that is in it, in bytes, as the guest says.
    pub actual_bytes: u64,
    /// Seconds between two times that the guest is asked for statistics; 0 if it is asked on demand only.
    pub statistics_interval_s: u32,
    /// What the guest has last told of its memory.
    pub statistics: Option<BalloonStatistics>,
}

/// What a guest has told of its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatistics {
    /// How long ago, in milliseconds.
    pub age_ms: u64,
    /// Values by name, like `free_bytes`.
    pub values: BTreeMap<String, u64>,
}
