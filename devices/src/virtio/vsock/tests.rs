mod bench;
mod ends;

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    sync::Mutex,
    time::Instant,
};

use proptest::prelude::*;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_STATUS,
};
use vm_memory::Bytes;

use super::{
    host::MAX_CONNECTIONS,
    packet::{NO_RECEIVE, NO_SEND, Ports},
    *,
};
use crate::{
    BusDevice, Device, EventLoop,
    conformance::{PATIENCE, conforms},
    sync::lock,
    virtio::driver::{self, Driver, Part, VERSION_1},
};

use bench::*;

conforms!(conformance, super::bench::Listening);

#[test]
fn a_guest_connects_to_who_listens_and_bytes_go_both_ways() {
    let mut bench = Bench::new();
    let (ports, mut stream) = bench.connected();
    bench.give(ports, DATA, |_| {}, b"there");
    assert_eq!(read(&stream), b"there");
    stream.write_all(b"and back").unwrap();
    let (header, data) = bench.get().unwrap();
    assert_eq!((header.operation, &*data), (DATA, &b"and back"[..]));
    assert_eq!(header.forwarded, 5);
    assert_eq!(
        header.ports(),
        Ports {
            host: 1024,
            guest: 52
        }
    );
    bench.give(
        ports,
        SHUTDOWN,
        |header| header.flags = NO_SEND | NO_RECEIVE,
        &[],
    );
    bench.expect(RESET);
    assert!(at_end(&stream));
    assert!(bench.get().is_none());
}

#[test]
fn the_host_connects_to_a_port_of_the_guest() {
    let mut bench = Bench::new();
    let mut stream = bench.dial("CONNECT 1234\nearly");
    let request = bench.expect(REQUEST);
    assert_eq!(request.dst_port, 1234);
    assert!(request.src_port >= 1 << 30);
    assert!(
        bench.get().is_none(),
        "nothing before the guest has accepted"
    );
    let ports = Ports {
        host: request.src_port,
        guest: 1234,
    };
    bench.say(ports, RESPONSE);
    assert_eq!(read(&stream), format!("OK {}\n", ports.host).as_bytes());
    assert_eq!(bench.get().unwrap().1, b"early");
    stream.write_all(b"late").unwrap();
    assert_eq!(bench.get().unwrap().1, b"late");
    // Another has a port of its own; one that the guest refuses ends.
    let refused = bench.dial("CONNECT 1234\n");
    let request = bench.expect(REQUEST);
    assert_ne!(request.src_port, ports.host);
    let other = Ports {
        host: request.src_port,
        guest: 1234,
    };
    bench.say(other, RESET);
    assert!(at_end(&refused));
}

#[test]
fn no_device_begins_with_the_ports_of_another() {
    let ports = [(); 2].map(|()| {
        let mut bench = Bench::new();
        let _stream = bench.dial("CONNECT 1\n");
        bench.expect(REQUEST).src_port
    });
    assert!(ports.iter().all(|port| *port >= 1 << 30));
    assert_ne!(ports[0], ports[1]);
}

#[test]
fn who_does_not_say_where_to_is_not_connected() {
    let mut bench = Bench::new();
    for greeting in [
        "HELLO\n",
        "CONNECT\n",
        "CONNECT -1\n",
        "CONNECT 4294967296\n",
        &"x".repeat(40),
    ] {
        let mut stream = bench.dial(greeting);
        assert!(bench.get().is_none());
        // What it has said and nobody has read may make its end an error.
        assert!(!matches!(stream.read(&mut [0]), Err(e) if e.kind() == io::ErrorKind::WouldBlock));
    }
    let mut slow = bench.dial("CONN");
    assert!(bench.get().is_none());
    slow.write_all(b"ECT 9\n").unwrap();
    assert_eq!(bench.expect(REQUEST).dst_port, 9);
}

#[test]
fn what_is_no_connection_is_reset() {
    let mut bench = Bench::new();
    let ports = Ports { host: 53, guest: 1 };
    for operation in [REQUEST, RESPONSE, SHUTDOWN, DATA, CREDIT_UPDATE, 7, 0, 99] {
        bench.say(ports, operation);
        let reset = bench.expect(RESET);
        assert_eq!((reset.src_port, reset.dst_port), (53, 1));
    }
    // A reset is no question; what is not from this guest or not for the host is nobody's.
    bench.say(ports, RESET);
    bench.give(ports, DATA, |header| header.dst_cid = 9, &[]);
    bench.give(ports, DATA, |header| header.src_cid = 9, &[]);
    assert!(bench.get().is_none());
    bench.give(ports, DATA, |header| header.kind = 2, &[]);
    bench.expect(RESET);
    assert!(!bench.broken());
}

