//! `POST /vms/<pid>/runs`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::GuestClock;

/// Asks for a machine to run from where it was forked or restored, over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunsRequest {
    /// How many runs there are to be.
    #[schema(minimum = 1)]
    pub runs: u32,
    /// The first one's number, by which the guest knows it: 1, unless told otherwise. The others count up from there.
    #[schema(minimum = 1)]
    pub first: Option<u32>,
    /// How long one may take, in milliseconds; without, as long as it likes.
    #[schema(minimum = 1)]
    pub run_limit_ms: Option<u64>,
    /// What the machine's clocks have done since it was saved, at the beginning of each.
    #[serde(default)]
    pub clock: GuestClock,
}

/// How runs have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RunsEnd {
    /// All of them were done with result zero. The machine is what it was, and held.
    AllDone,
    /// One had another result. The machine is held where its guest said so.
    Result,
    /// One took longer than it might. The machine is held where it was.
    Limit,
    /// Another request ended them.
    Interrupted,
    /// The guest switched itself off or reset itself, had a triple fault, or could not go on; the machine has ended.
    Ended,
}

/// Runs that have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Runs {
    /// How many were done with result zero.
    pub done: u32,
    /// How they ended.
    pub ended: RunsEnd,
    /// The number of the last one that began.
    pub last: u32,
    /// What its guest said that came of it, if it did.
    pub result: Option<u32>,
    /// Pages of guest memory, of 4 KiB, that were undone after the runs that were done with result zero.
    pub dirty_pages: u64,
    /// How long that took, all in all, in microseconds.
    pub reset_us: u64,
    /// How long everything took, in microseconds.
    pub total_us: u64,
}
