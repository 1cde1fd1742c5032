//! Devices under attack: a fuzzer's bytes are a program of a hostile driver, of who is at a device's other end, and of who
//! saves it, forges what was saved, and restores it.
//!
//! Whatever such a program does, the device does not panic, and ends each round within its bounds of time and memory; what is
//! saved restores to the same; and after a reset the device serves a driver that keeps the rules.
//!
//! A device joins with a [`Subject`] and a target in `src/bin` that names it. Devices on ports have [`ports::PortSubject`].

mod balloon;
mod block;
mod branch;
mod console;
mod entropy;
mod guest;
mod line;
mod memory_map;
mod net;
pub mod ports;
mod probe;
mod program;
mod scratch;
mod vsock;

pub use balloon::Pages;
pub use block::Raw;
pub use branch::Branching;
pub use console::Terminal;
pub use entropy::Random;
pub use guest::{Guest, Part};
pub use net::Wire;
pub use probe::Probed;
pub use program::{Bench, attack, seeds};
pub use vsock::Streams;

use devices::virtio::{MmioTransport, VirtioDevice};
use fuzz_harness::Input;
use memory::GuestMemory;

/// What an input may allocate in addition to what is there, in bytes: a machine's devices are to fit into some MiB.
const HEAP_BYTES: usize = 24 << 20;

/// A virtio device under attack and what is behind it.
pub trait Subject: Sized {
    /// Guest memory, full of zeros. It is the process's only one.
    fn memory() -> GuestMemory {
        memory_map::memory()
    }

    /// What is behind the device, in the way that `input` chooses.
    fn new(input: &mut Input<'_>) -> Self;

    /// The device as it is before the guest runs. There is no more than one at a time.
    fn device(&mut self) -> Box<dyn VirtioDevice>;

    /// A request for queue `queue` that is right or nearly so.
    fn compose(&mut self, _queue: u16, input: &mut Input<'_>) -> Vec<Part> {
        guest::any_parts(input)
    }

    /// Something happens at the other end of the device, which `transport` has.
    fn outside(&mut self, _transport: &MmioTransport, _input: &mut Input<'_>) {}

    /// Has a driver that keeps the rules, whose queues are set up, see that the device does its work.
    ///
    /// # Panics
    ///
    /// If it does not.
    fn prove(&mut self, bench: &mut Bench);

    /// What is behind the device is as it has to be, when it is gone.
    fn finish(self) {}
}
