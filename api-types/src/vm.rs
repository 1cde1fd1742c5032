//! What `GET` and `DELETE` under `/vms`, and `GET /healthz`, answer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Disk, DiskStatus};

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// The VMM's process id.
    pub pid: u32,
    /// The port of its control service.
    pub port: u16,
    /// What it is doing.
    pub state: VmState,
    /// Number of vCPUs; missing when it ended before it could be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Guest memory in MiB; missing when it ended before it could be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// Milliseconds since the VMM began; missing when it does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uptime_ms: Option<u64>,
    /// The release of fermata that it runs; missing when it does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    /// A page of its memory that is to come from the store and cannot be had, and why; missing when there is none. If the guest
    /// waits for it, the machine is paused, and to resume it is to try again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost_memory: Option<String>,
    /// Its disks as they are now, in the order in which it was given them, by which they are numbered from 0; missing when it does
    /// not answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskStatus>>,
    /// Where it came from.
    pub origin: VmOrigin,
    /// The file that its console is written to; missing when that is a terminal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console: Option<String>,
    /// The file that the VMM's own messages are written to.
    pub log: String,
    /// What was asked for and is not done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// How it ended, if it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
}

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// The guest runs.
    Running,
    /// The guest is held.
    Paused,
    /// A snapshot is being written.
    Saving,
    /// It has ended, or is about to.
    Ended,
    /// The process lives but does not answer.
    Unresponsive,
}

/// Where a machine came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum VmOrigin {
    /// A kernel was booted.
    Boot {
        /// The kernel.
        kernel_path: String,
        /// The initial RAM disk.
        initrd_path: Option<String>,
        /// The kernel's command line.
        cmdline: String,
        /// The disks, as it was booted with them.
        disks: Vec<Disk>,
        /// The network devices.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        nets: Vec<AttachedNet>,
    },
    /// A snapshot was restored.
    Restore {
        /// The state file.
        cpu_snapshot_path: String,
        /// The memory file.
        memory_snapshot_path: String,
    },
    /// A snapshot in a store was restored, by its name.
    Stored {
        /// The snapshot's name, tag or id.
        snapshot: String,
        /// The store's directory.
        store: String,
    },
    /// A machine that ran was forked.
    Fork {
        /// The process id of its VMM.
        of: u32,
    },
}

/// A network device, by what it was attached to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AttachedNet {
    /// The TAP device, if it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap_device: Option<String>,
    /// The path of the socket, if it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_path: Option<String>,
    /// The MAC address that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ended {
    /// In a word.
    pub reason: EndReason,
    /// The exit code of its process, if it exited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<i32>,
    /// The signal that killed its process, if one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// When, in milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
}

/// How a machine ended, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reboot,
    /// The guest had a triple fault.
    TripleFault,
    /// It was saved and was not to go on.
    Halted,
    /// A client stopped it.
    Stopped,
    /// The VMM failed; its log says why.
    Failed,
    /// A signal ended the VMM.
    Killed,
}

/// Answer to `DELETE /vms/<pid>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeleteAnswer {
    /// The process that has ended.
    pub pid: u32,
    /// Whether it had to be killed because it did not stop when asked.
    pub killed: bool,
}

/// A counter or a gauge of a machine, named as Prometheus would.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Metric {
    /// Its name.
    pub name: String,
    /// Its labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Its value, in the unit its name ends with.
    pub value: u64,
}

/// Answer to `GET /healthz`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// The server's release.
    pub release: String,
    /// How many machines live on this host under this user.
    pub vms: usize,
}
