//! `POST /snapshot`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::GuestClock;

/// The whole answer to a `POST /snapshot` that succeeded, as a JSON string.
pub const SNAPSHOT_TAKEN: &str = "Snapshot Taken Successfully";

/// Asks for a machine to be saved into two files.
///
/// Paths are absolute or relative to the server's tree, and lie in it. Their directories exist already.
/// Files that are there are replaced when the new ones are whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotRequest {
    /// Where the state file goes.
    pub cpu_snapshot_path: String,
    /// Where the memory file goes.
    pub memory_snapshot_path: String,
    /// The `port` that `POST /create` answered.
    pub rpc_port: u16,
    /// Whether the machine goes on; else it ends once it is saved.
    pub resume: bool,
    /// If it goes on: what its clocks have done meanwhile.
    #[serde(default)]
    pub clock: GuestClock,
    /// How its memory is saved. If it is not said: by copy-on-write where the machine goes on and its memory permits it.
    pub copy: Option<MemoryCopy>,
    /// The most bytes of the machine that are read in a second, so that its guest and others feel less of it. It takes a machine
    /// that goes on, saved by copy-on-write, or one saved by pre-copy; what its guest writes to before it is read takes the host's memory until the snapshot is complete.
    #[schema(minimum = 1)]
    pub bytes_per_second: Option<u64>,
    /// The most milliseconds for which the guest may stand still for its memory to be read. If that would take longer, there is no
    /// snapshot (409), and the guest goes on.
    #[schema(minimum = 1)]
    pub downtime_limit_ms: Option<u64>,
}

/// How memory is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryCopy {
    /// The guest stands still until all of it is written.
    StopAndCopy,
    /// The guest goes on at once. What it writes to is copied before it does. It takes a machine that goes on, and whose memory
    /// is neither mapped from a memory file nor made of huge pages that were reserved.
    CopyOnWrite,
    /// Memory is copied while the guest runs, over and over what it wrote to meanwhile, until little is left or rounds stop
    /// shrinking. Only then it stands still, for that. It takes memory as above, and also a machine that ends.
    PreCopy,
}
