//! A snapshot that is sent: kept whole by the peer, or not there, and what cannot be said is refused.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that cannot go on should stop

use std::{
    fs, io,
    net::TcpListener,
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use dedup::{CreateOptions, Key, OpenOptions, Store};
use memory::{MIN_MEMORY_BYTES, MachineMemory};
use peer::Stream;
use saved_state::SnapshotId;
use snapshot::{
    Caller, Content, Destination, Draft, Error, Files, Keep, PeerAt, PeerError, Piece, Place,
    Published, Received, Saving, Snapshot, Source, Unpublished, Why, begin,
};

#[path = "support/mod.rs"]
mod support;
use support::{LAST, container, mark, memory_with};

const UNIT: u64 = 64 << 10;

/// What the receiver keeps snapshots in.
#[derive(Clone, Copy, Debug)]
enum Kept {
    Stored,
    InFiles,
}

/// A host that receives one snapshot.
struct Host {
    directory: tempfile::TempDir,
    store: Store,
    listener: TcpListener,
    memory_bytes: u64,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = directory.path().join("store");
        let options = OpenOptions::default();
        let store = Store::create_dir(store, &CreateOptions::default(), options).unwrap();
        Key::create_file(directory.path().join("key")).unwrap();
        Self {
            store,
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
            memory_bytes: 1 << 30,
            directory,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn key(&self) -> Key {
        Key::read_file(self.path("key")).unwrap()
    }

    fn receive(&self, kept: Kept) -> Result<Received, Error> {
        let place = match kept {
            Kept::Stored => Place::Store {
                store: &self.store,
                spool: self.directory.path(),
            },
            Kept::InFiles => Place::Directory(self.directory.path()),
        };
        let keep = Keep {
            place,
            memory_bytes: self.memory_bytes,
            disk_bytes: 1 << 30,
        };
        let (tcp, _) = self.listener.accept().unwrap();
        Caller::greet(tcp, &self.key())?.receive(&keep)
    }

    /// What both say of what `send` sends here.
    fn between<T: Send>(
        &self,
        kept: Kept,
        send: impl FnOnce(PeerAt<'_>) -> T + Send,
    ) -> (T, Result<Received, Error>) {
        let (address, key_file) = (self.address(), self.path("key"));
        thread::scope(|scope| {
            let receiving = scope.spawn(|| self.receive(kept));
            let sent = send(PeerAt {
                address: &address,
                key_file: &key_file,
            });
            (sent, receiving.join().unwrap())
        })
    }

    fn address(&self) -> String {
        self.listener.local_addr().unwrap().to_string()
    }

    fn open(&self, kept: Kept, name: &str) -> Result<Snapshot, Error> {
        let (state, memory) = (
            self.path(&format!("{name}.state")),
            self.path(&format!("{name}.memory")),
        );
        let store = &self.store;
        match kept {
            Kept::Stored => Snapshot::open(Source::Stored { store, name }),
            Kept::InFiles => Snapshot::open(Source::Files {
                files: Files {
                    state: &state,
                    memory: &memory,
                },
                store: None,
            }),
        }
    }

    /// Whether there is nothing of any snapshot.
    fn is_empty(&self) -> bool {
        let files = fs::read_dir(self.directory.path()).unwrap();
        let names: Vec<_> = files.map(|file| file.unwrap().file_name()).collect();
        names.len() == 2 && self.store.log().unwrap().is_empty()
    }
}

/// Begins to send a snapshot there.
fn begin_to(at: PeerAt<'_>, name: &str) -> Result<Draft, Error> {
    let to = Destination::Peer {
        at,
        name,
        memory_bytes: MIN_MEMORY_BYTES,
        saving: &Saving::default(),
    };
    begin(to, SnapshotId([7; 16]))
}

fn publish(written: Unpublished) -> Result<Published, Error> {
    written.finish(&Saving::default())?;
    written.publish()
}

fn send(at: PeerAt<'_>, name: &str, memory: &MachineMemory) -> Result<Published, Error> {
    let draft = begin_to(at, name)?;
    publish(draft.write(&container(7), memory, &Saving::default())?)
}

fn why(sent: Result<Published, Error>) -> Why {
    match sent {
        Err(Error::Peer {
            cause: PeerError::Refused { why, .. },
            ..
        }) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_sent_is_kept_as_it_was() {
    for kept in [Kept::Stored, Kept::InFiles] {
        let host = Host::new();
        let memory = memory_with(&[(0, 1), (10 << 20, 2), (LAST, 3)]);
        let (sent, received) = host.between(kept, |at| send(at, "monday", &memory));
        let received = received.unwrap();
        let Published::WithPeer(told) = sent.unwrap() else {
            panic!("{kept:?}");
        };
        assert_eq!(told, received);
        assert_eq!(received.id.is_some(), matches!(kept, Kept::Stored));
        let snapshot = host.open(kept, "monday").unwrap();
        assert_eq!(snapshot.state.header.id, SnapshotId([7; 16]));
        assert_eq!(snapshot.state.to_bytes(), container(7).to_bytes());
        let memory = snapshot.load().unwrap();
        assert_eq!(
            [0, 10 << 20, LAST, 20 << 20].map(|gpa| mark(&memory, gpa)),
            [1, 2, 3, 0],
            "{kept:?}"
        );
    }
}

/// Memory whose first granule is zeros at the cut, whose second is as it was copied, and whose third is read then.
struct AtCut;

impl Content for AtCut {
    fn pieces(&self, _: Option<u64>, _: u64) -> io::Result<Vec<Piece>> {
        Ok(vec![
            Piece::Zeros(UNIT),
            Piece::Copied(UNIT),
            Piece::Data(UNIT),
            Piece::Zeros(MIN_MEMORY_BYTES - 3 * UNIT),
        ])
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        assert_eq!(offset, 2 * UNIT);
        buffer.fill(0);
        buffer[4096] = 9;
        Ok(())
    }
}

#[test]
fn what_was_copied_last_counts() {
    for kept in [Kept::Stored, Kept::InFiles] {
        let host = Host::new();
        let (sent, received) = host.between(kept, |at| {
            let mut draft = begin_to(at, "copied")?;
            draft.begin_copies(MIN_MEMORY_BYTES)?;
            assert!(draft.has_copies());
            let saving = Saving::default();
            for round in 1..=2 {
                let copy = |_, buffer: &mut [u8]| {
                    buffer.fill(0);
                    // The second round has less than the first.
                    buffer[..4096 * (3 - round)].fill(round as u8);
                    Ok(true)
                };
                let copied = draft.copy(&[0, UNIT, 2 * UNIT], UNIT, copy, &saving)?;
                assert_eq!(copied, 3);
            }
            let written = draft.write(&container(7), &AtCut, &saving)?;
            assert_eq!(written.written.data_bytes, 2 * 4096);
            publish(written)
        });
        sent.unwrap();
        received.unwrap();
        let memory = host.open(kept, "copied").unwrap().load().unwrap();
        let pages = (0..64).map(|page| mark(&memory, page * 4096));
        let found: Vec<_> = pages.enumerate().filter(|(_, mark)| *mark != 0).collect();
        assert_eq!(found, [(16, 2), (33, 9)], "{kept:?}");
    }
}

struct Disk(Vec<u8>);

impl Content for Disk {
    fn pieces(&self, _: Option<u64>, _: u64) -> io::Result<Vec<Piece>> {
        let zeros = 2 * UNIT;
        Ok(vec![
            Piece::Zeros(zeros),
            Piece::Data(self.0.len() as u64 - zeros),
        ])
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.copy_from_slice(&self.0[offset as usize..][..buffer.len()]);
        Ok(())
    }
}

#[test]
fn disks_are_kept_where_there_is_a_place_for_them() {
    for kept in [Kept::Stored, Kept::InFiles] {
        let host = Host::new();
        let mut content = vec![0; 5 * UNIT as usize + 512];
        for (at, byte) in content.iter_mut().enumerate().skip(2 * UNIT as usize) {
            *byte = (at / 100) as u8;
        }
        let disk = Disk(content.clone());
        let (sent, received) = host.between(kept, |at| {
            let draft = begin_to(at, "disks")?;
            let saving = Saving::default();
            let mut written = draft.write(&container(7), &memory_with(&[(0, 1)]), &saving)?;
            assert_eq!(written.keeps_disks(), matches!(kept, Kept::Stored));
            written.write_disk(0, &disk, &saving)?;
            written.write_disk(3, &disk, &saving)?;
            publish(written)
        });
        sent.unwrap();
        received.unwrap();
        let snapshot = host.open(kept, "disks").unwrap();
        assert!(snapshot.disk(1).unwrap().is_none());
        for number in [0, 3] {
            let stored = snapshot.disk(number).unwrap();
            let Kept::Stored = kept else {
                assert!(stored.is_none());
                continue;
            };
            let stored = stored.unwrap();
            let mut found = vec![0; stored.bytes() as usize];
            stored.read(0, &mut found).unwrap();
            assert!(found == content);
        }
    }
}

#[test]
fn what_is_not_kept_is_refused_before_anything_is_sent() {
    for kept in [Kept::Stored, Kept::InFiles] {
        let mut host = Host::new();
        let memory = memory_with(&[(0, 1)]);
        let at = PeerAt {
            address: &host.address(),
            key_file: &host.path("key"),
        };
        let refused = send(at, "../name", &memory).unwrap_err().to_string();
        assert!(refused.contains("is not a name"), "{refused}");
        assert!(host.is_empty());

        host.between(kept, |at| send(at, "name", &memory))
            .0
            .unwrap();
        let (sent, received) = host.between(kept, |at| send(at, "name", &memory));
        assert_eq!(why(sent), Why::NameTaken);
        received.unwrap_err();

        host.memory_bytes = MIN_MEMORY_BYTES - 1;
        let (sent, received) = host.between(kept, |at| send(at, "large", &memory));
        assert_eq!(why(sent), Why::BadRequest);
        assert!(received.unwrap_err().to_string().contains("--max-memory"));
    }
}

#[test]
fn a_sender_that_gives_up_leaves_nothing() {
    for kept in [Kept::Stored, Kept::InFiles] {
        let host = Host::new();
        let (_, received) = host.between(kept, |at| {
            let draft = begin_to(at, "name").unwrap();
            let memory = memory_with(&[(0, 1)]);
            drop(
                draft
                    .write(&container(7), &memory, &Saving::default())
                    .unwrap(),
            );
        });
        let error = received.unwrap_err().to_string();
        assert!(error.contains("hung up"), "{error}");
        assert!(host.is_empty());
    }
}

#[test]
fn a_snapshot_that_is_cancelled_does_not_wait_for_a_peer_that_takes_nothing() {
    let host = Host::new();
    let (address, key_file) = (host.address(), host.path("key"));
    let saving = Saving::default();
    thread::scope(|scope| {
        let stuck = scope.spawn(|| {
            let (tcp, _) = host.listener.accept().unwrap();
            let mut stream = Stream::accept(tcp, host.key().bytes()).unwrap();
            // As a receiver that is ready, and then stopped.
            stream.receive(&mut [0; 33], &|| true).unwrap();
            stream.send(&[2, 1, 0, 0, 0, 1], &|| true).unwrap();
            stream.flush(&|| true).unwrap();
            stream
        });
        let at = PeerAt {
            address: &address,
            key_file: &key_file,
        };
        let mut draft = begin_to(at, "name").unwrap();
        let _stuck = stuck.join().unwrap();
        draft.begin_copies(MIN_MEMORY_BYTES).unwrap();
        let offsets: Vec<u64> = (0..MIN_MEMORY_BYTES / UNIT)
            .map(|unit| unit * UNIT)
            .collect();
        let copy = |_, buffer: &mut [u8]| {
            buffer.fill(1);
            Ok(true)
        };
        let canceller = scope.spawn(|| {
            thread::sleep(Duration::from_millis(300));
            saving.cancel()
        });
        // More than any socket holds. A peer that does not move is given up after a minute.
        let begun = Instant::now();
        let sent = draft.copy(&offsets, UNIT, copy, &saving);
        assert!(canceller.join().unwrap());
        sent.unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(30));
    });
}

#[test]
fn a_key_that_is_not_the_peers_is_said_so() {
    let host = Host::new();
    let other = host.path("other");
    let mut options = fs::OpenOptions::new();
    let file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&other);
    io::Write::write_all(&mut file.unwrap(), &[1; 32]).unwrap();
    let address = host.address();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (tcp, _) = host.listener.accept().unwrap();
            Stream::accept(tcp, host.key().bytes()).unwrap_err();
        });
        let at = PeerAt {
            address: &address,
            key_file: &other,
        };
        let refused = begin_to(at, "name").unwrap_err();
        let refused = refused.to_string();
        assert!(
            refused.contains("another key") && refused.contains(&address),
            "{refused}"
        );
    });
}