#[test]
fn an_answer_does_not_wait_for_the_next_notification() {
    let mut bench = Bench::new();
    assert!(bench.get().is_none(), "and leaves room for the answer");
    bench.say(Ports { host: 53, guest: 1 }, REQUEST);
    assert_eq!(bench.receive.used(), 1);
}

#[test]
fn what_comes_before_the_driver_has_begun_is_served_then() {
    let mut bench = Bench::new();
    let memory = Box::leak(Box::new(bench.memory.clone()));
    bench.receive = Driver::prepare(&mut bench.device, memory, VERSION_1);
    bench.receive.offer(&[Part::In(4096)]);
    bench.receive.notify(&mut bench.device);
    let _stream = bench.dial("CONNECT 5\n");
    // As the loop does when it hears of it.
    lock(bench.device.worker()).process(RECEIVE);
    assert_eq!(bench.receive.used(), 0);
    driver::begin(&mut bench.device);
    driver::serve_notified(&mut bench.device);
    assert_eq!(bench.receive.used(), 1);
}

#[test]
fn the_guest_is_sent_no_more_than_it_has_room_for() {
    let mut bench = Bench::new();
    let (ports, mut stream) = bench.connected();
    let sent: Vec<u8> = (0..2500u32).map(|i| (i * 7 / 3) as u8).collect();
    stream.write_all(&sent).unwrap();
    let mut got = bench.get().unwrap().1;
    assert_eq!(got.len(), ROOM as usize);
    assert!(bench.get().is_none());
    let taken = got.len() as u32;
    bench.give(ports, CREDIT_UPDATE, |header| header.forwarded = taken, &[]);
    got.extend(bench.get().unwrap().1);
    let taken = got.len() as u32;
    bench.give(ports, CREDIT_UPDATE, |header| header.forwarded = taken, &[]);
    got.extend(bench.get().unwrap().1);
    assert_eq!(got, sent);
}

#[test]
fn what_the_host_does_not_take_is_kept_within_bounds() {
    let mut bench = Bench::new();
    let (ports, stream) = bench.connected();
    let sent = bench.fill(ports);
    let got = bench.read_all(&stream);
    assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
    assert_eq!(bench.expect(CREDIT_UPDATE).forwarded, sent.len() as u32);
}

#[test]
fn what_was_sent_before_a_reset_reaches_who_reads_slowly() {
    let mut bench = Bench::new();
    let (ports, slow) = bench.connected();
    let sent = bench.fill(ports);
    let both = NO_SEND | NO_RECEIVE;
    bench.give(ports, SHUTDOWN, |header| header.flags = both, &[]);
    bench.say(ports, RESET);
    // The guest has the ports for another connection, which is none of the one before.
    let (ports, other) = bench.connected();
    let got = bench.read_all(&slow);
    assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
    assert!(at_end(&slow));
    bench.give(ports, DATA, |_| {}, b"new");
    assert_eq!(read(&other), b"new");
    assert!(bench.get().is_none());
}

/// A stream, and all that the guest has sent there.
type Sent = (UnixStream, Vec<u8>);

/// A device without room for another stream. The guest has given up two, the older first, and their readers have not taken all. The
/// others have not said yet where they want to go.
fn full() -> (Bench, [Sent; 2], Vec<UnixStream>) {
    let mut bench = Bench::new();
    let over = [(); 2].map(|()| {
        let (ports, stream) = bench.connected();
        let sent = bench.fill(ports);
        bench.say(ports, RESET);
        (stream, sent)
    });
    let waiting = (over.len()..MAX_CONNECTIONS)
        .map(|_| {
            let stream = bench.dial("CONN");
            lock(bench.device.worker()).process(RECEIVE);
            stream
        })
        .collect();
    (bench, over, waiting)
}

#[test]
fn what_nobody_reads_any_more_makes_room() {
    let (mut bench, [(slow, sent), (gone, _)], _waiting) = full();
    drop(gone);
    lock(bench.device.worker()).process(RECEIVE);
    bench.connected();
    assert!(bench.read_all(&slow) == sent);
}

