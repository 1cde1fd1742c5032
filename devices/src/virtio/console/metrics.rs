//! What a console counts. Directions are the guest's.

use crate::{Counter, Metrics};

#[derive(Debug, Default)]
pub(super) struct ConsoleMetrics {
    pub(super) output_bytes: Counter,
    /// What the console's sink did not take.
    pub(super) lost_output_bytes: Counter,
    /// What the guest has taken of what was typed.
    pub(super) input_bytes: Counter,
}

impl Metrics for ConsoleMetrics {
    fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("output_bytes", self.output_bytes.get()),
            ("lost_output_bytes", self.lost_output_bytes.get()),
            ("input_bytes", self.input_bytes.get()),
        ]
    }
}
