use std::{fs::File, io::Write, os::fd::OwnedFd, sync::Mutex};

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_STATUS,
};

use super::*;
use crate::{
    BusDevice, ConsoleInput, Device, EventLoop,
    conformance::{PATIENCE, Subject, conforms},
    event_loop::drain,
    sync::lock,
    virtio::{
        MMIO_BYTES, MmioTransport,
        driver::{self, AVAILABLE_INDEX, Driver, Part, QUEUE_BYTES, VERSION_1, begin, get, set},
    },
};

/// What the sink got, write by write.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<Vec<u8>>>>);

impl Written {
    fn all(&self) -> Vec<u8> {
        lock(&self.0).concat()
    }
}

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).push(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Takes so many bytes, and then fails.
struct Breaks(usize);

impl Write for Breaks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.0.min(bytes.len()).min(10);
        self.0 -= taken;
        match taken {
            0 => Err(io::ErrorKind::BrokenPipe.into()),
            _ => Ok(taken),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::BrokenPipe.into())
    }
}

fn console(
    sink: impl Write + Send + 'static,
    memory: &GuestMemory,
) -> (MmioTransport, Arc<dyn InputPort>) {
    let console = Console::new(Box::new(sink)).unwrap();
    let input = console.input();
    (driver::transport(console, memory).0, input)
}

/// A driver at work, of the receive queue and of the transmit queue.
fn drivers<'m>(device: &mut MmioTransport, memory: &'m GuestMemory) -> [Driver<'m>; 2] {
    let receive = Driver::start(device, memory, VERSION_1);
    let transmit = receive.of_queue(TRANSMIT as u32);
    [receive, transmit]
}

fn serve(device: &MmioTransport, queue: usize) -> bool {
    lock(device.worker()).process(queue)
}

fn metric(device: &MmioTransport, name: &str) -> u64 {
    let list = device.metrics();
    list.iter().find(|(n, _)| *n == name).unwrap().1
}

/// Longer than what is written in one round.
fn long_text() -> Vec<u8> {
    (0..WRITE_BYTES as u32 + 1000)
        .map(|i| (i ^ (i >> 8)) as u8)
        .collect()
}

/// Guest memory, and what takes the input of the last console that was made.
struct Port(GuestMemory, Mutex<Option<Arc<dyn InputPort>>>);

impl Subject for Port {
    type Device = MmioTransport;
    type Saved = SavedConsole;
    const SPAN: u64 = MMIO_BYTES;

    fn new() -> Self {
        Self(driver::memory(), Mutex::default())
    }

    fn fresh(&self) -> MmioTransport {
        let (device, input) = console(io::sink(), &self.0);
        *lock(&self.1) = Some(input);
        device
    }

    fn work(&self, device: &mut MmioTransport) {
        let [mut receive, mut transmit] = drivers(device, &self.0);
        let input = lock(&self.1).clone().unwrap();
        input.input(b"typed ahead");
        receive.offer(&[Part::In(5)]);
        receive.notify(device);
        transmit.offer(&[Part::Out(&long_text())]);
        assert!(serve(device, TRANSMIT), "it is not unfinished");
    }

    fn go_on(&self, device: &mut MmioTransport) {
        device.resume();
        serve(device, RECEIVE);
        serve(device, TRANSMIT);
    }
}

conforms!(conformance, super::Port);

#[test]
fn a_print_of_any_length_is_one_notification_and_one_write() {
    let (memory, written) = (driver::memory(), Written::default());
    let (mut device, _) = console(written.clone(), &memory);
    let [_, mut transmit] = drivers(&mut device, &memory);
    driver::serve_notified(&mut device);
    let text = &long_text()[..WRITE_BYTES];
    let parts = text.chunks(5000).map(Part::Out).collect::<Vec<_>>();
    let before = metric(&device, "rounds");
    assert_eq!(transmit.request(&mut device, &parts), (0, vec![]));
    assert_eq!(*lock(&written.0), [text]);
    assert_eq!(metric(&device, "rounds"), before + 1);
    assert_eq!(metric(&device, "output_bytes"), WRITE_BYTES as u64);
    assert_eq!(
        transmit.request(&mut device, &[Part::In(8)]),
        (0, vec![vec![0; 8]])
    );
}

#[test]
fn a_long_print_is_written_once_whatever_comes_between() {
    let (memory, written) = (driver::memory(), Written::default());
    let (mut device, _) = console(written.clone(), &memory);
    let [_, mut transmit] = drivers(&mut device, &memory);
    let text = long_text();
    transmit.offer(&[Part::Out(&text[..9]), Part::Out(&text[9..])]);
    transmit.offer(&[Part::Out(b"!")]);
    assert!(serve(&device, TRANSMIT));
    assert_eq!(transmit.used(), 0);
    assert_eq!(written.all(), text[..WRITE_BYTES]);
    let section = device.save(0).unwrap();
    drop(device);
    // Another process's console goes on where that one ended.
    let (mut restored, _) = console(written.clone(), &memory);
    restored.restore(&section).unwrap();
    assert!(!serve(&restored, TRANSMIT));
    assert_eq!(transmit.used(), 2);
    assert_eq!(written.all(), [&text[..], b"!"].concat());
}

