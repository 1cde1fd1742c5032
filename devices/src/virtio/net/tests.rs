mod bench;

use std::{
    num::NonZeroU64,
    sync::Mutex,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept, bind,
    listen, recv, send, socket_with, socketpair,
};
use virtio_bindings::virtio_mmio::*;

use super::*;
use crate::{
    BusDevice, Device, EventLoop,
    conformance::{PATIENCE, conforms},
    event_loop::drain,
    sync::lock,
    virtio::{
        MmioTransport,
        driver::{self, Driver, Part, get},
    },
};
use bench::{Bench, EVENT_IDX, PLAIN, frame, options, pair, scripted, with_header};

conforms!(conformance, super::bench::OnScript);

#[test]
fn frames_come_out_as_they_went_in() {
    let mut bench = Bench::new();
    let memory = bench.memory.clone();
    let mut receive = Driver::start(&mut bench.device, &memory, PLAIN);
    let mut sender = receive.of_queue(1);
    for (index, bytes) in [14, 60, 1514].into_iter().enumerate() {
        let there = frame(bytes, index as u8);
        // Cut in an odd place: a driver may.
        let packet = with_header(&there);
        let (head, tail) = packet.split_at(15);
        sender.request(&mut bench.device, &[Part::Out(head), Part::Out(tail)]);
        assert_eq!(bench.pull().unwrap(), there);

        let back = frame(bytes, !(index as u8));
        let before = receive.used();
        let places = receive.offer(&[Part::In(20), Part::In(2000)]);
        bench.push(&back);
        bench.receive();
        assert_eq!(receive.used(), before + 1);
        let len = receive.used_len(before) as usize;
        assert_eq!(len, HEADER_BYTES + bytes);
        let got = [receive.bytes(places[0], 20), receive.bytes(places[1], 2000)].concat();
        assert_eq!(got[..HEADER_BYTES], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(got[HEADER_BYTES..len], back);
    }
    assert_eq!(bench.metric("sent_packets"), 3);
    assert_eq!(bench.metric("received_bytes"), 14 + 60 + 1514);
    assert_eq!(bench.line.edges(), 6);
}

#[test]
fn a_frame_is_spread_over_several_buffers_only_if_that_was_negotiated() {
    let memory = driver::memory();
    for features in [PLAIN, PLAIN | EVENT_IDX] {
        let (mut device, script, line) = scripted(&memory);
        let mut receive = Driver::start(&mut device, &memory, features | MERGEABLE);
        let sent = frame(1000, 5);
        let places: Vec<_> = (0..4).map(|_| receive.offer(&[Part::In(300)])[0]).collect();
        lock(&script).incoming.push(with_header(&sent));
        receive.notify(&mut device);
        assert_eq!((receive.used(), line.edges()), (4, 1));
        let mut got = Vec::new();
        for (nth, place) in places.into_iter().enumerate() {
            let len = receive.used_len(nth as u16) as usize;
            got.extend(receive.bytes(place, len));
        }
        assert_eq!(got[10..12], [4, 0]);
        assert_eq!(got[HEADER_BYTES..], sent);

        let mut receive = Driver::start(&mut device, &memory, features);
        receive.offer(&[Part::In(300)]);
        receive.offer(&[Part::In(2000)]);
        lock(&script).incoming.push(with_header(&sent));
        receive.notify(&mut device);
        assert_eq!(receive.used(), 0, "it goes into the next buffer or none");
    }
}

#[test]
fn without_buffers_one_frame_is_taken_and_the_rest_stays_outside() {
    for features in [PLAIN, PLAIN | EVENT_IDX] {
        let mut bench = Bench::new();
        let memory = bench.memory.clone();
        let mut receive = Driver::start(&mut bench.device, &memory, features | MERGEABLE);
        driver::serve_notified(&mut bench.device);
        receive.offer(&[Part::In(200)]);
        for seed in 0..3 {
            bench.push(&frame(300, seed));
        }
        bench.receive();
        let rounds = bench.metric("rounds");
        assert_eq!(receive.used(), 0);
        assert_eq!(bench.metric("receive_waits"), 1);
        // It has asked to be notified, and has nothing more to do until then.
        driver::serve_notified(&mut bench.device);
        assert_eq!(bench.metric("rounds"), rounds);
        let flags: u16 = receive.load(0x3000);
        assert_eq!(flags, 0);
        if features & EVENT_IDX != 0 {
            let event: u16 = receive.load(driver::AVAILABLE_EVENT);
            assert_eq!(event, 1, "behind the buffer that it has seen");
        }
        for _ in 0..8 {
            receive.offer(&[Part::In(200)]);
        }
        receive.notify(&mut bench.device);
        assert_eq!(receive.used(), 6);
        assert_eq!(bench.metric("received_packets"), 3);
    }
}

#[test]
fn a_frame_that_cannot_fit_does_not_block_those_behind_it() {
    let mut bench = Bench::new();
    let memory = bench.memory.clone();
    let mut receive = Driver::start(&mut bench.device, &memory, PLAIN);
    let place = receive.offer(&[Part::In(200)])[0];
    bench.push(&frame(300, 1));
    bench.push(&frame(100, 2));
    bench.receive();
    assert_eq!((receive.used(), bench.metric("receive_drops")), (1, 1));
    assert_eq!(receive.bytes(place, 112)[HEADER_BYTES..], frame(100, 2));
}

#[test]
fn frames_that_are_none_are_dropped_in_both_directions() {
    let mut bench = Bench::new();
    let memory = bench.memory.clone();
    let mut receive = Driver::start(&mut bench.device, &memory, PLAIN);
    let mut sender = receive.of_queue(1);
    receive.offer(&[Part::In(2000)]);
    bench.push(&frame(13, 1));
    bench.push(&frame(MAX_FRAME_BYTES + 1, 1));
    bench.receive();
    assert_eq!((receive.used(), bench.metric("receive_drops")), (0, 2));
    sender.request(&mut bench.device, &[Part::Out(&with_header(&frame(13, 1)))]);
    let long = with_header(&frame(MAX_FRAME_BYTES + 1, 1));
    sender.request(&mut bench.device, &[Part::Out(&long)]);
    assert_eq!((bench.metric("send_drops"), bench.pull()), (2, None));
    let longest = frame(MAX_FRAME_BYTES, 1);
    sender.request(&mut bench.device, &[Part::Out(&with_header(&longest))]);
    assert_eq!(bench.pull(), Some(longest));
    assert!(!bench.broken());
}

#[test]
fn a_driver_that_breaks_a_rule_needs_a_reset() {
    let asks = |flags: u8, segmentation: u8| {
        let mut packet = with_header(&frame(60, 0));
        packet[..2].copy_from_slice(&[flags, segmentation]);
        packet
    };
    for packet in [
        vec![0; 11],
        asks(1, 0),
        asks(0, 1),
        asks(0, 4),
        asks(0, 3),
        asks(0, 0x80),
    ] {
        let mut bench = Bench::new();
        let memory = bench.memory.clone();
        let mut sender = Driver::start(&mut bench.device, &memory, PLAIN).of_queue(1);
        sender.offer(&[Part::Out(&packet)]);
        sender.notify(&mut bench.device);
        assert!(bench.broken(), "{packet:?}");
        assert_eq!((sender.used(), bench.pull()), (0, None));
    }
    let mut bench = Bench::new();
    let memory = bench.memory.clone();
    let mut receive = Driver::start(&mut bench.device, &memory, PLAIN);
    receive.offer(&[Part::In(11)]);
    bench.push(&frame(60, 0));
    bench.receive();
    assert!(bench.broken(), "a buffer without room for a header");
    // It goes on after a reset, also with what it had taken.
    let mut receive = Driver::start(&mut bench.device, &memory, PLAIN);
    receive.offer(&[Part::In(100)]);
    bench.push(&frame(60, 1));
    bench.receive();
    assert!(!bench.broken());
    assert_eq!(receive.used(), 1);
}

#[test]
fn a_driver_cannot_negotiate_offloads_that_need_others() {
    let memory = driver::memory();
    let (mut device, _, _) = scripted(&memory);
    assert!(driver::negotiate(&mut device, PLAIN | OFFLOADS));
    for direction in [TO_GUEST, FROM_GUEST] {
        for alone in [direction.tso4, direction.tso6, direction.ecn] {
            assert!(!driver::negotiate(&mut device, PLAIN | alone));
        }
        assert!(driver::negotiate(&mut device, PLAIN | direction.checksum));
    }
}

#[test]
fn offloads_are_passed_on_as_negotiated() {
    let memory = driver::memory();
    let (mut device, script, _) = scripted(&memory);
    let features = PLAIN | OFFLOADS;
    let mut receive = Driver::start(&mut device, &memory, features);
    assert_eq!(lock(&script).accepted, features);
    let mut packet = with_header(&frame(3000, 1));
    packet[..10].copy_from_slice(&[1, 4, 54, 0, 0xb4, 5, 34, 0, 16, 0]);
    packet[10] = 9;
    receive
        .of_queue(1)
        .request(&mut device, &[Part::Out(&packet)]);
    packet[10] = 0;
    assert_eq!(lock(&script).sent, [packet.clone()]);

    let place = receive.offer(&[Part::In(4000)])[0];
    lock(&script).incoming.push(packet.clone());
    receive.notify(&mut device);
    packet[10] = 1;
    assert_eq!(receive.bytes(place, packet.len()), packet);
    let metrics = device.metrics();
    for name in ["received_unsegmented", "sent_unsegmented"] {
        assert!(metrics.contains(&(name, 1)), "{name}");
    }

    // Another driver, which wants none of it: what still comes so is dropped, or stripped.
    let mut receive = Driver::start(&mut device, &memory, PLAIN);
    assert_eq!(lock(&script).accepted, PLAIN);
    let place = receive.offer(&[Part::In(4000)])[0];
    let mut valid = with_header(&frame(60, 2));
    valid[0] = 2;
    lock(&script).incoming = vec![valid, packet];
    receive.notify(&mut device);
    assert_eq!(receive.used(), 1);
    assert_eq!(
        receive.bytes(place, 12),
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    );
}

#[test]
fn what_the_other_end_has_no_room_for_waits_in_the_queue() {
    let mut bench = Bench::new();
    let memory = bench.memory.clone();
    let mut sender = Driver::start(&mut bench.device, &memory, PLAIN).of_queue(1);
    let sent = frame(1500, 1);
    let mut offered = 0u16;
    // Until the socket's buffer is full; it holds far less than a million frames.
    while bench.metric("send_waits") == 0 {
        assert!(offered < 10_000);
        sender.offer(&[Part::Out(&with_header(&sent))]);
        sender.notify(&mut bench.device);
        offered += 1;
    }
    assert_eq!(sender.used(), offered - 1);
    for _ in 1..offered {
        assert_eq!(bench.pull().as_ref(), Some(&sent));
    }
    lock(bench.device.worker()).process(SEND);
    assert_eq!(sender.used(), offered);
    assert_eq!(bench.pull(), Some(sent));
    assert_eq!(bench.metric("send_drops"), 0);
}

#[test]
fn a_message_of_no_bytes_is_no_end() {
    let mut bench = Bench::new();
    let memory = bench.memory.clone();
    let mut receive = Driver::start(&mut bench.device, &memory, PLAIN);
    receive.offer(&[Part::In(2000)]);
    bench.push(&[]);
    bench.push(&frame(60, 1));
    bench.receive();
    assert_eq!(receive.used(), 1);
    assert_eq!(bench.metric("receive_drops"), 1);
    assert!(bench.link_is_up());
    // Nor does it hide one.
    bench.push(&[]);
    bench.outside = pair().1;
    bench.receive();
    assert!(!bench.link_is_up());
}

#[test]
fn the_link_goes_down_with_the_other_end_and_the_driver_is_told() {
    let mut bench = Bench::new();
    let memory = bench.memory.clone();
    let mut receive = Driver::start(&mut bench.device, &memory, PLAIN);
    assert!(bench.link_is_up());
    let generation = get(&mut bench.device, VIRTIO_MMIO_CONFIG_GENERATION);
    receive.offer(&[Part::In(2000)]);
    bench.outside = pair().1;
    bench.receive();
    assert!(!bench.link_is_up());
    assert_ne!(
        get(&mut bench.device, VIRTIO_MMIO_CONFIG_GENERATION),
        generation
    );
    assert_eq!(
        get(&mut bench.device, VIRTIO_MMIO_INTERRUPT_STATUS),
        VIRTIO_MMIO_INT_CONFIG
    );
    assert_eq!(bench.line.edges(), 1);
    // What is sent is lost, as on a cable that was pulled; and the guest is told once.
    let mut sender = receive.of_queue(1);
    sender.request(&mut bench.device, &[Part::Out(&with_header(&frame(60, 1)))]);
    bench.receive();
    assert_eq!(bench.metric("send_drops"), 1);
    assert_eq!(get(&mut bench.device, VIRTIO_MMIO_INTERRUPT_STATUS), 3);

    // Attached anew at a restore it is up again, and the driver hears of that too.
    let section = Device::save(&bench.device, 0).unwrap();
    let (inside, _outside) = pair();
    let net = Net::socket(inside, options()).unwrap();
    let (mut restored, line) = driver::transport(net, &memory);
    Device::restore(&mut restored, &section).unwrap();
    bench.device = restored;
    assert!(bench.link_is_up());
    lock(bench.device.worker()).process(RECEIVE);
    assert_eq!(line.edges(), 1);
}

#[test]
fn a_frame_that_was_taken_and_not_delivered_is_saved_and_goes_on() {
    let mut bench = Bench::new();
    let memory = bench.memory.clone();
    let mut receive = Driver::start(&mut bench.device, &memory, PLAIN);
    let taken = frame(700, 3);
    bench.push(&taken);
    bench.receive();
    let section = Device::save(&bench.device, 0).unwrap();
    let other = NetOptions {
        mac: [2, 0, 0, 0, 0, 8],
        ..options()
    };
    let (inside, _outside) = pair();
    let net = Net::socket(inside, other).unwrap();
    bench.device = driver::transport(net, &memory).0;
    Device::restore(&mut bench.device, &section).unwrap();
    let place = receive.offer(&[Part::In(2000)])[0];
    receive.notify(&mut bench.device);
    assert_eq!(receive.used(), 1);
    assert_eq!(receive.bytes(place, 712)[HEADER_BYTES..], taken);
    let mut mac = [0; 6];
    bench.device.read(0x100, &mut mac);
    assert_eq!(
        mac, other.mac,
        "another address is the one that a driver reads"
    );
}

#[test]
fn a_guest_that_uses_offloads_is_restored_only_where_they_are() {
    let memory = driver::memory();
    let (mut device, _, _) = scripted(&memory);
    Driver::start(&mut device, &memory, PLAIN | TO_GUEST.checksum);
    let section = Device::save(&device, 0).unwrap();
    let net = Net::socket(pair().0, options()).unwrap();
    let (mut device, _) = driver::transport(net, &memory);
    let refused = Device::restore(&mut device, &section);
    assert!(
        matches!(refused, Err(Error::Net(NetError::Offloads))),
        "{refused:?}"
    );
    // One whose driver had not come that far may go anywhere.
    let (mut device, _, _) = scripted(&memory);
    driver::set(
        &mut device,
        VIRTIO_MMIO_DRIVER_FEATURES,
        FROM_GUEST.checksum as u32,
    );
    let section = Device::save(&device, 0).unwrap();
    let net = Net::socket(pair().0, options()).unwrap();
    let (mut device, _) = driver::transport(net, &memory);
    Device::restore(&mut device, &section).unwrap();
}

#[test]
fn frames_from_outside_wake_the_loop_but_not_while_it_is_quiesced() {
    let bench = Bench::new();
    let memory = bench.memory.clone();
    let device = Arc::new(Mutex::new(bench.device));
    let (event_loop, quiesced) = EventLoop::spawn(&[Arc::clone(&device)], None).unwrap();
    drop(quiesced);
    let mut receive = Driver::start(&mut lock(&device), &memory, PLAIN);
    let push = |seed| send(&bench.outside, &frame(60, seed), SendFlags::DONTWAIT).unwrap();
    for round in 1..=3 {
        receive.offer(&[Part::In(2000)]);
        push(0);
        bench.line.wait();
        assert_eq!(receive.used(), round);
    }
    let quiesced = event_loop.quiesce(PATIENCE).unwrap();
    receive.offer(&[Part::In(2000)]);
    push(1);
    let received = |device: &Mutex<MmioTransport>| {
        let metrics = lock(device).metrics().into_iter();
        let mut found = metrics.filter(|(name, _)| *name == "received_packets");
        found.next().unwrap().1
    };
    assert_eq!(received(&device), 3);
    drop(quiesced);
    bench.line.wait();
    assert_eq!(received(&device), 4);
    event_loop.stop(PATIENCE).unwrap();
}

#[test]
fn a_drain_sends_and_does_not_receive() {
    let mut bench = Bench::new();
    let memory = bench.memory.clone();
    let mut receive = Driver::start(&mut bench.device, &memory, PLAIN);
    let mut sender = receive.of_queue(1);
    receive.offer(&[Part::In(2000)]);
    sender.offer(&[Part::Out(&with_header(&frame(60, 1)))]);
    bench.push(&frame(60, 2));
    let soon = Instant::now() + PATIENCE;
    assert!(drain(&[Arc::clone(bench.device.worker())], soon, soon));
    assert_eq!((receive.used(), sender.used()), (0, 1));
    bench.receive();
    assert_eq!(receive.used(), 1);
}

#[test]
fn limits_hold_in_both_directions_and_lose_nothing() {
    const PACKETS: u16 = 30;
    let limit = RateLimit {
        operations_per_second: NonZeroU64::new(100),
        ..RateLimit::default()
    };
    let bench = Bench::with(NetOptions {
        receive_limit: limit,
        send_limit: limit,
        ..options()
    });
    let memory = bench.memory.clone();
    let device = Arc::new(Mutex::new(bench.device));
    let (event_loop, quiesced) = EventLoop::spawn(&[Arc::clone(&device)], None).unwrap();
    let mut receive = Driver::start(&mut lock(&device), &memory, PLAIN);
    let mut sender = receive.of_queue(1);
    for seed in 0..PACKETS as u8 {
        receive.offer(&[Part::In(200)]);
        sender.offer(&[Part::Out(&with_header(&frame(60, seed)))]);
        send(&bench.outside, &frame(60, seed), SendFlags::DONTWAIT).unwrap();
    }
    let begin = Instant::now();
    drop(quiesced);
    while receive.used() < PACKETS || sender.used() < PACKETS {
        assert!(begin.elapsed() < PATIENCE);
        bench.line.wait();
    }
    // All but a burst's ten take a hundredth of a second each; timers are never early.
    assert!(begin.elapsed() >= Duration::from_millis(10 * (u64::from(PACKETS) - 12)));
    let mut buffer = [0; 100];
    for seed in 0..PACKETS as u8 {
        let (_, bytes) = recv(&bench.outside, &mut buffer[..], RecvFlags::DONTWAIT).unwrap();
        assert_eq!(buffer[..bytes], frame(60, seed));
    }
    event_loop.stop(PATIENCE).unwrap();
}

#[test]
fn a_switch_is_found_by_its_path() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("switch");
    let text = path.to_str().unwrap();
    let refused = Net::connect(text, options()).err().unwrap();
    assert!(
        refused.to_string().contains("start what listens"),
        "{refused}"
    );
    let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    let switch = socket_with(AddressFamily::UNIX, kind, flags, None).unwrap();
    bind(&switch, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&switch, 1).unwrap();
    let net = Net::connect(text, options()).unwrap();
    let memory = driver::memory();
    let (mut device, _) = driver::transport(net, &memory);
    let port = accept(&switch).unwrap();
    let mut sender = Driver::start(&mut device, &memory, PLAIN).of_queue(1);
    sender.request(&mut device, &[Part::Out(&with_header(&frame(60, 9)))]);
    let mut buffer = [0; 100];
    let (_, bytes) = recv(&port, &mut buffer[..], RecvFlags::DONTWAIT).unwrap();
    assert_eq!(buffer[..bytes], frame(60, 9));
    let section = Device::save(&device, 0).unwrap();
    let saved: SavedNet = section.decode().unwrap();
    assert_eq!(saved.attachment, Attachment::Socket(text.to_owned()));
}

