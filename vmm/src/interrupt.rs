//! A device's interrupt line: an event that KVM turns into an edge.

use std::io;

use devices::InterruptLine;
use hypervisor::EventFd;

/// An edge-triggered interrupt line.
#[derive(Debug)]
pub(crate) struct Irqfd(pub(crate) EventFd);

impl InterruptLine for Irqfd {
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}