#[test]
fn what_a_driver_takes_back_keeps_nobody_busy_and_a_new_queue_begins_with_its_own() {
    let (memory, written) = (driver::memory(), Written::default());
    let (mut device, _) = console(written.clone(), &memory);
    let [_, mut transmit] = drivers(&mut device, &memory);
    transmit.offer(&[Part::Out(&long_text())]);
    assert!(serve(&device, TRANSMIT));
    let index = AVAILABLE_INDEX + TRANSMIT as u64 * QUEUE_BYTES;
    transmit.store(index, 0u16);
    assert!(!serve(&device, TRANSMIT));
    // What it makes available instead has been written as far as the other was.
    transmit.offer(&[Part::Out(b"gone")]);
    assert!(!serve(&device, TRANSMIT));
    assert_eq!(transmit.used(), 1);

    transmit.offer(&[Part::Out(&long_text())]);
    assert!(serve(&device, TRANSMIT));
    let before = written.all().len();
    set(&mut device, VIRTIO_MMIO_QUEUE_SEL, TRANSMIT as u32);
    for ready in [0, 1] {
        set(&mut device, VIRTIO_MMIO_QUEUE_READY, ready);
    }
    transmit.describe(0, 0xb_0000, 4, 0, 0);
    transmit.store(index, [1u16, 0]);
    transmit.notify(&mut device);
    assert_eq!(written.all().len(), before + 4);
}

#[test]
fn a_broken_sink_loses_bytes_and_nothing_else() {
    let memory = driver::memory();
    let (mut device, _) = console(Breaks(25), &memory);
    let [_, mut transmit] = drivers(&mut device, &memory);
    for _ in 0..2 {
        transmit.request(&mut device, &[Part::Out(&[b'x'; 100])]);
    }
    assert_eq!(metric(&device, "output_bytes"), 25);
    assert_eq!(metric(&device, "lost_output_bytes"), 175);
}

#[test]
fn a_byte_is_printed_without_a_driver() {
    let (memory, written) = (driver::memory(), Written::default());
    let (mut device, _) = console(written.clone(), &memory);
    set(
        &mut device,
        VIRTIO_MMIO_CONFIG + 8,
        u32::from_le_bytes(*b"!abc"),
    );
    device.write(u64::from(VIRTIO_MMIO_CONFIG) + 8, b"?");
    for other in [0, 4, 9, 12] {
        set(&mut device, VIRTIO_MMIO_CONFIG + other, 0x2a2a_2a2a);
    }
    assert_eq!(written.all(), b"!?");
    assert_eq!(get(&mut device, VIRTIO_MMIO_CONFIG + 8), 0);
}

#[test]
fn no_more_is_kept_than_there_is_room_for_and_who_has_more_is_told_when_there_is() {
    let memory = driver::memory();
    let (mut device, input) = console(io::sink(), &memory);
    let room = input.room().unwrap();
    assert_eq!(input.input_room(), TYPED_BYTES);
    assert_eq!(input.input(&[7; TYPED_BYTES - 2]), TYPED_BYTES - 2);
    assert_eq!(input.input(&[8; 40]), 2);
    assert_eq!((input.input_room(), input.input(b"x")), (0, 0));
    let [mut receive, _] = drivers(&mut device, &memory);
    assert!(room.read().is_err(), "there is no room yet");
    let (len, got) = receive.request(&mut device, &[Part::In(3), Part::In(2)]);
    assert_eq!((len, got), (5, vec![vec![7; 3], vec![7; 2]]));
    assert_eq!(room.read().unwrap(), 1);
    let (len, got) = receive.request(&mut device, &[Part::In(TYPED_BYTES)]);
    assert_eq!(len as usize, TYPED_BYTES - 5);
    assert_eq!(got[0][TYPED_BYTES - 8..][..4], [7, 8, 8, 0]);
    assert!(room.read().is_err(), "nobody waits");
    assert_eq!(metric(&device, "input_bytes"), TYPED_BYTES as u64);
}

#[test]
fn what_was_typed_outlives_a_reset_and_a_restore() {
    let memory = driver::memory();
    let (mut device, input) = console(io::sink(), &memory);
    input.input(b"typed ahead");
    let [mut receive, mut transmit] = drivers(&mut device, &memory);
    receive.request(&mut device, &[Part::In(5)]);
    transmit.offer(&[Part::Out(&long_text())]);
    assert!(serve(&device, TRANSMIT));
    set(&mut device, VIRTIO_MMIO_STATUS, 0);
    let section = device.save(0).unwrap();
    let saved: SavedConsole = section.decode().unwrap();
    assert_eq!((saved.written_bytes, &saved.input[..]), (0, &b" ahead"[..]));

    let (mut restored, input) = console(io::sink(), &memory);
    input.input(b"of another time");
    restored.restore(&section).unwrap();
    let [mut receive, _] = drivers(&mut restored, &memory);
    let (len, got) = receive.request(&mut restored, &[Part::In(100)]);
    assert_eq!((len, &got[0][..6]), (6, &b" ahead"[..]));
}

