//! The virtio entropy device (virtio 1.3, section 5.4).

mod state;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use memory::GuestMemory;
use rustix::rand::{GetRandomFlags, getrandom};
use saved_state::{Kind, SavedState, Section};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::{DescriptorChain, Queue};

use super::{DriverError, Progress, SavedTransport, VirtioDevice, buffers::Buffers, serve::serve};
use crate::{Counter, Error, Metrics};
pub use state::SavedEntropy;

const QUEUE_ENTRIES: u16 = 64;

/// A request gets no more, however large its buffer. Linux asks for 64 bytes at a time.
const REQUEST_BYTES: usize = 4096;

/// Fills the guest's buffers from the host's `getrandom`.
#[derive(Default)]
pub struct Entropy {
    metrics: Arc<EntropyMetrics>,
}

impl Entropy {
    /// A source of entropy.
    pub fn new() -> Self {
        Self::default()
    }

    fn serve_request(
        &self,
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
    ) -> Result<u32, DriverError> {
        let buffer = Buffers::of(chain, memory, QUEUE_ENTRIES.into())?.writable;
        let mut random = [0; REQUEST_BYTES];
        let wanted = buffer.len().min(REQUEST_BYTES as u64) as usize;
        // With the host's generator seeded it cannot fail, and without bytes the driver asks again.
        let got = getrandom(&mut random[..wanted], GetRandomFlags::empty()).unwrap_or(0);
        self.metrics.requests.add(1);
        self.metrics.bytes.add(got as u64);
        Ok(buffer.fill(&random[..got]))
    }
}

impl VirtioDevice for Entropy {
    fn kind(&self) -> Kind {
        SavedEntropy::KIND
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_ENTRIES]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn process_queue(
        &mut self,
        _index: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Progress, DriverError> {
        serve(queue, memory, |chain| self.serve_request(chain, memory))
    }

    fn save(
        &self,
        instance: u32,
        transport: SavedTransport,
    ) -> Result<Section, saved_state::Error> {
        let Self { metrics: _ } = self;
        Section::encode(instance, &SavedEntropy { transport })
    }

    fn restore(&mut self, section: &Section) -> Result<SavedTransport, Error> {
        let SavedEntropy { transport } = section.decode()?;
        Ok(transport)
    }

    fn metrics(&self) -> Arc<dyn Metrics> {
        Arc::clone(&self.metrics) as _
    }
}

#[derive(Default)]
struct EntropyMetrics {
    requests: Counter,
    bytes: Counter,
}

impl Metrics for EntropyMetrics {
    fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("requests", self.requests.get()),
            ("bytes", self.bytes.get()),
        ]
    }
}
