//! A time that a guest reads in pieces.

use super::calendar::Field;

/// How many seconds of the host's later, counted by their changes, a guest may read the rest of a time: more than a vCPU waits for its
/// host, and so little that nobody minds a field that is read alone and is that old.
const MOST_SECONDS: i64 = 1;

/// One time, of which each field can be read once: who reads one again wants another time.
pub(super) struct Reading {
    /// The host's time when the first field was read, and the guest's, in seconds since the epoch.
    begun: i64,
    guest_seconds: i64,
    /// A bit for each field that was read.
    taken: u8,
}

impl Reading {
    /// Of what is `guest_seconds` to the guest, and `now` to the host.
    pub(super) fn begin(now: i64, guest_seconds: i64) -> Self {
        Self {
            begun: now,
            guest_seconds,
            taken: 0,
        }
    }

    /// Whether `field` can be read of it, at what is `now` to the host.
    pub(super) fn has(&self, field: Field, now: i64) -> bool {
        let is_fresh = (0..=MOST_SECONDS).contains(&now.saturating_sub(self.begun));
        is_fresh && self.taken & bit(field) == 0
    }

    /// The guest's time, of which `field` is read.
    pub(super) fn take(&mut self, field: Field) -> i64 {
        self.taken |= bit(field);
        self.guest_seconds
    }
}

/// There are eight fields.
fn bit(field: Field) -> u8 {
    1 << field as u8
}
