use std::{fs::File, io::Write, os::fd::OwnedFd};

use memory::GuestMemory;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;

use super::*;
use crate::{
    BusDevice, Serial,
    conformance::{Line, PATIENCE},
    virtio::{
        driver::{self, Driver, Part, VERSION_1, set},
        entropy::Entropy,
    },
};

const SHORT: Duration = Duration::from_millis(50);

struct Machine {
    transport: Arc<Mutex<MmioTransport>>,
    memory: GuestMemory,
    line: Arc<Line>,
}

impl Machine {
    fn new() -> Self {
        let memory = driver::memory();
        let (transport, line) = driver::transport(Entropy::new(), &memory);
        Self {
            transport: Arc::new(Mutex::new(transport)),
            memory,
            line,
        }
    }

    fn spawn(&self) -> (EventLoop, Quiesced) {
        EventLoop::spawn(&[Arc::clone(&self.transport)], None).unwrap()
    }

    fn driver(&self) -> Driver<'_> {
        Driver::start(&mut lock(&self.transport), &self.memory, VERSION_1)
    }

    fn notify(&self) {
        set(&mut lock(&self.transport), VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    }
}

#[test]
fn a_notified_queue_is_served_and_interrupts() {
    let machine = Machine::new();
    let (event_loop, quiesced) = machine.spawn();
    drop(quiesced);
    let mut driver = machine.driver();
    for served in 1..=3 {
        driver.offer(&[Part::In(8)]);
        machine.notify();
        machine.line.wait();
        assert_eq!(driver.used(), served);
    }
    event_loop.stop(PATIENCE).unwrap();
}

#[test]
fn what_the_loop_has_heard_of_before_a_driver_begins_is_served_then() {
    let machine = Machine::new();
    let (event_loop, quiesced) = machine.spawn();
    drop(quiesced);
    let mut driver = Driver::prepare(&mut lock(&machine.transport), &machine.memory, VERSION_1);
    driver.offer(&[Part::In(8)]);
    machine.notify();
    // Once the loop answers it has heard of the notification, which came first.
    let (answer, answered) = mpsc::channel();
    event_loop
        .endpoint
        .fire(move |_| answer.send(()).unwrap())
        .unwrap();
    answered.recv_timeout(PATIENCE).unwrap();
    assert_eq!(driver.used(), 0);
    driver::begin(&mut lock(&machine.transport));
    machine.line.wait();
    assert_eq!(driver.used(), 1);
    event_loop.stop(PATIENCE).unwrap();
}

#[test]
fn it_starts_quiesced_and_looks_at_all_queues_when_it_goes_on() {
    let machine = Machine::new();
    let (event_loop, quiesced) = machine.spawn();
    let mut driver = machine.driver();
    // As after a restore: available, but the notification was the other machine's.
    driver.offer(&[Part::In(8)]);
    drop(quiesced);
    machine.line.wait();
    assert_eq!(driver.used(), 1);
    event_loop.stop(PATIENCE).unwrap();
}

#[test]
fn a_quiesce_serves_what_is_available_and_then_nothing() {
    let machine = Machine::new();
    let (event_loop, quiesced) = machine.spawn();
    let mut driver = machine.driver();
    drop(quiesced);
    // Once the loop answers it has looked at the queues for the last time before it is quiesced.
    let (answer, answered) = mpsc::channel();
    event_loop
        .endpoint
        .fire(move |_| answer.send(()).unwrap())
        .unwrap();
    answered.recv_timeout(PATIENCE).unwrap();
    driver.offer(&[Part::In(8)]);
    driver.offer(&[Part::In(8)]);
    let quiesced = event_loop.quiesce(PATIENCE).unwrap();
    assert_eq!(driver.used(), 2);
    driver.offer(&[Part::In(8)]);
    machine.notify();
    // Once it has ended it can no longer serve, and it ends without.
    event_loop.stop(PATIENCE).unwrap();
    drop(quiesced);
    assert_eq!(driver.used(), 2);
}

