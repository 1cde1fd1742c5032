//! What a network device counts. Directions are the guest's.

use crate::{Counter, Metrics};

#[derive(Default)]
pub(super) struct NetMetrics {
    pub(super) received_packets: Counter,
    pub(super) received_bytes: Counter,
    /// Of the packets, those that one side left to be segmented and that went on as they were.
    pub(super) received_unsegmented: Counter,
    /// Frames for the guest that could not be delivered: too long for its buffers, or not as negotiated.
    pub(super) receive_drops: Counter,
    /// How often a frame had to wait for the guest to give buffers.
    pub(super) receive_waits: Counter,
    /// How often the rate limit stopped the guest from receiving.
    pub(super) receive_throttled: Counter,
    pub(super) sent_packets: Counter,
    pub(super) sent_bytes: Counter,
    /// As of those received.
    pub(super) sent_unsegmented: Counter,
    /// Frames of the guest's that were not taken: malformed, or there was nobody to take them.
    pub(super) send_drops: Counter,
    /// How often a frame had to wait for room on the host's side.
    pub(super) send_waits: Counter,
    /// How often the rate limit stopped the guest from sending.
    pub(super) send_throttled: Counter,
}

impl Metrics for NetMetrics {
    fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("received_packets", self.received_packets.get()),
            ("received_bytes", self.received_bytes.get()),
            ("received_unsegmented", self.received_unsegmented.get()),
            ("receive_drops", self.receive_drops.get()),
            ("receive_waits", self.receive_waits.get()),
            ("receive_throttled", self.receive_throttled.get()),
            ("sent_packets", self.sent_packets.get()),
            ("sent_bytes", self.sent_bytes.get()),
            ("sent_unsegmented", self.sent_unsegmented.get()),
            ("send_drops", self.send_drops.get()),
            ("send_waits", self.send_waits.get()),
            ("send_throttled", self.send_throttled.get()),
        ]
    }
}
