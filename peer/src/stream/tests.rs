use std::{net::TcpListener, thread};

use proptest::prelude::*;

use super::*;

const KEY: [u8; KEY_BYTES] = [7; KEY_BYTES];

fn always() -> bool {
    true
}

/// Both ends of a TCP connection.
fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (there, listener.accept().unwrap().0)
}

/// Greets at both ends, with these keys.
fn greet(
    connects: [u8; KEY_BYTES],
    listens: [u8; KEY_BYTES],
) -> (Result<Stream, Error>, Result<Stream, Error>) {
    let (there, here) = tcp();
    let there = thread::spawn(move || Stream::greet(there, &connects, End::Connects));
    let here = Stream::accept(here, &listens);
    (there.join().unwrap(), here)
}

fn pair() -> (Stream, Stream) {
    let (there, here) = greet(KEY, KEY);
    (there.unwrap(), here.unwrap())
}

/// An end of which nothing is sealed: it shakes hands over `tcp` and gives that back with the state.
fn raw(tcp: &TcpStream, end: End) -> TransportState {
    let until = Instant::now() + GREETING_TIME;
    Greeting { tcp, until }.shake_hands(&KEY, end).unwrap()
}

fn receive_any(stream: &mut Stream) -> Result<(), Error> {
    stream.receive(&mut [0; 1], &always)
}

#[test]
fn who_has_another_key_is_refused_at_both_ends() {
    let (there, here) = greet(KEY, [8; KEY_BYTES]);
    assert!(matches!(there, Err(Error::Key)), "{there:?}");
    assert!(matches!(here, Err(Error::Key)), "{here:?}");
}

#[test]
fn somebody_else_and_another_version_are_told_apart() {
    for (said, is_version) in [(b"FERMATAP\x02\0\0\0", true), (b"GET / HTTP/1", false)] {
        let (mut there, here) = tcp();
        there.write_all(said).unwrap();
        let refused = Stream::accept(here, &KEY);
        match is_version {
            true => assert!(matches!(refused, Err(Error::Version { theirs: 2, .. }))),
            false => assert!(matches!(refused, Err(Error::NotFermata))),
        }
    }
}

#[test]
fn nobody_there_is_said_so() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let refused = Stream::connect(&address, &KEY, &always);
    assert!(matches!(refused, Err(Error::Unreachable(_))));
}

#[test]
fn what_is_sent_has_no_trace_of_its_content() {
    let (there, here) = tcp();
    let mut copy = here.try_clone().unwrap();
    let greeting = thread::spawn(move || Stream::greet(there, &KEY, End::Connects));
    let _noise = raw(&here, End::Listens);
    let mut stream = greeting.join().unwrap().unwrap();
    stream.send(&[0x55; 4096], &always).unwrap();
    stream.flush(&always).unwrap();
    let mut seen = vec![0; LENGTH_BYTES + 4096 + TAG_BYTES];
    copy.read_exact(&mut seen).unwrap();
    assert!(!seen.windows(4).any(|bytes| bytes == [0x55; 4]));
}

#[test]
fn what_is_changed_repeated_or_cut_is_an_error() {
    type Change = fn(Vec<u8>) -> Vec<u8>;
    let cases: [(&str, Change, bool); 5] = [
        (
            "changed",
            |mut record| {
                record[10] ^= 1;
                record
            },
            true,
        ),
        ("too short to be sealed", |_| vec![0, 3, 1, 2, 3], true),
        ("of no length", |_| vec![0, 0], true),
        ("repeated", |record| record.repeat(2), true),
        ("cut", |record| record[..record.len() - 1].to_vec(), false),
    ];
    for (case, change, is_forged) in cases {
        let (there, here) = tcp();
        let greeting = thread::spawn(move || {
            let noise = raw(&there, End::Connects);
            (there, noise)
        });
        let mut stream = Stream::accept(here, &KEY).unwrap();
        let (mut there, mut noise) = greeting.join().unwrap();
        let mut sealed = [0; 64];
        let bytes = noise.write_message(b"content", &mut sealed).unwrap();
        let record = [&(bytes as u16).to_be_bytes(), &sealed[..bytes]].concat();
        there.write_all(&change(record)).unwrap();
        drop(there);
        let error = loop {
            if let Err(error) = receive_any(&mut stream) {
                break error;
            }
        };
        match is_forged {
            true => assert!(matches!(error, Error::Forged), "{case}: {error:?}"),
            false => assert!(matches!(error, Error::Closed), "{case}: {error:?}"),
        }
    }
}

