//! What a vsock device counts. Directions are the guest's.

use crate::{Counter, Metrics};

#[derive(Default)]
pub(super) struct VsockMetrics {
    pub(super) connections: Counter,
    /// Connections that either side wanted and that did not come about for want of a listener or of room.
    pub(super) refused: Counter,
    /// Connections that were reset because the guest broke their rules.
    pub(super) broken: Counter,
    pub(super) received_bytes: Counter,
    pub(super) sent_bytes: Counter,
}

impl Metrics for VsockMetrics {
    fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("connections", self.connections.get()),
            ("refused_connections", self.refused.get()),
            ("broken_connections", self.broken.get()),
            ("received_bytes", self.received_bytes.get()),
            ("sent_bytes", self.sent_bytes.get()),
        ]
    }
}
