//! Connections that end in one direction, or without a word.

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;

/// Whether the loop, after it has looked at the device, would do so again by itself.
fn is_busy(bench: &Bench) -> bool {
    lock(bench.device.worker()).process(RECEIVE);
    let worker = lock(bench.device.worker());
    let sources = worker.device.sources();
    let mut host = [PollFd::from_borrowed_fd(
        sources[0].descriptor,
        PollFlags::IN,
    )];
    poll(&mut host, Some(&Timespec::default())).unwrap() > 0
}

#[test]
fn a_guest_that_has_stopped_sending_keeps_nobody_busy() {
    let mut bench = Bench::new();
    let (ports, stream) = bench.connected();
    bench.give(ports, SHUTDOWN, |header| header.flags = NO_SEND, &[]);
    assert!(at_end(&stream));
    assert!(!is_busy(&bench));
}

/// What becomes of a write that the guest may never read.
fn write_error(mut stream: &UnixStream) -> Option<io::ErrorKind> {
    stream.write(b"unread").err().map(|error| error.kind())
}

#[test]
fn who_writes_to_a_guest_that_has_stopped_receiving_is_told() {
    let mut bench = Bench::new();
    let (ports, stream) = bench.connected();
    // As much as it takes, and more than the guest has room for.
    let waits = std::iter::repeat_with(|| write_error(&stream)).find_map(|error| error);
    assert_eq!(waits, Some(io::ErrorKind::WouldBlock));
    bench.give(ports, SHUTDOWN, |header| header.flags = NO_RECEIVE, &[]);
    assert_eq!(write_error(&stream), Some(io::ErrorKind::BrokenPipe));
    assert!(!is_busy(&bench));
    // The other direction goes on.
    bench.give(ports, DATA, |_| {}, b"still");
    assert_eq!(read(&stream), b"still");
    bench.give(ports, SHUTDOWN, |header| header.flags = NO_SEND, &[]);
    bench.expect(RESET);
    assert!(at_end(&stream));
}

#[test]
fn a_guest_that_has_stopped_receiving_hears_that_the_host_has_gone() {
    for gone_before in [true, false] {
        let mut bench = Bench::new();
        let (ports, mut stream) = bench.connected();
        // More than the guest has room for, so that nobody comes to the end of it.
        stream.write_all(&[1; 2 * ROOM as usize]).unwrap();
        assert_eq!(bench.get().unwrap().1.len(), ROOM as usize);
        let stays = (!gone_before).then_some(stream);
        assert!(bench.get().is_none());
        bench.give(ports, SHUTDOWN, |header| header.flags = NO_RECEIVE, &[]);
        if stays.is_some() {
            assert!(bench.get().is_none());
        }
        drop(stays);
        bench.expect(RESET);
        // It has left no place: what the guest says of it is of no connection.
        bench.say(ports, CREDIT_UPDATE);
        bench.expect(RESET);
    }
}

#[test]
fn a_host_that_takes_no_more_either_is_noticed_with_all_that_it_was_sent() {
    let mut bench = Bench::new();
    let (ports, stream) = bench.connected();
    bench.fill(ports);
    bench.give(ports, SHUTDOWN, |header| header.flags = NO_RECEIVE, &[]);
    assert!(bench.get().is_none());
    stream.shutdown(std::net::Shutdown::Read).unwrap();
    bench.expect(RESET);
}