#[test]
fn a_peer_that_does_not_move_is_an_error_and_so_is_not_being_wanted() {
    let (mut there, mut here) = pair();
    here.set_patience(Duration::from_millis(300));
    assert!(matches!(receive_any(&mut here), Err(Error::Silent(_))));
    let unwanted = here.receive(&mut [0; 1], &|| false);
    assert!(matches!(unwanted, Err(Error::Unwanted)));
    // It is of use still.
    there.send(b"!", &always).unwrap();
    there.flush(&always).unwrap();
    receive_any(&mut here).unwrap();
    // A peer that takes nothing.
    there.set_patience(Duration::from_millis(300));
    let sent = there.send(&vec![1; 64 << 20], &always);
    assert!(matches!(sent, Err(Error::Silent(_))), "{sent:?}");
}

#[test]
fn what_is_said_last_is_heard_by_who_is_sending() {
    let (mut there, mut here) = pair();
    let closing = thread::spawn(move || {
        here.send(b"no", &always).unwrap();
        here.close(Duration::from_secs(10));
    });
    while !there.has_come().unwrap() {
        there.send(&[1; 100_000], &always).unwrap();
    }
    let mut heard = [0; 2];
    there.receive(&mut heard, &always).unwrap();
    assert_eq!(&heard, b"no");
    drop(there);
    closing.join().unwrap();
}

#[test]
fn what_was_recorded_of_another_connection_opens_none() {
    // What who connects says first, as somebody on the way has seen it.
    let (there, here) = tcp();
    let listening = thread::spawn(move || Stream::accept(here, &KEY));
    let prologue = [greeting::ours(), greeting::ours()].concat();
    let mut state = handshake(&KEY, &prologue, End::Connects).unwrap();
    let mut first = [0; 64];
    let bytes = state.write_message(&[], &mut first).unwrap();
    let recorded = [
        &greeting::ours()[..],
        &(bytes as u16).to_be_bytes(),
        &first[..bytes],
    ]
    .concat();
    let replay = |mut there: TcpStream| {
        there.write_all(&recorded).unwrap();
        // An answer comes, of which who has only that can make nothing, and whatever he says next is no proof.
        there
            .read_exact(&mut [0; GREETING_BYTES + LENGTH_BYTES + 48])
            .unwrap();
        there.write_all(&[&[0, 16][..], &[0; 16]].concat()).unwrap();
        there
    };
    let _there = replay(there);
    let refused = listening.join().unwrap();
    assert!(matches!(refused, Err(Error::Key)), "{refused:?}");
}

#[test]
fn who_is_not_wanted_any_more_ends_also_while_something_moves() {
    let (mut there, mut here) = pair();
    // It takes what comes, a little at a time.
    let taking = thread::spawn(move || {
        let mut raw = here.tcp.try_clone().unwrap();
        let mut taken = vec![0; 16 << 10];
        loop {
            match raw.read(&mut taken) {
                Ok(0) => break,
                Err(error) if !is_early(&error) => break,
                _ => thread::sleep(Duration::from_millis(2)),
            }
        }
        here.set_patience(LOOK);
    });
    let asked = std::cell::Cell::new(0);
    let wanted = || {
        asked.set(asked.get() + 1);
        asked.get() < 100
    };
    let sent = there.send(&vec![1; 256 << 20], &wanted);
    assert!(matches!(sent, Err(Error::Unwanted)), "{sent:?}");
    drop(there);
    taking.join().unwrap();
}

#[test]
fn who_connects_does_not_wait_for_who_is_not_wanted() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let begun = Instant::now();
    // It is there, and never greets.
    let refused = Stream::connect(&address, &KEY, &|| false);
    assert!(matches!(refused, Err(Error::Unwanted)), "{refused:?}");
    assert!(begun.elapsed() < GREETING_TIME / 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_is_sent_is_received_however_it_is_cut(
        sent in proptest::collection::vec((0..200_000usize, any::<bool>()), 1..6),
        pieces in proptest::collection::vec(1..150_000usize, 1..6),
    ) {
        let (mut there, mut here) = pair();
        let total: usize = sent.iter().map(|(bytes, _)| bytes).sum();
        let content: Vec<u8> = (0..total).map(|at| ((at * 31) >> 3) as u8).collect();
        let expected = content.clone();
        let sending = thread::spawn(move || {
            let mut at = 0;
            for (bytes, flush) in sent {
                there.send(&content[at..at + bytes], &always).unwrap();
                at += bytes;
                if flush {
                    there.flush(&always).unwrap();
                }
            }
            there.flush(&always).unwrap();
            there
        });
        let mut received = vec![0; total];
        let mut at = 0;
        for bytes in pieces.iter().cycle() {
            let end = total.min(at + bytes);
            here.receive(&mut received[at..end], &always).unwrap();
            at = end;
            if at == total {
                break;
            }
        }
        prop_assert!(received == expected);
        drop(sending.join().unwrap());
        prop_assert!(matches!(receive_any(&mut here), Err(Error::Closed)));
    }
}