#[test]
fn a_halted_loop_serves_nothing_until_it_goes_on_and_then_looks_at_all_queues() {
    let machine = Machine::new();
    let (event_loop, quiesced) = machine.spawn();
    let mut driver = machine.driver();
    drop(quiesced);
    let halt = || loop {
        // It may be at work still.
        if let Some(halted) = event_loop.halt() {
            break halted;
        }
    };
    for round in 1..=200 {
        let halted = halt();
        assert!(event_loop.halt().is_none());
        driver.offer(&[Part::In(8)]);
        if round % 2 == 0 {
            machine.notify();
        }
        thread::yield_now();
        assert_eq!(driver.used(), round - 1);
        drop(halted);
        machine.line.wait();
        assert_eq!(driver.used(), round);
    }
    let halted = halt();
    driver.offer(&[Part::In(8)]);
    machine.notify();
    event_loop.stop(PATIENCE).unwrap();
    drop(halted);
    assert_eq!(driver.used(), 200);
}

#[test]
fn it_can_be_quiesced_again_and_again() {
    let machine = Machine::new();
    let (event_loop, quiesced) = machine.spawn();
    drop(quiesced);
    let mut driver = machine.driver();
    for round in 1..=200u16 {
        driver.offer(&[Part::In(8)]);
        machine.notify();
        let quiesced = event_loop.quiesce(PATIENCE).unwrap();
        assert_eq!(driver.used(), round);
        drop(quiesced);
    }
    event_loop.stop(PATIENCE).unwrap();
}

#[test]
fn a_loop_that_is_busy_is_an_error_that_names_it_and_can_be_asked_again() {
    let machine = Machine::new();
    let (event_loop, quiesced) = machine.spawn();
    let worker = Arc::clone(lock(&machine.transport).worker());
    let busy = lock(&worker);
    drop(quiesced);
    let error = event_loop.quiesce(SHORT).unwrap_err();
    assert!(matches!(error, EventLoopError::NotAnswering(SHORT)));
    assert!(error.to_string().contains("thread devices"));
    drop(busy);
    drop(event_loop.quiesce(PATIENCE).unwrap());
    event_loop.stop(PATIENCE).unwrap();
}

#[test]
fn a_loop_that_does_not_end_is_an_error() {
    let machine = Machine::new();
    let (event_loop, quiesced) = machine.spawn();
    drop(quiesced);
    let (busy, is_busy) = mpsc::channel();
    let (finish, finished) = mpsc::channel::<()>();
    event_loop
        .endpoint
        .fire(move |_| {
            busy.send(()).unwrap();
            let _ = finished.recv();
        })
        .unwrap();
    is_busy.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(
        event_loop.stop(SHORT),
        Err(EventLoopError::NotAnswering(SHORT))
    ));
    drop(finish);
}

#[test]
fn a_loop_that_has_ended_says_so() {
    let machine = Machine::new();
    let (event_loop, quiesced) = machine.spawn();
    drop(quiesced);
    event_loop.request_stop();
    assert!(matches!(
        event_loop.ended.recv_timeout(PATIENCE),
        Err(RecvTimeoutError::Disconnected)
    ));
    assert!(matches!(
        event_loop.quiesce(PATIENCE),
        Err(EventLoopError::Ended)
    ));
}

#[test]
fn input_waits_for_room_and_arrives_in_order() {
    let (output, mut input) = io::pipe().unwrap();
    let line = Arc::new(Line::default());
    let serial = Serial::new(line.clone(), Box::new(io::sink())).unwrap();
    let serial = Arc::new(Mutex::new(serial));
    let source = ConsoleInput {
        source: File::from(OwnedFd::from(output)),
        port: Arc::clone(&serial) as _,
    };
    let (event_loop, quiesced) = EventLoop::spawn(&[], Some(source)).unwrap();
    drop(quiesced);
    lock(&serial).write(1, &[1]);
    let sent: Vec<u8> = (0..=255).collect();
    input.write_all(&sent).unwrap();
    drop(input);
    let mut received = Vec::new();
    while received.len() < sent.len() {
        line.wait();
        let mut serial = lock(&serial);
        let mut byte = [0];
        // What the guest's driver does: acknowledge, then read while there is data.
        serial.read(2, &mut byte);
        loop {
            serial.read(5, &mut byte);
            if byte[0] & 1 == 0 {
                break;
            }
            serial.read(0, &mut byte);
            received.push(byte[0]);
        }
    }
    assert_eq!(received, sent);
    event_loop.stop(PATIENCE).unwrap();
}
