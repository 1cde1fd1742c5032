//! The one service that a VMM offers.

use std::num::{NonZeroU32, NonZeroU64};

use serde::{Deserialize, Serialize};

use crate::{BalloonChange, BalloonStatus, Destination, DiskChange, DiskStatus};

/// What a VMM does on request. The definition serves both sides.
#[tarpc::service]
pub trait Vmm {
    /// What the machine is and what it is doing.
    async fn status() -> Status;
    /// Holds the guest; a machine that is held already stays so.
    async fn pause() -> Result<(), Failure>;
    /// Lets the guest go on; a machine that runs already goes on.
    async fn resume(clock: GuestClock) -> Result<(), Failure>;
    /// Has the machine be what it was when it was forked or restored: it undoes what it has done since. If it ran it goes on from there,
    /// else it stays held.
    async fn reset(clock: GuestClock) -> Result<ResetReport, Failure>;
    /// Has the machine be what it was, run, and be reset again each time that its guest says by the run port that it is done with result
    /// zero, so many times. Answers when that has ended, one way or another; any other request that has to do with what the machine does
    /// ends it, and is carried out on the machine as it runs. Else the machine is held then.
    async fn runs(request: RunsRequest) -> Result<RunsReport, Failure>;
    /// Saves the machine. Answers when the snapshot is durable.
    async fn snapshot(request: SnapshotRequest) -> Result<SnapshotReport, Failure>;
    /// Has the snapshot that is being taken not be taken, which who asked for it is told. The machine runs, or stays held if it was and
    /// has not been let go on by then. Refused when something of the snapshot may be seen already: then it is kept.
    async fn cancel_snapshot() -> Result<(), Failure>;
    /// Changes the disk of this number, from 0 in the order in which the machine was given them, and says what it is then: all that
    /// is asked for, or nothing. Disks only grow.
    async fn change_disk(disk: u32, change: DiskChange) -> Result<DiskStatus, Failure>;
    /// Ends the machine and its process, at once and without asking the guest.
    async fn stop() -> Result<(), Failure>;
    /// Changes the machine's balloon, if anything is to change, and says how it stands with it; with statistics that the guest
    /// is asked for now, if it runs and answers within a second.
    async fn balloon(change: BalloonChange) -> Result<BalloonStatus, Failure>;
    /// Counters since the process began.
    async fn metrics() -> Vec<Metric>;
}

/// What a machine is doing, as far as a client needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// The guest runs.
    Running,
    /// Every vCPU is held and the devices are quiet.
    Paused,
    /// A snapshot is being written.
    Saving,
    /// The guest or a client has ended it; the process is about to exit.
    Ended,
}

/// Answer of [`Vmm::status`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The VMM's process id.
    pub pid: u32,
    /// The release of fermata that it runs.
    pub release: String,
    /// What it is doing.
    pub state: MachineState,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Milliseconds since the process began.
    pub uptime_ms: u64,
    /// Its disks as they are now, in the order in which the machine was given them.
    #[serde(default)]
    pub disks: Vec<DiskStatus>,
    /// A page of its memory that is to come and cannot be had, and why. If its guest waits for it, the machine stands still;
    /// to let it go on is to try again.
    #[serde(default)]
    pub lost_memory: Option<String>,
}

/// What a guest's clocks do while it is held: from when the last of its vCPUs is stopped until it goes on, or from when it
/// was saved until it is restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestClock {
    /// They stand still: the guest sees no time pass.
    #[default]
    StandStill,
    /// They follow the host's: the guest sees the time pass all at once.
    Follow,
}

/// What happens to the machine once it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AfterSnapshot {
    /// It goes on.
    Resume(GuestClock),
    /// It goes on if it ran before, and else stays held.
    AsBefore(GuestClock),
    /// It ends, and its process with it, with [`Exit::Halted`](crate::Exit::Halted).
    Halt,
}

/// How memory is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryCopy {
    /// The guest stands still until all of it is written.
    StopAndCopy,
    /// The guest goes on at once. What it writes to is copied before it does.
    CopyOnWrite,
    /// Memory is copied while the guest runs, over and over what it wrote to meanwhile, until little is left or rounds stop
    /// shrinking. Only then it stands still; what is left is saved as by copy-on-write, or before it is let go, if it does not go on.
    PreCopy,
}

/// Argument of [`Vmm::snapshot`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRequest {
    /// Where the snapshot goes.
    pub to: Destination,
    /// What happens next.
    pub then: AfterSnapshot,
    /// How memory is saved. If it is not said: by copy-on-write where the machine goes on and its memory permits it.
    #[serde(default)]
    pub copy: Option<MemoryCopy>,
    /// The most bytes of the machine that are read in a second, if the guest goes on beside.
    #[serde(default)]
    pub bytes_per_second: Option<NonZeroU64>,
    /// How long the guest may stand still for its memory to be read, in milliseconds; else there is no snapshot, and it goes on.
    #[serde(default)]
    pub downtime_limit_ms: Option<NonZeroU64>,
}

impl SnapshotRequest {
    /// One as fast as can be, memory by the way that suits.
    #[must_use]
    pub fn new(to: Destination, then: AfterSnapshot) -> Self {
        Self {
            to,
            then,
            copy: None,
            bytes_per_second: None,
            downtime_limit_ms: None,
        }
    }
}

