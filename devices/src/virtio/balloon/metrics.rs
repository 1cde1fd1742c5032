//! What a balloon counts.

use crate::{Counter, Metrics};

#[derive(Default)]
pub(super) struct BalloonMetrics {
    /// Pages that the guest has put into the balloon.
    pub(super) inflated_pages: Counter,
    /// Pages that it has taken out.
    pub(super) deflated_pages: Counter,
    /// Memory that it has reported to be free.
    pub(super) reported_bytes: Counter,
    /// Memory of either that the host has again.
    pub(super) discarded_bytes: Counter,
    /// Memory that the host did not take back.
    pub(super) discard_failures: Counter,
    /// How often the guest has told its statistics.
    pub(super) statistics: Counter,
}

impl Metrics for BalloonMetrics {
    fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("inflated_pages", self.inflated_pages.get()),
            ("deflated_pages", self.deflated_pages.get()),
            ("reported_bytes", self.reported_bytes.get()),
            ("discarded_bytes", self.discarded_bytes.get()),
            ("discard_failures", self.discard_failures.get()),
            ("statistics", self.statistics.get()),
        ]
    }
}
