//! What a disk counts.

use crate::{Counter, Metrics};

#[derive(Default)]
pub(super) struct BlockMetrics {
    pub(super) reads: Counter,
    /// Reads for which the host's disk was waited for beside the loop.
    pub(super) awaited_reads: Counter,
    pub(super) writes: Counter,
    pub(super) flushes: Counter,
    pub(super) read_bytes: Counter,
    pub(super) written_bytes: Counter,
    /// How often a limit stopped the guest from reading.
    pub(super) read_throttled: Counter,
    /// How often a limit stopped the guest from writing, flushing or discarding.
    pub(super) write_throttled: Counter,
    pub(super) discards: Counter,
    pub(super) discarded_bytes: Counter,
    pub(super) write_zeroes: Counter,
    pub(super) zeroed_bytes: Counter,
    pub(super) errors: Counter,
    pub(super) unsupported: Counter,
}

impl Metrics for BlockMetrics {
    fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("reads", self.reads.get()),
            ("awaited_reads", self.awaited_reads.get()),
            ("writes", self.writes.get()),
            ("flushes", self.flushes.get()),
            ("discards", self.discards.get()),
            ("discarded_bytes", self.discarded_bytes.get()),
            ("write_zeroes", self.write_zeroes.get()),
            ("zeroed_bytes", self.zeroed_bytes.get()),
            ("read_bytes", self.read_bytes.get()),
            ("written_bytes", self.written_bytes.get()),
            ("read_throttled", self.read_throttled.get()),
            ("write_throttled", self.write_throttled.get()),
            ("errors", self.errors.get()),
            ("unsupported", self.unsupported.get()),
        ]
    }
}