/// Answer of [`Vmm::snapshot`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// The snapshot's id, in hexadecimal; its state and its memory carry it.
    pub id: String,
    /// Bytes of the machine's state.
    pub state_bytes: u64,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Bytes of guest memory that were not zero.
    pub written_bytes: u64,
    /// How memory was saved.
    pub copy: MemoryCopy,
    /// How often memory was gone through before the guest stood still.
    pub rounds: u32,
    /// Bytes of guest memory that were copied before it stood still, some more than once.
    #[serde(default)]
    pub copied_bytes: u64,
    /// Bytes of guest memory that were left to be looked at while it stood still.
    pub last_round_bytes: u64,
    /// How long the guest stood still, in microseconds.
    pub downtime_us: u64,
    /// From the request until the snapshot was durable, in microseconds.
    pub total_us: u64,
    /// What it took in a store, if it went into one.
    pub stored: Option<StoredReport>,
    /// What became of it with a peer, if it was sent to one.
    #[serde(default)]
    pub sent: Option<SentReport>,
}

/// Answer of [`Vmm::reset`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetReport {
    /// Pages of guest memory, of 4 KiB, that had another content than in the snapshot, or had been given back.
    pub dirty_pages: u64,
    /// From when the VMM turned to it until the machine was reset, and ran if it was to, in microseconds.
    pub total_us: u64,
}

/// Argument of [`Vmm::runs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunsRequest {
    /// How many there are to be.
    pub runs: NonZeroU32,
    /// The first one's number, by which the guest knows it. They are counted up from there, and none may have one of more than 32 bits.
    pub first: NonZeroU32,
    /// How long one may take, in milliseconds of the host's time; without, as long as it likes.
    #[serde(default)]
    pub run_limit_ms: Option<NonZeroU64>,
    /// What the machine's clocks have done since it was saved, at the beginning of each.
    pub clock: GuestClock,
}

/// How runs have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunsEnd {
    /// All of them were done with result zero. The machine is reset, and held.
    AllDone,
    /// One had another result. The machine is held where the guest said so.
    Result,
    /// One took longer than it might. The machine is held where it was.
    Limit,
    /// Another request ended them, or nobody waited for them any more, and then the machine is held.
    Interrupted,
    /// The guest switched itself off or reset itself, had a triple fault, or could not go on; the machine ends.
    Ended,
}

/// Answer of [`Vmm::runs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunsReport {
    /// How many were done with result zero.
    pub done: u32,
    /// How they ended.
    pub ended: RunsEnd,
    /// The number of the last one that began.
    pub last: NonZeroU32,
    /// What its guest said that came of it, if it did.
    pub result: Option<u32>,
    /// Pages of guest memory, of 4 KiB, that were undone after the runs that were done with result zero.
    pub dirty_pages: u64,
    /// How long that took, all in all, in microseconds.
    pub reset_us: u64,
    /// From when the VMM turned to the request until they ended, in microseconds.
    pub total_us: u64,
}

/// What a snapshot took in a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredReport {
    /// Its name there.
    pub name: String,
    /// Its id there, in hexadecimal.
    pub id: String,
    /// Bytes by which the store has grown: of chunks that it did not hold, and of the snapshot itself.
    pub new_bytes: u64,
}

/// What became of a snapshot that a peer keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SentReport {
    /// Its name there.
    pub name: String,
    /// Its id in the peer's store, in hexadecimal, if it is in one.
    pub id: Option<String>,
    /// Bytes by which that has grown.
    pub new_bytes: u64,
}

/// A counter or a gauge, named as Prometheus would.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metric {
    /// Like `fermata_vcpu_exits_total`.
    pub name: String,
    /// One label, like `("reason", "io")`.
    pub label: Option<(String, String)>,
    /// Its value, in the unit its name ends with.
    pub value: u64,
}

/// The gauge of how many bytes of memory the snapshot in work has saved.
pub const SNAPSHOT_BYTES_DONE: &str = "fermata_snapshot_done_bytes";
/// The gauge of how many there are to save.
pub const SNAPSHOT_BYTES_TOTAL: &str = "fermata_snapshot_total_bytes";

/// The gauge of how many bytes of a disk have come that comes while its machine runs, by the disk's number.
pub const DISK_BYTES_COME: &str = "fermata_disk_arrived_bytes";
/// The gauge of how many there were to come.
pub const DISK_BYTES_TO_COME: &str = "fermata_disk_arriving_total_bytes";

/// The gauge of how many such disks are not all here, or not durable.
pub const DISKS_TO_COME: &str = "fermata_disks_to_come";

/// Whose fault a failure is and what may be done; a front end makes a status code of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The request cannot be meant: two equal paths, no kernel.
    BadRequest,
    /// Something that the request names is not there.
    NotFound,
    /// The machine is not in a state in which this can be done.
    WrongState,
    /// A file is not a snapshot, is damaged, or is for another machine or CPU.
    NotASnapshot,
    /// The file system is full.
    NoSpace,
    /// The host refused: permissions, KVM, limits.
    Host,
    /// It is fermata's fault.
    Internal,
}

/// Why a request failed, in a sentence that says what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Whose fault it is.
    pub kind: FailureKind,
    /// The sentence.
    pub message: String,
}