#[test]
fn a_stream_is_no_network() {
    let flags = SocketFlags::CLOEXEC;
    let (stream, _other) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let refused = Net::socket(stream, options()).err();
    assert!(
        matches!(refused, Some(NetError::Descriptor(_))),
        "{refused:?}"
    );
}

proptest! {
    /// Whatever the sizes of frames and of buffers: what is delivered is what was sent, in order, and only
    /// what does not fit into a whole queue is missing.
    #[test]
    fn frames_and_buffers_of_any_size_go_together(
        frames in prop::collection::vec(14usize..4000, 1..20),
        buffers in prop::collection::vec(12usize..1500, 1..60),
        features in prop::sample::select(vec![PLAIN | MERGEABLE, PLAIN | MERGEABLE | EVENT_IDX]),
    ) {
        let memory = driver::memory();
        let (mut device, script, _) = scripted(&memory);
        let mut receive = Driver::start(&mut device, &memory, features);
        let sent: Vec<_> = frames.iter().zip(0..).map(|(len, seed)| frame(*len, seed)).collect();
        lock(&script).incoming = sent.iter().rev().map(|frame| with_header(frame)).collect();
        let places: Vec<_> = buffers
            .iter()
            .map(|len| {
                let place = receive.offer(&[Part::In(*len)])[0];
                receive.notify(&mut device);
                place
            })
            .collect();
        let mut got: Vec<Vec<u8>> = Vec::new();
        let mut rest = 0;
        for nth in 0..receive.used() {
            let len = receive.used_len(nth) as usize;
            prop_assert!(len <= buffers[usize::from(nth)]);
            let mut bytes = receive.bytes(places[usize::from(nth)], len);
            if rest == 0 {
                rest = u16::from_le_bytes([bytes[10], bytes[11]]);
                got.push(bytes.split_off(HEADER_BYTES));
            } else {
                got.last_mut().unwrap().extend(bytes);
            }
            rest -= 1;
        }
        prop_assert_eq!(rest, 0, "a frame's buffers are all used or none");
        // Each frame takes the next buffers, until there are no more.
        let mut left = buffers.iter();
        let fits = |frame: &&usize| {
            let mut needed = (HEADER_BYTES + **frame).cast_signed();
            while needed > 0 {
                let Some(buffer) = left.next() else { return false };
                needed -= buffer.cast_signed();
            }
            true
        };
        let expected = frames.iter().take_while(fits).count();
        prop_assert_eq!(&got[..], &sent[..expected]);
        prop_assert!(get(&mut device, VIRTIO_MMIO_STATUS) & 0x40 == 0);
    }
}
