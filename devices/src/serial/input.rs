//! Input for a serial port, on the event loop.

use std::{
    fs::File,
    io::{self, ErrorKind, Read},
    os::fd::AsRawFd,
    sync::{Arc, Mutex},
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::{FIFO_BYTES, Serial};
use crate::{event_loop::watch, sync::lock};

/// Where a serial port's input comes from.
#[derive(Debug)]
pub struct SerialInput {
    /// Read when it is readable, until it ends. A terminal, a pipe or a socket; a regular file
    /// cannot be waited for.
    pub source: File,
    /// The port that gets what was read.
    pub serial: Arc<Mutex<Serial>>,
}

/// Passes input on. While the port's FIFO is full, bytes stay where they come from.
pub(crate) struct InputEvents {
    input: SerialInput,
    room: EventFd,
}

impl InputEvents {
    pub(crate) fn new(input: SerialInput) -> io::Result<Self> {
        let room = lock(&input.serial).room()?;
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
        let room = {
            let mut serial = lock(&self.input.serial);
            let room = serial.input_room();
            if room == 0 {
                // Under the same lock as the look at the FIFO, so that no reader comes in between.
                serial.wait_for_room();
                let _ = ops.remove(self.source_events());
                return;
            }
            room
        };
        let mut bytes = [0; FIFO_BYTES];
        let len = room.min(bytes.len());
        match self.input.source.read(&mut bytes[..len]) {
            Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            Ok(0) | Err(_) => {
                let _ = ops.remove(self.source_events());
            }
            Ok(len) => {
                lock(&self.input.serial).input(&bytes[..len]);
            }
        }
    }
}
