//! How a guest says that it is done with a run.

use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use crate::BusDevice;

/// Ports that it answers at: one register of 32 bits.
pub const RUN_PORTS: u64 = 4;

/// Set in [`Run::said`] beside a result, which may be zero.
const SAID: u64 = 1 << 32;

/// The run that a machine is in, if it is in one, as its guest and who has it run see it.
///
/// A guest says once that it is done; what it says more often, or without being in a run, is not heard. So there is never
/// more than one result to be kept.
#[derive(Debug, Default)]
pub struct Run {
    /// Zero while there is none.
    number: AtomicU32,
    /// The result with [`SAID`], once there is one.
    said: AtomicU64,
}

impl Run {
    /// Begins run `number`. No vCPU may be running.
    pub fn begin(&self, number: NonZeroU32) {
        self.said.store(0, Ordering::SeqCst);
        self.number.store(number.get(), Ordering::SeqCst);
    }

    /// Ends it: there is none then. The guest may be running.
    pub fn end(&self) {
        self.number.store(0, Ordering::SeqCst);
        self.said.store(0, Ordering::SeqCst);
    }

    /// What the guest has said that came of this run, if it has.
    pub fn result(&self) -> Option<u32> {
        let said = self.said.load(Ordering::SeqCst);
        (self.number() != 0 && said & SAID != 0).then_some(said as u32)
    }

    fn number(&self) -> u32 {
        self.number.load(Ordering::SeqCst)
    }

    fn say(&self, result: u32) {
        if self.number() != 0 {
            let said = SAID | u64::from(result);
            // Another vCPU was first, or this one: that counts.
            let _ = self
                .said
                .compare_exchange(0, said, Ordering::SeqCst, Ordering::SeqCst);
        }
    }
}

/// A register of 32 bits, and one of those of other widths nobody has: a write says that the run is done and what came of it, a read
/// gives the run's number, zero without one. It has no state of its own: runs are not the machine's but of who has it run.
pub struct RunPort(Arc<Run>);

impl RunPort {
    /// The register of `run`.
    pub fn new(run: Arc<Run>) -> Self {
        Self(run)
    }
}

impl BusDevice for RunPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(word) => *word = self.0.number().to_le_bytes(),
            Err(_) => data.fill(0xff),
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let Ok(word) = data.try_into() {
            self.0.say(u32::from_le_bytes(word));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(port: &mut RunPort) -> u32 {
        let mut word = [0xaa; 4];
        port.read(0, &mut word);
        u32::from_le_bytes(word)
    }

    #[test]
    fn a_guest_sees_its_runs_number_and_is_heard_once() {
        let run = Arc::new(Run::default());
        let mut port = RunPort::new(Arc::clone(&run));
        for begun in [7, u32::MAX] {
            run.begin(NonZeroU32::new(begun).unwrap());
            assert_eq!((number(&mut port), run.result()), (begun, None));
            port.write(0, &0u32.to_le_bytes());
            assert_eq!(run.result(), Some(0));
            port.write(0, &5u32.to_le_bytes());
            assert_eq!((number(&mut port), run.result()), (begun, Some(0)));
        }
        run.begin(NonZeroU32::MIN);
        port.write(0, &u32::MAX.to_le_bytes());
        assert_eq!(run.result(), Some(u32::MAX));
    }

    #[test]
    fn nobody_is_heard_without_a_run() {
        let run = Arc::new(Run::default());
        let mut port = RunPort::new(Arc::clone(&run));
        port.write(0, &[0; 4]);
        assert_eq!((number(&mut port), run.result()), (0, None));
        run.begin(NonZeroU32::MIN);
        port.write(0, &[0; 4]);
        run.end();
        assert_eq!((number(&mut port), run.result()), (0, None));
        port.write(0, &[1; 4]);
        run.begin(NonZeroU32::MIN);
        assert_eq!(run.result(), None);
    }

    #[test]
    fn other_widths_are_nobodys() {
        let run = Arc::new(Run::default());
        run.begin(NonZeroU32::MIN);
        let mut port = RunPort::new(Arc::clone(&run));
        for (offset, width) in [(0, 1), (0, 2), (1, 1), (2, 2), (3, 1), (0, 8)] {
            let mut data = vec![0; width];
            port.write(offset, &data);
            port.read(offset, &mut data);
            assert_eq!(data, vec![0xff; width]);
        }
        assert_eq!(run.result(), None);
    }
}
