//! The machine's generation: a number that is another one in every machine that ever runs from a snapshot.
//!
//! Guests that look at it know that they were copied, and draw new random numbers (Microsoft, "Virtual Machine Generation ID";
//! Linux, drivers/virt/vmgenid.c). It lies in guest memory, where ACPI says, and an interrupt tells that it has changed.
//! It has no state of its own: what is saved is the number in memory.

use std::sync::Arc;

use devices::InterruptLine;
use memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::{boot::GENERATION, error::Error};

const BYTES: usize = 16;

/// Changes the generation.
#[derive(Debug)]
pub(crate) struct Generation {
    line: Arc<dyn InterruptLine>,
}

impl Generation {
    /// `line` is the one that ACPI's events come by.
    pub(crate) fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self { line }
    }

    /// Gives the machine its first number. Its guest has not looked yet.
    pub(crate) fn begin(&self, guest: &GuestMemory) -> Result<(), Error> {
        let mut number = [0; BYTES];
        rustix::rand::getrandom(&mut number, rustix::rand::GetRandomFlags::empty())
            .map_err(|errno| Error::Host(errno.into()))?;
        guest
            .write_slice(&number, GuestAddress(GENERATION))
            .map_err(crate::boot::Error::from)?;
        Ok(())
    }

    /// Gives it another one, and tells its guest. No vCPU may be running.
    pub(crate) fn renew(&self, guest: &GuestMemory) -> Result<(), Error> {
        self.begin(guest)?;
        self.line.trigger().map_err(Error::Host)
    }
}
