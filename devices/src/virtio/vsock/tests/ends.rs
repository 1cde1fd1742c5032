//! Connections that end in one direction, or without a word.

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;

/// Whether the loop would look at the device again by itself.
fn is_busy(bench: &Bench) -> bool {
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
    lock(bench.device.worker()).process(RECEIVE);
    assert!(!is_busy(&bench));
}