#[test]
fn a_new_connection_takes_the_place_of_the_oldest_that_the_guest_has_given_up() {
    let (mut bench, [(oldest, cut), (slow, sent)], waiting) = full();
    let (ports, one) = bench.connected();
    assert!(bench.read_all(&oldest).len() < cut.len());
    assert!(at_end(&oldest));
    // One that does not come about takes none.
    bench.say(Ports { host: 53, guest: 1 }, REQUEST);
    bench.expect(RESET);
    let other = bench.dial("CONNECT 9\n");
    bench.expect(REQUEST);
    assert!(bench.read_all(&slow).len() < sent.len());
    assert!(at_end(&slow));
    // Those that are the guest's, or may become so, stay.
    let refused = bench.dial("CONNECT 9\n");
    assert!(bench.get().is_none());
    assert!(at_end(&refused));
    assert!(!waiting.iter().chain([&other]).any(at_end));
    bench.give(ports, DATA, |_| {}, b"still");
    assert_eq!(read(&one), b"still");
}

#[test]
fn a_reset_of_the_device_does_not_wait_for_who_reads_slowly() {
    let mut bench = Bench::new();
    let (ports, slow) = bench.connected();
    let sent = bench.fill(ports);
    bench.say(ports, RESET);
    driver::set(&mut bench.device, VIRTIO_MMIO_STATUS, 0);
    assert!(read(&slow).len() < sent.len());
    assert!(at_end(&slow));
}

#[test]
fn a_guest_that_overruns_its_credit_is_reset_and_nothing_else() {
    let mut bench = Bench::new();
    let (ports, stream) = bench.connected();
    let mut reset = false;
    // The socket takes some; a guest that never looks at its credit overruns it.
    for _ in 0..10_000 {
        bench.give(ports, DATA, |_| {}, &[1; 4000]);
        if let Some((header, _)) = bench.get()
            && header.operation == RESET
        {
            reset = true;
            break;
        }
    }
    assert!(reset && !bench.broken());
    bench.read_all(&stream);
    assert!(at_end(&stream));
}

#[test]
fn either_side_may_stop_sending_and_go_on_receiving() {
    let mut bench = Bench::new();
    let (ports, mut stream) = bench.connected();
    bench.give(ports, DATA, |_| {}, b"question");
    bench.give(ports, SHUTDOWN, |header| header.flags = NO_SEND, &[]);
    assert_eq!(read(&stream), b"question");
    assert!(at_end(&stream));
    stream.write_all(b"answer").unwrap();
    assert_eq!(bench.get().unwrap().1, b"answer");
    drop(stream);
    bench.expect(RESET);

    let (ports, stream) = bench.connected();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(bench.expect(SHUTDOWN).flags, NO_SEND);
    bench.give(ports, DATA, |_| {}, b"still");
    assert_eq!(read(&stream), b"still");
    bench.give(ports, SHUTDOWN, |header| header.flags = NO_SEND, &[]);
    bench.expect(RESET);
}

#[test]
fn a_restored_guest_is_told_and_its_ports_are_listened_on() {
    let mut bench = Bench::new();
    let (_, stream) = bench.connected();
    let mut events = bench.receive.of_queue(2);
    let place = events.offer(&[Part::In(4)])[0];
    bench.memory.write_obj(u32::MAX, place).unwrap();
    lock(bench.device.worker()).process(EVENT);
    assert_eq!(events.used(), 0);
    let section = Device::save(&bench.device, 0).unwrap();
    let other = bench.path("other");
    let vsock = Vsock::listen(9, &other).unwrap();
    let mut restored = driver::transport(vsock, &bench.memory).0;
    Device::restore(&mut restored, &section).unwrap();
    bench.device = restored;
    assert!(at_end(&stream));
    assert!(!bench.path("v").exists(), "the socket goes with its device");
    lock(bench.device.worker()).process(EVENT);
    assert_eq!((events.used(), events.used_len(0)), (1, 4));
    assert_eq!(events.bytes(place, 4), [0; 4]);
    let mut cid = [0; 8];
    bench.device.read(0x100, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 9);
    // Once is enough.
    events.offer(&[Part::In(4)]);
    lock(bench.device.worker()).process(EVENT);
    assert_eq!(events.used(), 1);
    let mut stream = UnixStream::connect(other).unwrap();
    stream.write_all(b"CONNECT 5\n").unwrap();
    let before = bench.receive.used();
    bench.receive.offer(&[Part::In(4096)]);
    bench.receive.notify(&mut bench.device);
    assert_eq!(bench.receive.used(), before + 1);
}