#[test]
fn who_waits_for_room_in_a_console_that_is_restored_is_told() {
    let memory = driver::memory();
    let (mut device, input) = console(io::sink(), &memory);
    let section = device.save(0).unwrap();
    input.input(&[7; TYPED_BYTES]);
    assert_eq!(input.input_room(), 0);
    device.restore(&section).unwrap();
    assert_eq!(input.room().unwrap().read().unwrap(), 1);
    assert_eq!(input.input_room(), TYPED_BYTES);
}

#[test]
fn more_than_can_be_kept_is_no_state() {
    let memory = driver::memory();
    let (mut device, input) = console(io::sink(), &memory);
    input.input(&[7; TYPED_BYTES]);
    let section = device.save(0).unwrap();
    device.restore(&section).unwrap();
    let mut saved: SavedConsole = section.decode().unwrap();
    saved.input.push(7);
    let error = device.restore(&Section::encode(0, &saved).unwrap());
    assert!(error.unwrap_err().to_string().contains("4097 bytes"));
}

#[test]
fn a_buffer_without_room_breaks_a_rule() {
    let memory = driver::memory();
    let (mut device, input) = console(io::sink(), &memory);
    let [mut receive, _] = drivers(&mut device, &memory);
    input.input(b"x");
    receive.offer(&[Part::Out(b"no room")]);
    receive.notify(&mut device);
    assert_ne!(get(&mut device, VIRTIO_MMIO_STATUS) & 0x40, 0);
}

#[test]
fn all_that_is_typed_arrives_in_order_however_late_the_driver_begins() {
    let memory = driver::memory();
    let (output, mut typist) = io::pipe().unwrap();
    let (device, port) = console(io::sink(), &memory);
    let device = Arc::new(Mutex::new(device));
    let input = ConsoleInput {
        source: File::from(OwnedFd::from(output)),
        port,
    };
    let (event_loop, quiesced) = EventLoop::spawn(&[Arc::clone(&device)], Some(input)).unwrap();
    drop(quiesced);
    let sent: Vec<u8> = (0..5 * TYPED_BYTES as u32)
        .map(|i| (i ^ (i >> 8)) as u8)
        .collect();
    typist.write_all(&sent).unwrap();
    let mut receive = Driver::prepare(&mut lock(&device), &memory, VERSION_1);
    // It has its first buffers there before it begins, and never notifies for them.
    let mut places: Vec<_> = (0..3)
        .map(|_| receive.offer(&[Part::In(1000)])[0])
        .collect();
    begin(&mut lock(&device));
    let mut received = Vec::new();
    let start = std::time::Instant::now();
    for nth in 0.. {
        if received.len() == sent.len() {
            break;
        }
        while receive.used() == nth {
            assert!(start.elapsed() < PATIENCE, "{} bytes", received.len());
            std::thread::yield_now();
        }
        let len = receive.used_len(nth) as usize;
        received.extend(receive.bytes(places[usize::from(nth)], len));
        places.push(receive.offer(&[Part::In(1000)])[0]);
        set(&mut lock(&device), VIRTIO_MMIO_QUEUE_NOTIFY, RECEIVE as u32);
    }
    assert_eq!(received, sent);
    // There is room already when this comes, and no notification.
    let nth = receive.used();
    typist.write_all(b"more").unwrap();
    while receive.used() == nth {
        assert!(start.elapsed() < PATIENCE, "it does not hear of it");
        std::thread::yield_now();
    }
    assert_eq!(receive.bytes(places[usize::from(nth)], 4), b"more");
    event_loop.stop(PATIENCE).unwrap();
}

#[test]
fn before_a_save_all_is_printed_and_what_is_typed_stays() {
    let (memory, written) = (driver::memory(), Written::default());
    let (mut device, input) = console(written.clone(), &memory);
    let [mut receive, mut transmit] = drivers(&mut device, &memory);
    receive.offer(&[Part::In(10)]);
    input.input(b"typed");
    let text = long_text();
    transmit.offer(&[Part::Out(&text)]);
    let soon = std::time::Instant::now() + PATIENCE;
    assert!(drain(&[Arc::clone(device.worker())], soon, soon));
    assert_eq!((receive.used(), transmit.used()), (0, 1));
    assert_eq!(written.all(), text);
    serve(&device, RECEIVE);
    assert_eq!(receive.used(), 1);
}
