use super::*;
use crate::{
    conformance::{Line as TestLine, Subject, conforms},
    sync::lock,
};

const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const INTERRUPT_ID: u64 = 2;
const LINE_STATUS: u64 = 5;
const SCRATCH: u64 = 7;

const ENABLE_RECEIVED: u8 = 1;
const ENABLE_TRANSMITTED: u8 = 2;

#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Broken;

impl Write for Broken {
    fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::BrokenPipe.into())
    }
}

fn port(sink: impl Write + Send + 'static) -> (Serial, Arc<TestLine>) {
    let line = Arc::new(TestLine::default());
    (Serial::new(line.clone(), Box::new(sink)).unwrap(), line)
}

fn read(serial: &mut Serial, register: u64) -> u8 {
    let mut byte = [0];
    serial.read(register, &mut byte);
    byte[0]
}

fn metric(device: &dyn Device, name: &str) -> u64 {
    let list = device.metrics();
    list.iter().find(|(n, _)| *n == name).unwrap().1
}

struct Port;

impl Subject for Port {
    type Device = Serial;
    type Saved = SavedSerial;
    const SPAN: u64 = PORTS;

    fn new() -> Self {
        Self
    }

    fn fresh(&self) -> Serial {
        port(io::sink()).0
    }

    fn work(&self, serial: &mut Serial) {
        serial.write(SCRATCH, &[0x5a]);
        serial.write(INTERRUPT_ENABLE, &[ENABLE_RECEIVED]);
        serial.input(b"typed ahead");
    }
}

conforms!(conformance, super::Port);

#[test]
fn the_guests_bytes_reach_the_sink_and_interrupt() {
    let output = Output::default();
    let (mut serial, line) = port(output.clone());
    serial.write(INTERRUPT_ENABLE, &[ENABLE_TRANSMITTED]);
    assert_eq!(line.edges(), 1);
    assert_eq!(read(&mut serial, INTERRUPT_ID) & 0xf, 2);
    for byte in b"hello" {
        serial.write(DATA, &[*byte]);
        read(&mut serial, INTERRUPT_ID);
    }
    assert_eq!(lock(&output.0).as_slice(), b"hello");
    assert_eq!(line.edges(), 6);
    assert_eq!(metric(&serial, "output_bytes"), 5);
}

#[test]
fn a_broken_sink_loses_bytes_and_nothing_else() {
    let (mut serial, line) = port(Broken);
    serial.write(INTERRUPT_ENABLE, &[ENABLE_TRANSMITTED]);
    read(&mut serial, INTERRUPT_ID);
    serial.write(DATA, b"x");
    assert_eq!(line.edges(), 2);
    assert_eq!(metric(&serial, "lost_output_bytes"), 1);
}

#[test]
fn input_is_taken_while_there_is_room() {
    let (mut serial, line) = port(io::sink());
    serial.write(INTERRUPT_ENABLE, &[ENABLE_RECEIVED]);
    assert_eq!(serial.input(&[7; 40]), 40);
    assert_eq!(line.edges(), 1);
    assert_eq!(serial.input(&[8; 40]), 24);
    assert_eq!(serial.input(&[9]), 0);
    assert_eq!(read(&mut serial, LINE_STATUS) & 1, 1);
    for _ in 0..40 {
        assert_eq!(read(&mut serial, DATA), 7);
    }
    assert_eq!(serial.input(&[9]), 1);
}

#[test]
fn a_loopback_takes_no_input_and_announces_room_when_left() {
    let (mut serial, _line) = port(io::sink());
    serial.write(MODEM_CONTROL.into(), &[MODEM_CONTROL_LOOP]);
    assert_eq!(serial.input(b"x"), 0);
    let serial = Mutex::new(serial);
    assert_eq!(InputPort::input_room(&serial), 0);
    lock(&serial).write(MODEM_CONTROL.into(), &[0]);
    assert_eq!(serial.room().unwrap().read().unwrap(), 1);
    assert_eq!(InputPort::input(&serial, b"x"), 1);
}

#[test]
fn a_pending_interrupt_is_sent_again_and_no_other() {
    let subject = Port;
    let mut saved = subject.fresh();
    subject.work(&mut saved);
    let (mut restored, line) = port(io::sink());
    restored.restore(&saved.save(0).unwrap()).unwrap();
    assert_eq!(line.edges(), 0);
    restored.resume();
    assert_eq!(line.edges(), 1);
    assert_eq!(read(&mut restored, INTERRUPT_ID) & 0xf, 4);
    restored.resume();
    assert_eq!(line.edges(), 1);
    let mut typed = [0; 11];
    typed.fill_with(|| read(&mut restored, DATA));
    assert_eq!(&typed, b"typed ahead");
}

#[test]
fn output_goes_to_the_same_sink_after_a_restore() {
    let output = Output::default();
    let (mut serial, _line) = port(output.clone());
    let section = serial.save(0).unwrap();
    serial.restore(&section).unwrap();
    serial.write(DATA, b"x");
    assert_eq!(lock(&output.0).as_slice(), b"x");
}

#[test]
fn more_input_than_fits_is_refused() {
    let mut state = Port.fresh().uart.state();
    state.in_buffer = vec![0; FIFO_BYTES + 1];
    let section = Section::encode(0, &SavedSerial::from(state)).unwrap();
    assert!(matches!(
        Port.fresh().restore(&section),
        Err(Error::Impossible { .. })
    ));
}