/// A message's bytes.
fn message(kind: u8, content: &[&[u8]]) -> Vec<u8> {
    let content = content.concat();
    let bytes = (content.len() as u32).to_le_bytes();
    [&[kind][..], &bytes, &content].concat()
}

#[test]
fn what_comes_out_of_turn_or_does_not_fit_leaves_nothing() {
    let begin = || message(1, &[&[7; 16], &MIN_MEMORY_BYTES.to_le_bytes(), b"name"]);
    let state = || message(4, &[&container(7).to_bytes()]);
    let other = || message(4, &[&container(8).to_bytes()]);
    let disk = |number: u32, bytes: u64| message(5, &[&number.to_le_bytes(), &bytes.to_le_bytes()]);
    let zeros = |number: u32| message(3, &[&number.to_le_bytes(), &[0, 0]]);
    let (end, granules) = (|| message(6, &[]), (MIN_MEMORY_BYTES / UNIT) as u32);
    let cases = [
        ("no beginning", vec![state()]),
        ("twice begun", vec![begin(), begin()]),
        ("an end without a state", vec![begin(), end()]),
        ("a granule beyond the end", vec![begin(), zeros(granules)]),
        ("a disk before the state", vec![begin(), disk(0, 512)]),
        ("memory after the state", vec![begin(), state(), zeros(0)]),
        (
            "a state after a disk",
            vec![begin(), state(), disk(0, 512), state()],
        ),
        (
            "disks out of order",
            vec![begin(), state(), disk(1, 512), disk(1, 512)],
        ),
        (
            "a disk of half a sector",
            vec![begin(), state(), disk(0, 256)],
        ),
        ("a disk of nothing", vec![begin(), state(), disk(0, 0)]),
        (
            "a disk without end",
            vec![begin(), state(), disk(0, u64::MAX - 511)],
        ),
        ("too many disks", vec![begin(), state(), disk(1024, 512)]),
        (
            "beyond a disk's end",
            vec![begin(), state(), disk(0, 512), zeros(1)],
        ),
        (
            "half a state",
            vec![begin(), message(4, &[&[0; 300]]), end()],
        ),
        ("another machine's state", vec![begin(), other(), end()]),
        ("what a receiver says", vec![begin(), message(7, &[])]),
        (
            "a name that leads out",
            vec![message(
                1,
                &[&[7; 16], &MIN_MEMORY_BYTES.to_le_bytes(), b"../name"],
            )],
        ),
        (
            "disks of more than is received",
            vec![begin(), state(), disk(0, 1 << 30), disk(1, 512)],
        ),
        (
            "to be kept before it is made",
            vec![begin(), state(), message(11, &[])],
        ),
        (
            "a message without end",
            vec![begin(), [&[4][..], &[0xff; 4]].concat()],
        ),
    ];
    for (case, said) in cases {
        let host = Host::new();
        let ((), received) = host.between(Kept::Stored, |at| {
            let key = Key::read_file(at.key_file).unwrap();
            let mut stream = Stream::connect(at.address, key.bytes(), &|| true).unwrap();
            stream.send(&said.concat(), &|| true).unwrap();
            stream.flush(&|| true).unwrap();
            // It is told why, behind `Ready` if it had begun.
            let mut head = [0; 5];
            stream.receive(&mut head, &|| true).unwrap();
            if head[0] == 2 {
                stream.receive(&mut [0; 1], &|| true).unwrap();
                stream.receive(&mut head, &|| true).unwrap();
            }
            let mut why = [0];
            stream.receive(&mut why, &|| true).unwrap();
            assert_eq!((head[0], why[0]), (9, 1), "{case}");
        });
        received.expect_err(case);
        assert!(host.is_empty(), "{case}");
    }
    // And the same in order.
    let host = Host::new();
    let said = [
        begin(),
        zeros(granules - 1),
        state(),
        disk(0, 512),
        zeros(0),
        disk(7, UNIT + 512),
        zeros(1),
        end(),
    ];
    let ((), received) = host.between(Kept::Stored, |at| {
        let key = Key::read_file(at.key_file).unwrap();
        let mut stream = Stream::connect(at.address, key.bytes(), &|| true).unwrap();
        stream.send(&said.concat(), &|| true).unwrap();
        stream.flush(&|| true).unwrap();
        stream.receive(&mut [0; 6 + 5], &|| true).unwrap();
        stream.send(&message(11, &[]), &|| true).unwrap();
        stream.flush(&|| true).unwrap();
        stream.receive(&mut [0; 5 + 24 + 4], &|| true).unwrap();
    });
    assert_eq!(received.unwrap().name, "name");
}

