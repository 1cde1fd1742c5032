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
}
