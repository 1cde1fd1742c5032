//! What a VMM process is told of its machine, a [`LaunchSpec`], and what it answers: one line of JSON on its standard output, a
//! [`Launched`].

use std::{num::NonZeroU64, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    BalloonConfig, Failure, GuestClock, NetChange, NetConfig, Secret, Source, net::numbered_path,
};

/// Everything a VMM process needs to know.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchSpec {
    /// What every client of this VMM has to show.
    pub secret: Secret,
    /// Where the machine comes from.
    pub origin: Origin,
    /// Where its console goes.
    pub console: Console,
    /// The directory in which it registers itself while it lives; see [`Registry`](crate::Registry).
    pub registry: PathBuf,
    /// Whether its memory is made of huge pages that the host has reserved.
    #[serde(default)]
    pub hugepages: bool,
    /// Whether a restored machine runs at once, and its memory comes from the store when it is touched.
    #[serde(default)]
    pub on_demand: bool,
    /// What is done with the working set that is kept beside the snapshot of such a machine.
    #[serde(default)]
    pub working_set: UseWorkingSet,
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
    /// Where disks that branch are made, as the snapshot in a store has them, that are not here; absolute. A snapshot may come
    /// from anybody and does not say where files are made.
    #[serde(default)]
    pub disk_directory: Option<PathBuf>,
}

/// What is done with the working set that is kept beside a snapshot in a store: the pages that its machine touches first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UseWorkingSet {
    /// It is brought before the rest of memory. If there is none, it is recorded.
    #[default]
    Bring,
    /// It is recorded, in place of what is kept.
    Record,
    /// It is neither used nor recorded.
    Ignore,
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
    /// It goes on from a hot image, beside others.
    Fork(Parent),
}

/// Whose hot image machines begin on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Parent {
    /// A machine's that ran.
    Machine {
        /// The process id of its VMM.
        pid: u32,
    },
    /// A saved machine's.
    Saved(Source),
}

/// The size of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
}

/// What a machine's CPUs are: what runs on one host of a level runs on any.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// One of these with changes.
    #[serde(rename = "template")]
    Template(Box<CpuTemplate>),
}

/// Changes of what a guest sees of a CPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuTemplate {
    /// What is changed.
    pub base: CpuModel,
    /// Changes of CPUID.
    pub cpuid: Vec<CpuidChange>,
    /// Changes of the model-specific registers that a vCPU begins with.
    pub msrs: Vec<MsrChange>,
}

/// A change of one register of CPUID: bits that are cleared, and then bits that are set, which the host must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidChange {
    /// The leaf.
    pub leaf: u32,
    /// The sub-leaf; 0 where there are none.
    pub subleaf: u32,
    /// The register.
    pub register: CpuidRegister,
    /// Bits that are cleared.
    pub clear: u32,
    /// Bits that are set.
    pub set: u32,
}

/// A register in which CPUID answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "they are called what they are")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A change of a model-specific register: bits that are cleared, and then bits that are set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrChange {
    /// Its number.
    pub index: u32,
    /// Bits that are cleared.
    pub clear: u64,
    /// Bits that are set.
    pub set: u64,
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
    /// Memory that its guest gives back.
    #[serde(default)]
    pub balloon: Option<BalloonConfig>,
    /// The device of its console.
    #[serde(default)]
    pub console_device: ConsoleDevice,
}

/// The device of a machine's console. The serial port is there in any case, and writes to the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConsoleDevice {
    /// The serial port, `ttyS0`.
    #[default]
    Serial,
    /// A virtio console, `hvc0`.
    Virtio,
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

impl VsockChange {
    /// What the fork of this number has, from 0: `{n}` in the socket's name stands for the number.
    #[must_use]
    pub fn of_fork(&self, number: u32) -> Self {
        let path = self.path.as_deref();
        Self {
            cid: self.cid,
            path: path.map(|path| numbered_path(path, number)),
        }
    }
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
    /// The most that it may do.
    #[serde(default)]
    pub limits: DiskLimits,
}

/// The most that a disk may do in a second. Bytes are those of reads and writes; whatever is asked of the disk is an operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskLimits {
    /// Bytes that are read and written.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Operations of all kinds.
    pub operations_per_second: Option<NonZeroU64>,
    /// Bytes that are read.
    pub read_bytes_per_second: Option<NonZeroU64>,
    /// Reads.
    pub read_operations_per_second: Option<NonZeroU64>,
    /// Bytes that are written.
    pub write_bytes_per_second: Option<NonZeroU64>,
    /// Writes, flushes, discards and zeroes.
    pub write_operations_per_second: Option<NonZeroU64>,
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

/// Where a machine's console goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Console {
    /// Output is appended to this file, which is kept below a bound; there is no input.
    File(PathBuf),
    /// The terminal on standard error's file descriptor, for input and output.
    Terminal,
}

/// The line with which a VMM answers its [`Errand`](crate::Errand).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Launched {
    /// The guest runs and the control service listens.
    Ready {
        /// Loopback port of the control service.
        port: u16,
    },
    /// What is prepared waits for its machine.
    Prepared,
    /// The machine is made, and stands still until it is told to begin.
    Made,
    /// The hot image of a machine of this size is written, and the process exits with [`Exit::PowerOff`](crate::Exit::PowerOff).
    Written(Shape),
    /// It did not come to that; the process exits with [`Exit::Failed`](crate::Exit::Failed).
    Failed(Failure),
}
