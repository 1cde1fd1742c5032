//! Arbitrary messages from a sender that has the key.
#![no_main]

use std::{
    net::{TcpListener, TcpStream},
    sync::LazyLock,
    thread,
};

use fuzz_harness::{Heap, bounded, write_seeds};
use libfuzzer_sys::fuzz_target;
use saved_state::{Container, CpuIdentity, Header, SnapshotId};
use snapshot::{Caller, Keep, Key, Place};
use tempfile::TempDir;

#[global_allocator]
static HEAP: Heap = Heap;

/// Of the machine's memory, which goes to a file.
const MEMORY_BYTES: u64 = 64 << 20;
const HEAP_BYTES: usize = 8 << 20;
const KEY: [u8; 32] = [7; 32];

static PLACE: LazyLock<TempDir> = LazyLock::new(|| {
    let place = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    place.expect("there is room")
});
static LISTENER: LazyLock<TcpListener> =
    LazyLock::new(|| TcpListener::bind("127.0.0.1:0").expect("there is a port"));

/// Both ends of a connection.
fn pair() -> (TcpStream, TcpStream) {
    let address = LISTENER.local_addr().expect("it is bound");
    let there = TcpStream::connect(address).expect("it listens");
    (there, LISTENER.accept().expect("somebody has connected").0)
}

fn message(kind: u8, content: &[&[u8]]) -> Vec<u8> {
    let content = content.concat();
    let bytes = (content.len() as u32).to_le_bytes();
    [&[kind][..], &bytes, &content].concat()
}

/// A snapshot as it is sent.
fn whole() -> Vec<u8> {
    let state = Container::new(Header {
        id: SnapshotId([0; 16]),
        release: "0.1.0".to_owned(),
        created_unix_ns: 0,
        host_cpu: CpuIdentity::default(),
        vcpus: 1,
        memory_bytes: MEMORY_BYTES,
    });
    let page = [1; 4096];
    [
        message(1, &[&[0; 16], &MEMORY_BYTES.to_le_bytes(), b"name"]),
        message(3, &[&5u32.to_le_bytes(), &0b100u16.to_le_bytes(), &page]),
        message(3, &[&5u32.to_le_bytes(), &0u16.to_le_bytes()]),
        message(4, &[&state.to_bytes()]),
        message(6, &[]),
        message(11, &[]),
    ]
    .concat()
}

fn seeds() {
    let disk = message(5, &[&0u32.to_le_bytes(), &(1u64 << 20).to_le_bytes()]);
    write_seeds([whole(), disk]);
}

fuzz_target!(init: seeds(), |said: &[u8]| {
    let (there, here) = pair();
    let said = said.to_vec();
    let sending = thread::spawn(move || {
        let Ok(mut stream) = peer::Stream::connected(there, &KEY) else {
            return;
        };
        let sent = stream.send(&said, &|| true);
        if sent.and_then(|()| stream.flush(&|| true)).is_ok() {
            stream.close(std::time::Duration::from_secs(1));
        }
    });
    bounded(HEAP_BYTES, || {
        let keep = Keep {
            place: Place::Directory(PLACE.path()),
            memory_bytes: MEMORY_BYTES,
            disk_bytes: 1 << 30,
        };
        let _ = Caller::greet(here, &Key::from(KEY)).and_then(|caller| caller.receive(&keep));
    });
    let _ = sending.join();
    for file in std::fs::read_dir(PLACE.path()).expect("it is there").flatten() {
        let _ = std::fs::remove_file(file.path());
    }
});
