//! What goes over HTTP: requests, answers, errors.
//!
//! Fields that a request has and these types do not know are accepted and ignored: clients in the
//! field send more than the contract asks for.

#![forbid(unsafe_code)]

mod clock;
mod create;
mod error;
mod snapshot;
mod vm;

pub use clock::GuestClock;
pub use create::{CpuModel, CreateAnswer, CreateRequest, Disk, DiskFormat, GuestConfig, Net};
pub use error::{ErrorBody, ErrorCode};
pub use snapshot::{SNAPSHOT_TAKEN, SnapshotRequest};
pub use vm::{AttachedNet, DeleteAnswer, EndReason, Ended, Health, Metric, Vm, VmOrigin, VmState};
