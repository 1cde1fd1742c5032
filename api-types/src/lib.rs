//! What goes over HTTP: requests, answers, errors.
//!
//! Fields that a request has and these types do not know are accepted and ignored: clients in the
//! field send more than the contract asks for.

#![forbid(unsafe_code)]

mod balloon;
mod clock;
mod cpu;
mod create;
mod disk;
mod error;
mod fork;
mod reset;
mod runs;
mod send;
mod snapshot;
mod vm;

pub use balloon::{Balloon, BalloonChange, BalloonOptions, BalloonStatistics};
pub use clock::GuestClock;
pub use cpu::{
    Bits, Bits32, Bits64, CpuLevel, CpuModel, CpuTemplate, CpuidChange, CpuidRegister,
    InvalidTemplate, MsrChange,
};
pub use create::{
    ConsoleDevice, CreateAnswer, CreateRequest, Disk, DiskFormat, DiskLimits, GuestConfig, Net,
    WorkingSet,
};
pub use disk::{DiskChange, DiskStatus};
pub use error::{ErrorBody, ErrorCode};
pub use fork::{ForkAnswer, ForkRequest};
pub use reset::Reset;
pub use runs::{Runs, RunsEnd, RunsRequest};
pub use send::{SendRequest, Sent};
pub use snapshot::{MemoryCopy, SNAPSHOT_TAKEN, SnapshotRequest};
pub use vm::{AttachedNet, DeleteAnswer, EndReason, Ended, Health, Metric, Vm, VmOrigin, VmState};
