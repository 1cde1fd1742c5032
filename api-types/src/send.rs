//! `POST /vms/<pid>/send`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{GuestClock, MemoryCopy};

/// Asks for a machine to be saved on another host, on which `fermata receive` listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SendRequest {
    /// Where that listens: one of the addresses that the server was started with (`--peer`), like `host:7070`.
    pub peer: String,
    /// The snapshot's name there, which nothing there has yet.
    pub name: String,
    /// Whether the machine goes on; else it ends once it is saved.
    pub resume: bool,
    /// If it goes on: what its clocks have done meanwhile.
    #[serde(default)]
    pub clock: GuestClock,
    /// How its memory is saved, as of `POST /snapshot`.
    pub copy: Option<MemoryCopy>,
    /// The most bytes of the machine that are read in a second, as of `POST /snapshot`.
    #[schema(minimum = 1)]
    pub bytes_per_second: Option<u64>,
    /// The most milliseconds for which the guest may stand still for its memory to be read, as of `POST /snapshot`.
    #[schema(minimum = 1)]
    pub downtime_limit_ms: Option<u64>,
}

/// A snapshot that is complete and durable on another host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Sent {
    /// Its name there.
    pub name: String,
    /// Its id in the store there, in hexadecimal, if it went into one.
    pub id: Option<String>,
    /// Bytes by which that store has grown.
    pub new_bytes: u64,
    /// How long the guest stood still, in microseconds.
    pub downtime_us: u64,
    /// From the request until the snapshot was durable, in microseconds.
    pub total_us: u64,
}
