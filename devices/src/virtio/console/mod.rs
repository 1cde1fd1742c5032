//! The virtio console (virtio 1.3, section 5.3): one port, beside the serial port and to the same ends.
//!
//! A UART costs its guest an exit for each byte. Here a driver makes a buffer of any length available and notifies once, by
//! an eventfd that the kernel signals: many KiB are printed by one exit or few, and nobody's vCPU waits in one for the sink.
//! How long buffers are is up to the guest; Linux's terminal makes two of each line unless it is told to leave line ends alone.
//! Bytes one by one, for a guest that has no driver yet, are there, too (`VIRTIO_CONSOLE_F_EMERG_WRITE`).

mod metrics;
mod state;
#[cfg(test)]
mod tests;
mod typed;

use std::{io, sync::Arc};

use memory::GuestMemory;
use saved_state::{Kind, SavedState, Section};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_queue::{DescriptorChain, Queue};

use super::{
    DriverError, EventSource, Progress, SavedTransport, VirtioDevice,
    buffers::Buffers,
    serve::{Outcome, serve_until_later},
};
use crate::{Error, InputPort, Metrics, serial::Sink};
use metrics::ConsoleMetrics;
pub use state::SavedConsole;
use typed::{TYPED_BYTES, Typed};

const QUEUE_ENTRIES: u16 = 128;

/// The queues of the one port (virtio 1.3, 5.3.2).
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// The feature bit of 5.3.3, which virtio-bindings lacks. Not offered are SIZE, for nobody here knows one, and MULTIPORT.
const EMERGENCY_WRITE: u64 = 1 << 2;

/// Bytes of `struct virtio_console_config`, and where its `emerg_wr` is (5.3.4). The fields before it are those of features that
/// are not offered.
const CONFIG_BYTES: usize = 12;
const EMERGENCY: usize = 8;

/// What is written to the sink at once. A chain may have nearly 4 GiB: one that has more goes on in the next round, so that each
/// is bounded.
const WRITE_BYTES: usize = 64 << 10;

/// A console.
pub struct Console {
    sink: Sink,
    typed: Arc<Typed>,
    /// Bytes that are written of the chain that is next in the transmit queue.
    written: u64,
    buffer: Box<[u8]>,
    metrics: Arc<ConsoleMetrics>,
}

impl Console {
    /// A console whose output goes to `sink`. One that fails loses the guest's bytes and never stops the guest; it must not
    /// block for long, for all that the event loop serves waits meanwhile.
    ///
    /// # Errors
    ///
    /// When the host has no descriptors left.
    pub fn new(sink: Sink) -> io::Result<Self> {
        Ok(Self {
            sink,
            typed: Arc::new(Typed::new()?),
            written: 0,
            buffer: vec![0; WRITE_BYTES].into(),
            metrics: Arc::default(),
        })
    }

    /// What takes the guest's input.
    pub fn input(&self) -> Arc<dyn InputPort> {
        Arc::clone(&self.typed) as _
    }

    fn give(
        &self,
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
    ) -> Result<Outcome, DriverError> {
        if self.typed.is_empty() {
            return Ok(Outcome::Later);
        }
        let room = Buffers::of(chain, memory, QUEUE_ENTRIES.into())?.writable;
        if room.len() == 0 {
            return Err(DriverError::Incomplete("room for input"));
        }
        let given = self.typed.give(&room);
        self.metrics.input_bytes.add(given.into());
        Ok(Outcome::Used(given))
    }

    /// Writes the next piece of a chain; it stays available if that is not its last.
    fn take(
        &mut self,
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
    ) -> Result<Outcome, DriverError> {
        let mut text = Buffers::of(chain, memory, QUEUE_ENTRIES.into())?.readable;
        let rest = text.split_off(self.written);
        let len = rest.copy_to(&mut self.buffer);
        write(&mut self.sink, &self.buffer[..len], &self.metrics);
        if (len as u64) < rest.len() {
            self.written += len as u64;
            return Ok(Outcome::Later);
        }
        self.written = 0;
        Ok(Outcome::Used(0))
    }

    fn take_round(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Progress, DriverError> {
        // Not asked of `written`: a driver may take back what it has made available, and a round without it has nothing to do.
        let mut unfinished = false;
        let mut progress = serve_until_later(queue, memory, |chain| {
            let outcome = self.take(chain, memory)?;
            unfinished = matches!(outcome, Outcome::Later);
            Ok(outcome)
        })?;
        progress.more |= unfinished;
        Ok(progress)
    }
}

/// Writes `bytes`, as far as `sink` takes them.
fn write(sink: &mut Sink, mut bytes: &[u8], metrics: &ConsoleMetrics) {
    while !bytes.is_empty() {
        match sink.write(bytes) {
            Ok(0) => break,
            Ok(taken) => {
                metrics.output_bytes.add(taken as u64);
                bytes = &bytes[taken..];
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::debug!(%error, "the console takes no output");
                break;
            }
        }
    }
    metrics.lost_output_bytes.add(bytes.len() as u64);
    // What it has not taken is counted.
    let _ = sink.flush();
}

impl VirtioDevice for Console {
    fn kind(&self) -> Kind {
        SavedConsole::KIND
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        EMERGENCY_WRITE
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_ENTRIES, QUEUE_ENTRIES]
    }

    fn config(&self) -> Vec<u8> {
        vec![0; CONFIG_BYTES]
    }

    /// A driver may print one byte at a time like this, also before it has begun (virtio 1.3, 5.3.4).
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if offset == EMERGENCY
            && let Some(byte) = data.first()
        {
            write(&mut self.sink, &[*byte], &self.metrics);
        }
    }

    fn sources(&self) -> Vec<EventSource<'_>> {
        vec![EventSource {
            descriptor: self.typed.arrived(),
            readable: Some(RECEIVE),
            writable: None,
        }]
    }

    fn holds_requests(&self, index: usize) -> bool {
        index == TRANSMIT
    }

    fn activate(&mut self, _features: u64) {}

    /// What was typed is not the driver's, and stays.
    fn reset(&mut self) {
        self.written = 0;
    }

    fn forget_queue(&mut self, index: usize) {
        if index == TRANSMIT {
            self.written = 0;
        }
    }

    fn process_queue(
        &mut self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Progress, DriverError> {
        match index {
            RECEIVE => serve_until_later(queue, memory, |chain| self.give(chain, memory)),
            TRANSMIT => self.take_round(queue, memory),
            _ => Ok(Progress::default()),
        }
    }

    fn save(
        &self,
        instance: u32,
        transport: SavedTransport,
    ) -> Result<Section, saved_state::Error> {
        let Self {
            sink: _,
            typed,
            written,
            buffer: _,
            metrics: _,
        } = self;
        let saved = SavedConsole {
            written_bytes: *written,
            input: typed.to_vec(),
            transport,
        };
        Section::encode(instance, &saved)
    }

    fn restore(&mut self, section: &Section) -> Result<SavedTransport, Error> {
        let SavedConsole {
            written_bytes,
            input,
            transport,
        } = section.decode()?;
        if input.len() > TYPED_BYTES {
            return Err(Error::Impossible {
                kind: SavedConsole::KIND,
                reason: format!(
                    "{} bytes of input, of which {TYPED_BYTES} are kept",
                    input.len()
                ),
            });
        }
        // More than the chain has writes nothing of it.
        self.written = written_bytes;
        self.typed.replace(input);
        Ok(transport)
    }

    fn metrics(&self) -> Arc<dyn Metrics> {
        Arc::clone(&self.metrics) as _
    }
}
