//! Memory that cannot be had.

use std::io;

use crate::error::in_full;

/// A page of a machine's memory that the store does not give.
#[derive(Clone, Debug, thiserror::Error)]
#[error(
    "the guest's memory at {gpa:#x} (offset {offset:#x} of its image) cannot be had from snapshot {name}: {cause}; put that right (`fermata store fsck`) and let the machine go on"
)]
pub struct Lost {
    /// The snapshot.
    pub name: String,
    /// Guest-physical address of the page.
    pub gpa: u64,
    /// Its offset in the memory image.
    pub offset: u64,
    /// What the store, or the host, said.
    pub cause: String,
}

/// Why a page could not be brought.
#[derive(Debug, thiserror::Error)]
pub(super) enum Cause {
    #[error("{}", in_full(.0))]
    Store(#[from] dedup::Error),
    #[error("the host refuses memory: {0}")]
    Host(#[from] io::Error),
    #[error("the machine ends")]
    Stopped,
    #[error("a thread of the machine's panicked; please report this")]
    Panic,
}