#[test]
fn a_name_that_is_being_received_is_nobody_elses() {
    let host = Host::new();
    let (address, key_file) = (host.address(), host.path("key"));
    let at = PeerAt {
        address: &address,
        key_file: &key_file,
    };
    let memory = memory_with(&[(0, 1)]);
    thread::scope(|scope| {
        let receive = || scope.spawn(|| host.receive(Kept::InFiles));
        let first = receive();
        let draft = begin_to(at, "name").unwrap();
        let second = receive();
        assert_eq!(why(send(at, "name", &memory)), Why::NameTaken);
        second.join().unwrap().unwrap_err();
        let written = draft.write(&container(7), &memory, &Saving::default());
        publish(written.unwrap()).unwrap();
        first.join().unwrap().unwrap();
        // Nor is it afterwards, and a name is free again whose sender has gone.
        let third = receive();
        assert_eq!(why(send(at, "name", &memory)), Why::NameTaken);
        third.join().unwrap().unwrap_err();
        let fourth = receive();
        drop(begin_to(at, "other").unwrap());
        fourth.join().unwrap().unwrap_err();
        let fifth = receive();
        send(at, "other", &memory).unwrap();
        fifth.join().unwrap().unwrap();
    });
    assert!(host.open(Kept::InFiles, "name").is_ok());
}

