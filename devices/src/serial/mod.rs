//! The serial port: a 16550A whose line ends in a sink on the host.

mod state;
#[cfg(test)]
mod tests;

use std::{
    convert::Infallible,
    fmt,
    io::{self, Write},
    mem,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use saved_state::{Kind, SavedState, Section};
use vm_superio::{Trigger, serial::SerialEvents};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{BusDevice, Counter, Device, Error, InputPort, InterruptLine, sync::lock};
pub use state::SavedSerial;

/// Ports of a 16550A.
pub const PORTS: u64 = 8;

/// Bytes that the receive FIFO of vm-superio holds.
const FIFO_BYTES: usize = 64;
const MODEM_CONTROL: u8 = 4;
const MODEM_CONTROL_LOOP: u8 = 1 << 4;
const IIR_NONE_PENDING: u8 = 1;

/// Where the host's bytes go to and the guest's come from.
pub type Sink = Box<dyn Write + Send>;

type Uart = vm_superio::Serial<Line, Arc<Events>, Sink>;

/// A 16550A.
///
/// A sink that fails loses the guest's bytes and never stops the guest. Each byte is an exit and is
/// followed by a flush of the sink, which is free to ignore that. It must not block for long.
pub struct Serial {
    uart: Uart,
    line: Line,
    events: Arc<Events>,
}

impl Serial {
    /// A port whose output goes to `sink`.
    ///
    /// # Errors
    ///
    /// [`Error::EventFd`].
    pub fn new(line: Arc<dyn InterruptLine>, sink: Sink) -> Result<Self, Error> {
        let events = Arc::new(Events {
            room: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::EventFd)?,
            input_waits: AtomicBool::new(false),
            output_bytes: Counter::default(),
            lost_bytes: Counter::default(),
            input_bytes: Counter::default(),
        });
        let line = Line {
            line,
            failures: Arc::default(),
            muted: Arc::default(),
        };
        Ok(Self {
            uart: Uart::with_events(line.clone(), Arc::clone(&events), sink),
            line,
            events,
        })
    }

    /// Offers `bytes` to the guest and returns how many of them its FIFO took.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let len = bytes.len().min(self.input_room());
        // The only other error is a full FIFO, and there is room.
        let taken = self.uart.enqueue_raw_bytes(&bytes[..len]).unwrap_or(0);
        self.events.input_bytes.add(taken as u64);
        taken
    }

    /// Bytes that [`Serial::input`] would take now. In loopback mode the line is cut: none.
    pub fn input_room(&mut self) -> usize {
        if self.uart.read(MODEM_CONTROL) & MODEM_CONTROL_LOOP != 0 {
            return 0;
        }
        self.uart.fifo_capacity()
    }
}

impl InputPort for Mutex<Serial> {
    fn input_room(&self) -> usize {
        let mut serial = lock(self);
        let room = serial.input_room();
        if room == 0 {
            // Under the same lock as the look at the FIFO, so that no reader comes in between.
            serial.events.input_waits.store(true, Ordering::Relaxed);
        }
        room
    }

    fn input(&self, bytes: &[u8]) -> usize {
        lock(self).input(bytes)
    }

    fn room(&self) -> io::Result<EventFd> {
        lock(self).events.room.try_clone()
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").finish_non_exhaustive()
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (byte, register) in data.iter_mut().zip(offset as u8..) {
            *byte = self.uart.read(register);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (byte, register) in data.iter().zip(offset as u8..) {
            // What can fail is the sink, and the event for a lost byte has counted that.
            let _ = self.uart.write(register, *byte);
            if register == MODEM_CONTROL {
                // The guest may have left loopback mode.
                self.events.announce_room();
            }
        }
    }
}

impl Device for Serial {
    fn kind(&self) -> Kind {
        SavedSerial::KIND
    }

    fn save(&self, instance: u32) -> Result<Section, saved_state::Error> {
        // The line and the counters are not the guest's state.
        let Self {
            uart,
            line: _,
            events: _,
        } = self;
        Section::encode(instance, &SavedSerial::from(uart.state()))
    }

    fn restore(&mut self, section: &Section) -> Result<(), Error> {
        let state: vm_superio::SerialState = section.decode::<SavedSerial>()?.into();
        let impossible = |reason: String| Error::Impossible {
            kind: SavedSerial::KIND,
            reason,
        };
        if state.in_buffer.len() > FIFO_BYTES {
            let len = state.in_buffer.len();
            return Err(impossible(format!("{len} bytes in a FIFO of {FIFO_BYTES}")));
        }
        let sink = mem::replace(self.uart.writer_mut(), Box::new(io::sink()));
        // vm-superio raises what is pending at once; that is for `resume`, when the guest runs.
        self.line.muted.store(true, Ordering::Relaxed);
        let restored = Uart::from_state(&state, self.line.clone(), Arc::clone(&self.events), sink);
        self.line.muted.store(false, Ordering::Relaxed);
        self.uart = restored.map_err(|e| impossible(e.to_string()))?;
        // Who waits for room in the queue of a port that was in use need not find this one full.
        self.events.announce_room();
        Ok(())
    }

    fn resume(&mut self) {
        if self.uart.state().interrupt_identification & IIR_NONE_PENDING == 0 {
            let Ok(()) = self.line.trigger();
        }
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("output_bytes", self.events.output_bytes.get()),
            ("lost_output_bytes", self.events.lost_bytes.get()),
            ("input_bytes", self.events.input_bytes.get()),
            ("interrupt_failures", self.line.failures.get()),
        ]
    }
}

/// The interrupt line as vm-superio sees it: it never fails, because nothing a UART does may depend
/// on whether the interrupt got through.
#[derive(Clone, Debug)]
struct Line {
    line: Arc<dyn InterruptLine>,
    failures: Arc<Counter>,
    muted: Arc<AtomicBool>,
}

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        if !self.muted.load(Ordering::Relaxed) && self.line.trigger().is_err() {
            self.failures.add(1);
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Events {
    room: EventFd,
    /// Spares a system call per byte read while nobody waits.
    input_waits: AtomicBool,
    output_bytes: Counter,
    lost_bytes: Counter,
    input_bytes: Counter,
}

impl Events {
    fn announce_room(&self) {
        if self.input_waits.swap(false, Ordering::Relaxed) {
            // It fails only when its count is at the limit, and then it is readable anyway.
            let _ = self.room.write(1);
        }
    }
}

impl SerialEvents for Events {
    fn buffer_read(&self) {}

    fn out_byte(&self) {
        self.output_bytes.add(1);
    }

    fn tx_lost_byte(&self) {
        self.lost_bytes.add(1);
    }

    fn in_buffer_empty(&self) {
        self.announce_room();
    }
}
