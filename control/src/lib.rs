//! How a VMM process is started, found, and spoken to.
//!
//! One definition of the [tarpc](https://docs.rs/tarpc) service, used by the VMM that offers it and by
//! every client.

#![forbid(unsafe_code)]

mod client;
mod exit;
mod launch;
mod net;
mod place;
mod process;
mod registry;
mod secret;
mod server;
mod service;
mod spawn;
mod stop;
mod wire;

pub use client::{Client, ClientError};
pub use exit::Exit;
pub use launch::{
    Confinement, Console, CpuModel, DiskConfig, DiskFormat, LaunchSpec, Launched, MachineConfig,
    Origin, VsockChange, VsockConfig,
};
pub use net::{MacAddress, NetAttachment, NetChange, NetConfig, NotAMac, RateLimit};
pub use place::{Destination, Source, StoreLocation};
pub use process::{ProcessHandle, ProcessId};
pub use registry::{RUN_DIR_VARIABLE, Record, Registration, Registry, RegistryError};
pub use secret::Secret;
pub use server::serve;
pub use service::{
    AfterSnapshot, Failure, FailureKind, GuestClock, MachineState, Metric, SNAPSHOT_BYTES_DONE,
    SNAPSHOT_BYTES_TOTAL, SnapshotReport, SnapshotRequest, Status, StoredReport, Vmm, VmmClient,
};
pub use spawn::{LOG_VARIABLE, Log, SpawnError, Spawned, spawn};
pub use stop::{Stopped, stop};