#[test]
fn what_was_made_is_kept_only_when_the_sender_says_so() {
    for kept in [Kept::Stored, Kept::InFiles] {
        let host = Host::new();
        let (_, received) = host.between(kept, |at| {
            let draft = begin_to(at, "name").unwrap();
            let memory = memory_with(&[(0, 1)]);
            let written = draft.write(&container(7), &memory, &Saving::default());
            let written = written.unwrap();
            written.finish(&Saving::default()).unwrap();
            // As when it is cancelled now.
            drop(written);
        });
        received.unwrap_err();
        assert!(host.open(kept, "name").is_err(), "{kept:?}");
    }
}

/// Says a message, at once.
fn say(stream: &mut Stream, kind: u8, content: &[&[u8]]) -> Result<(), peer::Error> {
    stream.send(&message(kind, content), &|| true)?;
    stream.flush(&|| true)
}

/// A peer that hears all of an empty machine's snapshot, and has said nothing but that it is ready.
fn heard_all(host: &Host) -> Stream {
    let (tcp, _) = host.listener.accept().unwrap();
    let mut stream = Stream::accept(tcp, host.key().bytes()).unwrap();
    let begin = message(1, &[&[7; 16], &[0; 8], b"name"]).len();
    stream.receive(&mut vec![0; begin], &|| true).unwrap();
    say(&mut stream, 2, &[&[0]]).unwrap();
    let rest = message(4, &[&container(7).to_bytes()]).len() + message(6, &[]).len();
    stream.receive(&mut vec![0; rest], &|| true).unwrap();
    stream
}

