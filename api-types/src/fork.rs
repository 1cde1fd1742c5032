//! `POST /fork`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{CreateAnswer, GuestClock, Net};

/// Asks for one machine to go on as many: one that runs, by `pid`, which goes on itself; or a saved one, by two paths.
///
/// Each of them has a generation, MAC addresses, a vsock context ID and socket, and layers of the branching disks of its own.
/// Paths are absolute or relative to the server's tree, and lie in it.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[schema(example = json!({"pid": 4711, "count": 20, "nets": [{"tap_device": "vmtap{n}"}]}))]
pub struct ForkRequest {
    /// The VMM's process id of a machine that runs or is held.
    pub pid: Option<u32>,
    /// The state file, if no `pid` is given.
    pub cpu_snapshot_path: Option<String>,
    /// The memory file, if no `pid` is given.
    pub memory_snapshot_path: Option<String>,
    /// How many machines there are to be: 1 unless told otherwise.
    pub count: Option<u32>,
    /// The network devices, as many as the machine has, and what they have in its forks. `{n}` in a name stands for the fork's
    /// number, from 0; without a MAC address, each has one of its own.
    pub nets: Option<Vec<Net>>,
    /// What the clocks have done: of the forks since the instant that they are of, and of a machine that goes on while it stood
    /// still.
    #[serde(default)]
    pub clock: GuestClock,
}

/// Answer to `POST /fork`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForkAnswer {
    /// The machines, by their numbers. All of them run.
    pub forks: Vec<CreateAnswer>,
}
