//! Devices on ports: the serial port and the clock.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
};

use devices::{BusDevice, Device, Rtc, Serial, rtc, serial};
use fuzz_harness::{Input, bounded};

use crate::{HEAP_BYTES, line::Line};

const INSTANCE: u32 = 0;
const MOST_OPERATIONS: usize = 300;

/// A device on ports under attack.
pub trait PortSubject: Default {
    /// The device.
    type Device: Device;
    /// How many ports it has.
    const PORTS: u64;

    /// The device as it is before the guest runs.
    fn device(&self) -> Self::Device;

    /// Something happens at the device's other end.
    fn outside(&self, _device: &mut Self::Device, _input: &mut Input<'_>) {}

    /// The device does its work, whatever was done to it.
    ///
    /// # Panics
    ///
    /// If it does not.
    fn prove(&self, device: &mut Self::Device);
}

/// Runs the program `input` on a device of `S`.
pub fn attack<S: PortSubject>(input: &[u8]) {
    bounded(HEAP_BYTES, || {
        let mut input = Input::new(input);
        let subject = S::default();
        let mut device = subject.device();
        for _ in 0..MOST_OPERATIONS {
            let Some(operation) = input.operation() else {
                break;
            };
            perform(&subject, &mut device, operation, &mut input);
        }
        subject.prove(&mut device);
    });
}

fn perform<S: PortSubject>(
    subject: &S,
    device: &mut S::Device,
    operation: u8,
    input: &mut Input<'_>,
) {
    let port = u64::from(input.byte()) % S::PORTS;
    let width = (1 << (operation >> 6)).min((S::PORTS - port) as usize);
    let mut data = input.long().to_le_bytes();
    match operation % 16 {
        0..6 => device.write(port, &data[..width]),
        6..10 => device.read(port, &mut data[..width]),
        10 | 11 => subject.outside(device, input),
        12 => device.resume(),
        13 => forge(subject, device, input),
        _ => save_and_restore(subject, device),
    }
}

fn save_and_restore<S: PortSubject>(subject: &S, device: &mut S::Device) {
    let saved = device.save(INSTANCE).expect("a device can always be saved");
    *device = subject.device();
    device.restore(&saved).expect("what was saved restores");
    let again = device.save(INSTANCE).expect("a device can always be saved");
    assert_eq!(again, saved, "it restores to something else");
    device.resume();
}

fn forge<S: PortSubject>(subject: &S, device: &mut S::Device, input: &mut Input<'_>) {
    let mut saved = device.save(INSTANCE).expect("a device can always be saved");
    for _ in 0..=input.byte() % 4 {
        let at = usize::from(input.half()) % saved.payload.len();
        saved.payload[at] = input.byte();
    }
    if input.byte() > 240 {
        saved.payload.extend(input.bytes(100));
    }
    *device = subject.device();
    if device.restore(&saved).is_err() {
        *device = subject.device();
        return;
    }
    save_and_restore(subject, device);
}

/// What was written to a serial port's line.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("nobody panics with it").extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The serial port.
#[derive(Default)]
pub struct Console(Written);

impl PortSubject for Console {
    type Device = Serial;
    const PORTS: u64 = serial::PORTS;

    fn device(&self) -> Serial {
        let sink = Box::new(self.0.clone());
        Serial::new(Arc::new(Line), sink).expect("there are eventfds")
    }

    fn outside(&self, device: &mut Serial, input: &mut Input<'_>) {
        let bytes = input.bytes(usize::from(input.clone().byte()));
        assert!(device.input(bytes) <= bytes.len());
    }

    /// Sends and receives a byte, at 8 bits without interrupts and not in a loop.
    fn prove(&self, device: &mut Serial) {
        for (register, value) in [(3, 3), (4, 0), (1, 0)] {
            device.write(register, &[value]);
        }
        let said = |port: &Self| port.0.0.lock().expect("nobody panics with it").len();
        let before = said(self);
        device.write(0, b"!");
        assert_eq!(said(self), before + 1, "it is not sent");
        let mut got = [0];
        for _ in 0..=64 {
            device.read(0, &mut got);
        }
        assert_eq!(device.input(b"?"), 1);
        device.read(0, &mut got);
        assert_eq!(&got, b"?");
    }
}

/// The clock.
#[derive(Default)]
pub struct Clock;

impl PortSubject for Clock {
    type Device = Rtc;
    const PORTS: u64 = rtc::PORTS;

    fn device(&self) -> Rtc {
        Rtc::new()
    }

    /// Stops it, sets it to a date and reads that back.
    fn prove(&self, device: &mut Rtc) {
        const STOPPED_BINARY_24_HOURS: u8 = 0x86;
        let date = [
            (0x32, 20),
            (9, 27),
            (8, 2),
            (7, 28),
            (4, 23),
            (2, 59),
            (0, 58),
        ];
        device.write(0, &[0x0b, STOPPED_BINARY_24_HOURS]);
        // Of a year that was impossible, what is set first is set on what comes after it.
        for (register, value) in [date, date].concat() {
            device.write(0, &[register, value]);
        }
        for (register, value) in date {
            device.write(0, &[register]);
            let mut got = [0];
            device.read(1, &mut got);
            assert_eq!(got, [value], "register {register:#x}");
        }
        device.write(0, &[0x0b, 6]);
    }
}
