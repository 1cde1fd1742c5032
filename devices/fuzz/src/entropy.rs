//! The entropy device.

use devices::virtio::{VirtioDevice, entropy::Entropy};
use fuzz_harness::Input;

use crate::{Bench, Part, Subject};

/// It has nothing behind it.
pub struct Random;

impl Subject for Random {
    fn new(_input: &mut Input<'_>) -> Self {
        Self
    }

    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(Entropy::new())
    }

    fn prove(&mut self, bench: &mut Bench) {
        let (len, room) = bench.request(0, &[Part::In(64), Part::In(64)]);
        assert_eq!(len, 128);
        assert_ne!(room.concat(), [0; 128]);
    }
}
