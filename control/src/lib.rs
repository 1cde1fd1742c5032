//! How a VMM process is started, found, and spoken to.
//!
//! One definition of the [tarpc](https://docs.rs/tarpc) service, used by the VMM that offers it and by
//! every client.

#![forbid(unsafe_code)]

mod balloon;
mod client;
mod disk;
mod errand;
mod exit;
mod files;
mod hot_image;
mod hung_up;
mod launch;
mod net;
mod own;
mod place;
mod pool;
mod process;
mod registry;
mod save;
mod secret;
mod server;
mod service;
mod spawn;
mod started;
mod stop;
mod strangers;
mod wire;

pub use balloon::{BalloonChange, BalloonConfig, BalloonStatistics, BalloonStatus};
pub use client::{Client, ClientError};
pub use disk::{DiskChange, DiskLimitsChange, DiskStatus};
pub use errand::{Errand, receive};
pub use exit::Exit;
pub use files::allow_many_files;
pub use hot_image::{HotImage, ImageError};
pub use launch::{
    Confinement, Console, ConsoleDevice, CpuModel, CpuTemplate, CpuidChange, CpuidRegister,
    DiskConfig, DiskFormat, DiskLimits, LaunchSpec, Launched, MachineConfig, MsrChange, Origin,
    Parent, Shape, UseWorkingSet, VsockChange, VsockConfig,
};
pub use net::{MacAddress, NetAttachment, NetChange, NetConfig, NotAMac, RateLimit};
pub use own::{NotTheirOwn, of_their_own};
pub use place::{Destination, Source, StoreLocation};
pub use pool::{Pool, Prepare};
pub use process::{ProcessHandle, ProcessId};
pub use registry::{RUN_DIR_VARIABLE, Record, Registration, Registry, RegistryError, keep_console};
pub use save::saved;
pub use secret::Secret;
pub use server::serve;
pub use service::{
    AfterSnapshot, DISK_BYTES_COME, DISK_BYTES_TO_COME, DISKS_TO_COME, Failure, FailureKind,
    GuestClock, MachineState, MemoryCopy, Metric, ResetReport, RunsEnd, RunsReport, RunsRequest,
    SNAPSHOT_BYTES_DONE, SNAPSHOT_BYTES_TOTAL, SentReport, SnapshotReport, SnapshotRequest, Status,
    StoredReport, Vmm, VmmClient,
};
pub use spawn::{Log, SpawnError, Spawned, fork, spawn};
pub use started::LOG_VARIABLE;
pub use stop::{Stopped, stop};
