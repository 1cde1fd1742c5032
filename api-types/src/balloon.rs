//! `GET` and `PATCH /vms/<pid>/balloon`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A balloon to boot a machine with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct BalloonOptions {
    /// Memory that is to be in it, in MiB: the guest does without.
    pub target_mib: u64,
    /// Whether the guest may take some back when it has no other left.
    pub deflate_on_oom: bool,
    /// Whether the guest reports what it has no use for at the moment.
    pub free_page_reporting: bool,
    /// Seconds between two times that the guest is asked for statistics; 0 if it is asked on demand only.
    pub statistics_interval_s: u32,
}

/// What is to change of a balloon; what is left out stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"target_mib": 128}))]
pub struct BalloonChange {
    /// Memory that is to be in it, in MiB. The guest may take its time, or not find so much.
    pub target_mib: Option<u64>,
    /// Seconds between two times that the guest is asked for statistics; 0 for on demand only.
    pub statistics_interval_s: Option<u32>,
}

/// How it stands with a balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Balloon {
    /// Whether the guest has a driver for it at work.
    pub driver: bool,
    /// Memory that is to be in it, in MiB.
    pub target_mib: u64,
    /// Memory that is in it, in bytes, as the guest says.
    pub actual_bytes: u64,
    /// Seconds between two times that the guest is asked for statistics; 0 if it is asked on demand only.
    pub statistics_interval_s: u32,
    /// What the guest has told of its memory; missing until it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub statistics: Option<BalloonStatistics>,
}

/// What a guest has told of its memory. A guest that runs is asked anew; one that does not answer within a second is shown as it
/// was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BalloonStatistics {
    /// How long ago, in milliseconds.
    pub age_ms: u64,
    /// Values by name, as far as the guest tells them: `free_bytes`, `available_bytes`, `total_bytes`, `cache_bytes`,
    /// `swapped_in_bytes`, `swapped_out_bytes`, and numbers of events: `major_faults`, `minor_faults`, `huge_page_allocations`,
    /// `huge_page_failures`, `oom_kills`.
    pub values: BTreeMap<String, u64>,
}