/// A machine that goes on from a state in which its driver had room for a packet, and for an event or not, or did not even use the
/// queue for those. Somebody has connected before the loop looks at it.
fn restored(event_queue: bool, event_room: bool) -> (Bench, Driver<'static>, UnixStream) {
    let mut bench = Bench::new();
    bench.receive.offer(&[Part::In(4096)]);
    let mut events = bench.receive.of_queue(2);
    if event_room {
        events.offer(&[Part::In(4)]);
    }
    driver::set(&mut bench.device, VIRTIO_MMIO_QUEUE_SEL, 2);
    driver::set(
        &mut bench.device,
        VIRTIO_MMIO_QUEUE_READY,
        event_queue.into(),
    );
    let section = Device::save(&bench.device, 0).unwrap();
    let other = bench.path("other");
    let vsock = Vsock::listen(CID, &other).unwrap();
    bench.device = driver::transport(vsock, &bench.memory).0;
    Device::restore(&mut bench.device, &section).unwrap();
    let mut stream = UnixStream::connect(other).unwrap();
    stream.write_all(b"CONNECT 5\n").unwrap();
    lock(bench.device.worker()).process(RECEIVE);
    (bench, events, stream)
}

#[test]
fn a_restored_guest_is_told_before_it_is_asked_for_connections() {
    let (mut bench, mut events, _stream) = restored(true, true);
    assert_eq!((bench.receive.used(), events.used()), (0, 0));
    for queue in [EVENT, RECEIVE] {
        lock(bench.device.worker()).process(queue);
        driver::serve_notified(&mut bench.device);
        assert_eq!((bench.receive.used(), events.used()), (0, 1));
    }
    // It has handled it when it gives the buffer back.
    events.offer(&[Part::In(4)]);
    lock(bench.device.worker()).process(EVENT);
    driver::serve_notified(&mut bench.device);
    assert_eq!((bench.receive.used(), events.used()), (1, 1));
}

#[test]
fn a_restored_guest_that_gives_its_queue_for_events_up_hears_of_everything() {
    let (mut bench, events, _stream) = restored(true, true);
    lock(bench.device.worker()).process(EVENT);
    assert_eq!((bench.receive.used(), events.used()), (0, 1));
    driver::set(&mut bench.device, VIRTIO_MMIO_QUEUE_SEL, 2);
    driver::set(&mut bench.device, VIRTIO_MMIO_QUEUE_READY, 0);
    // As the timer has it looked at.
    lock(bench.device.worker()).process(RECEIVE);
    assert_eq!(bench.receive.used(), 1);
}

#[test]
fn the_loop_finds_by_itself_that_a_driver_has_handled_the_news_or_will_not_tell() {
    for mut gives_back in [true, false] {
        let (bench, mut events, _stream) = restored(true, true);
        let device = Arc::new(Mutex::new(bench.device));
        let (event_loop, quiesced) = EventLoop::spawn(&[Arc::clone(&device)], None).unwrap();
        drop(quiesced);
        let late = Instant::now() + PATIENCE;
        while bench.receive.used() == 0 {
            assert!(Instant::now() < late, "nothing comes any more");
            if events.used() == 1 && std::mem::take(&mut gives_back) {
                events.offer(&[Part::In(4)]);
            }
        }
        assert_eq!(events.used(), 1);
        event_loop.stop(PATIENCE).unwrap();
    }
}

#[test]
fn a_restored_guest_that_takes_no_events_is_asked_all_the_same() {
    for event_queue in [true, false] {
        let (mut bench, events, _stream) = restored(event_queue, false);
        lock(bench.device.worker()).process(EVENT);
        driver::serve_notified(&mut bench.device);
        assert_eq!((bench.receive.used(), events.used()), (1, 0));
    }
}

#[test]
fn connections_end_when_a_device_in_use_is_restored() {
    let mut bench = Bench::new();
    let section = bench.device.save(0).unwrap();
    let (_, stream) = bench.connected();
    bench.device.restore(&section).unwrap();
    assert!(at_end(&stream));
}

#[test]
fn a_driver_that_breaks_a_rule_needs_a_reset_and_its_connections_end() {
    let mut bench = Bench::new();
    let (_, stream) = bench.connected();
    bench.send.offer(&[Part::Out(&[0; HEADER_BYTES - 1])]);
    bench.send.notify(&mut bench.device);
    assert!(bench.broken());
    let header = Header {
        len: 1,
        ..Header::default()
    };
    for packet in [vec![0; 3], header.encode()] {
        bench.send = Driver::start(
            &mut bench.device,
            Box::leak(Box::new(bench.memory.clone())),
            VERSION_1,
        )
        .of_queue(1);
        assert!(!bench.broken());
        bench.send.offer(&[Part::Out(&packet)]);
        bench.send.notify(&mut bench.device);
        assert!(bench.broken());
    }
    assert!(at_end(&stream));
}

