//! `POST /create`.

use std::{fmt, num::NonZeroU64};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::{BalloonOptions, CpuModel, GuestClock};

/// Asks for a machine: booted afresh, or restored.
///
/// Paths are absolute or relative to the server's tree, and lie in it. Which of them matter depends on
/// `resume`; the others may be empty or missing.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[schema(example = json!({
    "cpu_snapshot_path": "", "memory_snapshot_path": "", "kernel_path": "/srv/fermata/vmlinuz", "resume": false
}))]
pub struct CreateRequest {
    /// The state file to restore from, when `resume` is true.
    pub cpu_snapshot_path: Option<String>,
    /// The memory file to restore from, when `resume` is true.
    pub memory_snapshot_path: Option<String>,
    /// The bzImage or ELF vmlinux to boot, when `resume` is false.
    pub kernel_path: Option<String>,
    /// Whether to restore a snapshot rather than boot a kernel.
    pub resume: bool,
    /// The TAP device that the machine's network device is attached to; it is there, and no other machine's.
    /// Without one, a machine is booted without a network device. A restored machine that has one needs one
    /// here: what its state file names is not believed.
    pub tap_device: Option<String>,
    /// Accepted, but not used by this release: the machine's `notes` say so.
    pub config: Option<GuestConfig>,
    /// Number of vCPUs to boot with, 1 to 32; the server has a default.
    pub vcpus: Option<u32>,
    /// Guest memory to boot with, in MiB, at least 64; the server has a default.
    pub memory_mib: Option<u64>,
    /// Whether its memory is made of huge pages that the host has reserved, booted or restored.
    #[serde(default)]
    pub hugepages: bool,
    /// Whether a restored machine runs at once, and its memory, and what is not here of its disks, comes from the server's store when it
    /// is touched. The memory file must be a reference to the store.
    #[serde(default)]
    pub on_demand: bool,
    /// What is done with the pages that such a machine touches in its first second: `bring` if nothing is said.
    pub working_set: Option<WorkingSet>,
    /// What its CPUs are: a level, or a template that changes what guests see of one; `host` if nothing is said. A machine of a
    /// level can be restored on any host of that level.
    pub cpu: Option<CpuModel>,
    /// The initial RAM disk to boot with; an empty string for none. The server has a default.
    pub initrd_path: Option<String>,
    /// The kernel's command line; the server has a default.
    pub cmdline: Option<String>,
    /// Disks, in the order of their names in the guest; the server has a default.
    pub disks: Option<Vec<Disk>>,
    /// Network devices, in the order of their names in the guest; instead of `tap_device`. Of a restored machine
    /// these are the ones that it has, and what they have now.
    pub nets: Option<Vec<Net>>,
    /// A balloon to boot with: memory that the guest gives back. A restored machine has one if it was saved with one.
    pub balloon: Option<BalloonOptions>,
    /// The device of the console of a machine to boot: `serial` if nothing is said. With `virtio` it has a virtio console beside the
    /// serial port, and both write to the same file; its kernel uses it if the command line has `console=hvc0`.
    pub console_device: Option<ConsoleDevice>,
    /// What the clocks of a restored machine have done since it was saved.
    #[serde(default)]
    pub clock: GuestClock,
}

/// The device of a machine's console.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ConsoleDevice {
    /// The serial port, `ttyS0`. Each byte costs the guest an exit.
    #[default]
    Serial,
    /// A virtio console, `hvc0`, beside the serial port.
    Virtio,
}

/// What is done with a snapshot's working set, the pages that its machine touches in its first second, which is kept beside it in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WorkingSet {
    /// It comes before the rest of memory, and is recorded if it is not known.
    Bring,
    /// It is recorded anew.
    Record,
    /// Neither.
    Ignore,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    /// The image, or the topmost layer of a disk that branches.
    pub path: String,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
    /// What the file is. It is never guessed, as a guest can write anything into a raw image.
    #[serde(default)]
    pub format: DiskFormat,
    /// What the guest sees as the disk's serial number, of at most 20 bytes; by default the file's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// The most that it may do.
    #[serde(flatten)]
    pub limits: DiskLimits,
}

/// The most that a disk may do in a second: numbers above 0, and no limit if nothing is said. Bytes are those of reads and
/// writes; whatever is asked of the disk is an operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskLimits {
    /// Bytes that are read and written.
    #[schema(value_type = Option<u64>, minimum = 1)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<NonZeroU64>,
    /// Operations of all kinds.
    #[schema(value_type = Option<u64>, minimum = 1)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operations_per_second: Option<NonZeroU64>,
    /// Bytes that are read.
    #[schema(value_type = Option<u64>, minimum = 1)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_bytes_per_second: Option<NonZeroU64>,
    /// Reads.
    #[schema(value_type = Option<u64>, minimum = 1)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_operations_per_second: Option<NonZeroU64>,
    /// Bytes that are written.
    #[schema(value_type = Option<u64>, minimum = 1)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_bytes_per_second: Option<NonZeroU64>,
    /// Writes, flushes, discards and zeroes.
    #[schema(value_type = Option<u64>, minimum = 1)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_operations_per_second: Option<NonZeroU64>,
}

/// What a disk's file is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// The disk's bytes and nothing else.
    #[default]
    Raw,
    /// A layer of a disk that branches, as `fermata disk create` makes one. A machine that is restored from a snapshot goes on in
    /// a layer of its own.
    Branch,
}

/// A network device on a TAP device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Net {
    /// The TAP device.
    pub tap_device: String,
    /// Its MAC address, like `02:00:5e:10:00:01`. Without one, a booted machine has one that follows from the host
    /// and the TAP device, and a restored one has what it was saved with. The guest of a restored machine
    /// learns of another when its driver is bound anew.
    pub mac: Option<String>,
}

/// Settings for the guest, as clients in the field send them: `username`, `password`, `id`.
// They hold passwords, so that only the names of the fields are shown when this is debugged.
#[derive(Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = Object, example = json!({"username": "student", "password": "…", "id": 10}))]
pub struct GuestConfig(Map<String, Value>);

impl fmt::Debug for GuestConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GuestConfig ")?;
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Answer to `POST /create`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreateAnswer {
    /// The VMM's process id.
    pub pid: u32,
    /// The port of its control service: the `rpc_port` of `POST /snapshot`.
    pub port: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_in_the_field_send_is_understood() {
        let request: CreateRequest = serde_json::from_str(
            r#"{"cpu_snapshot_path": "", "memory_snapshot_path": "", "kernel_path": "/k",
                "resume": false, "tap_device": "vmtap100", "course": 7,
                "config": {"username": "u", "password": "hunter2", "id": 10}}"#,
        )
        .unwrap();
        assert_eq!(request.kernel_path.as_deref(), Some("/k"));
        assert_eq!(request.tap_device.as_deref(), Some("vmtap100"));
        let shown = format!("{request:?}");
        assert!(
            shown.contains("password") && !shown.contains("hunter2"),
            "{shown}"
        );
    }

    #[test]
    fn irrelevant_paths_may_be_missing_but_not_resume() {
        let restore = r#"{"cpu_snapshot_path": "s", "memory_snapshot_path": "m", "resume": true}"#;
        assert!(
            serde_json::from_str::<CreateRequest>(restore)
                .unwrap()
                .resume
        );
        assert!(serde_json::from_str::<CreateRequest>(r#"{"kernel_path": "k"}"#).is_err());
    }
}