/// Sends it an empty machine.
fn send_empty(host: &Host, saving: &Saving) -> Result<Published, Error> {
    let (address, key_file) = (host.address(), host.path("key"));
    let at = PeerAt {
        address: &address,
        key_file: &key_file,
    };
    let draft = begin_to(at, "name")?;
    let written = draft.write(&container(7), &memory_with(&[]), saving)?;
    written.finish(saving)?;
    written.publish()
}

#[test]
fn who_waits_for_a_peer_that_only_says_that_it_works_can_cancel() {
    let host = Host::new();
    let saving = Saving::default();
    thread::scope(|scope| {
        let works = scope.spawn(|| {
            let mut stream = heard_all(&host);
            // It works, as it says, until nobody is there any more.
            while say(&mut stream, 7, &[]).is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        });
        let begun = Instant::now();
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(500));
            saving.cancel()
        });
        send_empty(&host, &saving).unwrap_err();
        // Not before, for another reason.
        assert!(saving.is_cancelled());
        assert!(begun.elapsed() < Duration::from_secs(30));
        works.join().unwrap();
    });
}

#[test]
fn a_peer_that_is_lost_when_it_was_to_keep_a_snapshot_may_have_it() {
    let host = Host::new();
    thread::scope(|scope| {
        let lost = scope.spawn(|| {
            let mut stream = heard_all(&host);
            say(&mut stream, 10, &[]).unwrap();
            let mut keep = [0; 5];
            stream.receive(&mut keep, &|| true).unwrap();
            assert_eq!(keep[0], 11);
        });
        let failed = send_empty(&host, &Saving::default()).unwrap_err();
        lost.join().unwrap();
        let said = failed.to_string();
        assert!(said.contains("whole there if it is there"), "{said}");
    });
}
