//! How a VMM process is started: a [`LaunchSpec`] in JSON on its standard input, then end of file;
//! one line of JSON back on its standard output, a [`Launched`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{Failure, GuestClock, NetChange, NetConfig, Secret, Source};

/// Everything a VMM process needs to know.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchSpec {
    /// What every client of this VMM has to show.
    pub secret: Secret,
    /// Where the machine comes from.
    pub origin: Origin,
    /// Where its serial console goes.
    pub console: Console,
    /// The directory in which it registers itself while it lives; see [`Registry`](crate::Registry).
    pub registry: PathBuf,
    /// Whether it stays held until a client lets it go.
    #[serde(default)]
    pub paused: bool,
    /// What the clocks of a restored machine have done since it was saved.
    #[serde(default)]
    pub clock: GuestClock,
    /// What a restored machine may have, if not everything that its state file asks for.
    #[serde(default)]
    pub confinement: Option<Confinement>,
    /// What the network devices of a restored machine have instead of what they were saved with, in their
    /// order; those behind the last have nothing else.
    #[serde(default)]
    pub net_changes: Vec<NetChange>,
    /// What the vsock device of a restored machine has instead of what it was saved with.
    #[serde(default)]
    pub vsock_change: VsockChange,
}

/// What a restored machine may have: its state file may come from anybody.
///
/// Its network devices are attached to nothing that only the state file names: each needs its
/// [`NetChange`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confinement {
    /// Its disks are these files, or lie below these directories, as does the socket of its vsock device; absolute
    /// and without links.
    pub disks: Vec<PathBuf>,
    /// It has no more vCPUs.
    pub vcpus: u32,
    /// It has no more memory, in MiB.
    pub memory_mib: u64,
}

/// Where a machine comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Origin {
    /// A kernel is booted.
    Boot(MachineConfig),
    /// A snapshot goes on.
    Restore(Source),
}

/// What a machine's CPUs are: what runs on one host of a level runs on any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuModel {
    /// All that the host has.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// Level 2 of the x86-64 psABI: SSE4.2.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// Level 3: AVX2.
    #[serde(rename = "x86-64-v3")]
    V3,
}

/// A machine that is to be booted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to 32.
    pub vcpus: u32,
    /// Guest memory in MiB, at least 64.
    pub memory_mib: u64,
    /// What its CPUs are.
    #[serde(default)]
    pub cpu: CpuModel,
    /// A bzImage or an ELF vmlinux; absolute.
    pub kernel: PathBuf,
    /// The initial RAM disk; absolute.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Disks, in the order of their names in the guest.
    pub disks: Vec<DiskConfig>,
    /// Network devices, in the order of their names in the guest.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// Streams between guest and host.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
}

/// A vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context ID, at least 3.
    pub cid: u32,
    /// The Unix socket on which the host's side says `CONNECT <port>`; absolute. What the guest connects to port N
    /// goes to the socket of this name with `_N` after it.
    pub path: PathBuf,
}

/// What a restored vsock device has instead of what it was saved with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockChange {
    /// The guest's context ID.
    #[serde(default)]
    pub cid: Option<u32>,
    /// The Unix socket; absolute.
    #[serde(default)]
    pub path: Option<PathBuf>,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The image, or the head of a disk that branches; absolute.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// What the file is. It is never guessed: a guest can write anything into a raw image.
    #[serde(default)]
    pub format: DiskFormat,
    /// What the guest sees as its serial number, of at most 20 bytes; by default the file's name.
    #[serde(default)]
    pub serial: Option<String>,
}

/// What a disk's file is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// The disk's bytes and nothing else.
    #[default]
    Raw,
    /// The topmost layer of a disk that branches (`docs/disk-format.md`).
    Branch,
}

/// Where a machine's serial console goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Console {
    /// Output is appended to this file, which is kept below a bound; there is no input.
    File(PathBuf),
    /// The terminal on standard error's file descriptor, for input and output.
    Terminal,
}

/// The line with which a VMM answers its [`LaunchSpec`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Launched {
    /// The guest runs and the control service listens.
    Ready {
        /// Loopback port of the control service.
        port: u16,
    },
    /// It did not come to that; the process exits with [`Exit::Failed`](crate::Exit::Failed).
    Failed(Failure),
}