#[test]
fn there_are_no_more_connections_than_there_may_be() {
    let mut bench = Bench::new();
    let mut streams = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        streams.push(bench.dial("CONN"));
        lock(bench.device.worker()).process(RECEIVE);
    }
    assert!(bench.get().is_none());
    let one_more = bench.dial("CONN");
    lock(bench.device.worker()).process(RECEIVE);
    assert!(at_end(&one_more));
    let _listener = UnixListener::bind(bench.path("v_52")).unwrap();
    bench.say(Ports { host: 52, guest: 1 }, REQUEST);
    bench.expect(RESET);
    // One that goes makes room.
    streams.pop();
    lock(bench.device.worker()).process(RECEIVE);
    bench.say(Ports { host: 52, guest: 1 }, REQUEST);
    bench.expect(RESPONSE);
}

#[test]
fn a_socket_that_was_left_behind_is_replaced_and_one_in_use_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    drop(UnixListener::bind(&path).unwrap());
    let vsock = Vsock::listen(3, &path).unwrap();
    let refused = Vsock::listen(4, &path).err().unwrap();
    assert!(matches!(refused, VsockError::InUse(_)), "{refused}");
    drop(vsock);
    assert!(!path.exists());
    std::fs::write(&path, "precious").unwrap();
    assert!(Vsock::listen(3, &path).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    for cid in [0, 2, u64::from(u32::MAX), u64::MAX] {
        let refused = Vsock::listen(cid, &directory.path().join("w")).err();
        assert!(matches!(refused, Some(VsockError::Cid(_))));
    }
}

#[test]
fn the_loop_serves_streams() {
    let bench = Bench::new();
    let Bench {
        directory,
        device,
        mut receive,
        ..
    } = bench;
    let device = Arc::new(Mutex::new(device));
    let (event_loop, quiesced) = EventLoop::spawn(&[Arc::clone(&device)], None).unwrap();
    drop(quiesced);
    for used in 1..=3 {
        receive.offer(&[Part::In(4096)]);
        let mut stream = UnixStream::connect(directory.path().join("v")).unwrap();
        stream.write_all(b"CONNECT 5\n").unwrap();
        let begin = Instant::now();
        while receive.used() < used {
            assert!(begin.elapsed() < PATIENCE);
            std::thread::yield_now();
        }
    }
    event_loop.stop(PATIENCE).unwrap();
}

proptest! {
    /// Whatever packets a guest sends: the device lives, and keeps its bounds.
    #[test]
    fn no_packets_do_harm(
        packets in prop::collection::vec((0u16..9, 0u32..4, 0u32..3, any::<[u32; 3]>(), 0usize..200), 1..60),
    ) {
        let mut bench = Bench::new();
        let _listener = UnixListener::bind(bench.path("v_1")).unwrap();
        let stream = bench.dial("CONNECT 2\n");
        let host_port = bench.expect(REQUEST).src_port;
        for (operation, host, guest, [flags, buffer_bytes, forwarded], len) in packets {
            let change = |header: &mut Header| {
                header.flags = flags;
                header.buffer_bytes = buffer_bytes;
                header.forwarded = forwarded;
                if host == 3 {
                    header.dst_port = host_port;
                }
            };
            bench.give(Ports { host, guest }, operation, change, &vec![1; len]);
            while bench.get().is_some() {}
        }
        prop_assert!(!bench.broken());
        drop(stream);
        while bench.get().is_some() {}
    }
}

/// A guest that offers no buffers takes no answers: what waits for it must not grow with what it asks.
#[test]
fn connections_that_the_guest_gives_up_leave_nothing_that_waits() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let _listener = UnixListener::bind(path("v_52")).unwrap();
    let mut host = host::Host::listen(&path("v"), std::sync::Arc::default()).unwrap();
    for guest in 0..100 {
        for operation in [REQUEST, RESET] {
            let header = Header {
                src_cid: CID,
                dst_cid: HOST_CID,
                src_port: guest,
                dst_port: 52,
                kind: STREAM,
                operation,
                buffer_bytes: ROOM,
                ..Header::default()
            };
            host.take(&header, |_| Vec::new());
        }
    }
    assert!(!host.has_due());
}
