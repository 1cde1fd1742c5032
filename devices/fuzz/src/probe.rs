//! The transport, with a device behind it that watches what it is asked.

use std::sync::Arc;

use devices::{
    Error, Metrics,
    virtio::{DriverError, Progress, SavedTransport, VirtioDevice},
};
use fuzz_harness::Input;
use memory::GuestMemory;
use saved_state::{Kind, SavedState, Section};
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use crate::{Bench, Part, Subject};

const FEATURES: u64 = 0b1011;
/// Those of the transport: indirect descriptors, used and available event indices, and that it is of this century.
const TRANSPORT: u64 = 1 << 28 | 1 << 29 | 1 << VIRTIO_F_VERSION_1;
const SIZES: [u16; 3] = [4, 64, 256];
/// After so many chains a round is over.
const ROUND: usize = 8;

/// A device of three queues.
pub struct Probed;

impl Subject for Probed {
    fn new(_input: &mut Input<'_>) -> Self {
        Self
    }

    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::<Probe>::default()
    }

    fn prove(&mut self, bench: &mut Bench) {
        for queue in [1, 2] {
            let (len, _) = bench.request(queue, &[Part::Out(vec![1]), Part::In(8)]);
            assert_eq!(len, 0);
        }
    }
}

/// Uses each chain and leaves it as it is.
#[derive(Default)]
struct Probe {
    /// What the driver has accepted, from when it has started to when it resets the device.
    accepted: Option<u64>,
    changed: bool,
    rounds: u8,
}

#[derive(Versionize)]
struct SavedProbe {
    transport: SavedTransport,
}

impl SavedState for SavedProbe {
    const KIND: Kind = Kind(*b"PROB");
}

struct Nothing;

impl Metrics for Nothing {
    fn list(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

impl VirtioDevice for Probe {
    fn kind(&self) -> Kind {
        SavedProbe::KIND
    }

    fn device_type(&self) -> u32 {
        0x2a
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &SIZES
    }

    fn config(&self) -> Vec<u8> {
        vec![self.rounds; 6]
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    fn activate(&mut self, features: u64) {
        assert_eq!(self.accepted, None, "it starts twice");
        assert_eq!(features & !(FEATURES | TRANSPORT), 0, "it was offered less");
        assert_ne!(
            features & 1 << VIRTIO_F_VERSION_1,
            0,
            "a driver of the last century"
        );
        self.accepted = Some(features);
    }

    fn reset(&mut self) {
        self.accepted = None;
    }

    fn process_queue(
        &mut self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Progress, DriverError> {
        assert!(self.accepted.is_some(), "it is served before it starts");
        assert!(queue.ready(), "a queue is served that is not ready");
        assert!(
            queue.is_valid(memory),
            "a queue is served that is not in memory"
        );
        assert!(queue.size() <= SIZES[index], "a queue has become larger");
        self.rounds = self.rounds.wrapping_add(1);
        self.changed = self.rounds.is_multiple_of(4);
        let mut used = 0;
        while used < ROUND {
            let chain = queue.iter(memory)?.next();
            let Some(chain) = chain else { break };
            let head = chain.head_index();
            assert!(
                chain.count() <= usize::from(u16::MAX),
                "a chain does not end"
            );
            queue.add_used(memory, head, 0)?;
            used += 1;
        }
        let interrupt = used > 0 && queue.needs_notification(memory)?;
        Ok(Progress {
            interrupt,
            more: used == ROUND,
            ..Progress::default()
        })
    }

    fn save(
        &self,
        instance: u32,
        transport: SavedTransport,
    ) -> Result<Section, saved_state::Error> {
        Section::encode(instance, &SavedProbe { transport })
    }

    fn restore(&mut self, section: &Section) -> Result<SavedTransport, Error> {
        let SavedProbe { transport } = section.decode()?;
        Ok(transport)
    }

    fn metrics(&self) -> Arc<dyn Metrics> {
        Arc::new(Nothing)
    }
}
