//! A guest's clocks across a hold.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a guest's clocks do while it is held or saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum GuestClock {
    /// They stand still: the guest sees no time pass.
    #[default]
    StandStill,
    /// They follow the host's: the guest sees the time pass all at once.
    Follow,
}
