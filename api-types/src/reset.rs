//! What `POST /vms/<pid>/reset` answers.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A machine that is what it was when it was forked or restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reset {
    /// Pages of guest memory, of 4 KiB, that had another content than in the snapshot, or had been given back.
    pub dirty_pages: u64,
    /// How long it took, in microseconds, from when the VMM turned to it until the guest ran again, if it had run.
    pub total_us: u64,
}
