//! What is typed at a machine's console, on the event loop.

use std::{
    fs::File,
    io::{self, ErrorKind, Read},
    os::fd::AsRawFd,
    sync::Arc,
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use crate::event_loop::watch;

/// What is read at once, as far as there is room for it: what a terminal holds of what was typed.
const READ_BYTES: usize = 4096;

/// A device that takes what is typed.
pub trait InputPort: Send + Sync {
    /// Bytes that [`InputPort::input`] would take now. Who is told 0 may wait for [`InputPort::room`].
    fn input_room(&self) -> usize;

    /// Offers `bytes` to the guest and returns how many of them were taken.
    fn input(&self, bytes: &[u8]) -> usize;

    /// Signalled when there may be room again after [`InputPort::input_room`] was 0.
    ///
    /// # Errors
    ///
    /// When the host has no descriptors left.
    fn room(&self) -> io::Result<EventFd>;
}

/// Where a console's input comes from.
pub struct ConsoleInput {
    /// Read when it is readable, until it ends. A terminal, a pipe or a socket; a regular file
    /// cannot be waited for.
    pub source: File,
    /// What gets what was read.
    pub port: Arc<dyn InputPort>,
}

/// Passes input on. While its port has no room, bytes stay where they come from.
pub(crate) struct InputEvents {
    input: ConsoleInput,
    room: EventFd,
}

impl InputEvents {
    pub(crate) fn new(input: ConsoleInput) -> io::Result<Self> {
        let room = input.port.room()?;
        Ok(Self { input, room })
    }

    fn source_events(&self) -> Events {
        Events::new(&self.input.source, EventSet::IN)
    }
}

impl MutEventSubscriber for InputEvents {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, self.source_events());
        watch(ops, Events::new(&self.room, EventSet::IN));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == self.room.as_raw_fd() {
            let _ = self.room.read();
            return watch(ops, self.source_events());
        }
        let room = self.input.port.input_room();
        if room == 0 {
            let _ = ops.remove(self.source_events());
            return;
        }
        let mut bytes = [0; READ_BYTES];
        let len = room.min(bytes.len());
        match self.input.source.read(&mut bytes[..len]) {
            Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            Ok(0) | Err(_) => {
                let _ = ops.remove(self.source_events());
            }
            Ok(len) => {
                self.input.port.input(&bytes[..len]);
            }
        }
    }
}
