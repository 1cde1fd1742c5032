//! A VMM that is killed in the middle of a snapshot.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use api_types::EndReason;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use system_tests::{bare_metal, wait};

use crate::server;

/// Large enough that writing it takes a while: the guest's memory is filled by the test itself, from
/// a kernel file padded with data.
const PADDING_MIB: usize = 192;

#[test]
fn the_files_of_the_last_snapshot_are_untouched() {
    let Some(server) = server() else { return };
    let client = &server.client;
    // Bytes behind the kernel's code are loaded with it, and so are part of the snapshot.
    let initrd: Vec<u8> = (0..PADDING_MIB << 20).map(|i| (i >> 3) as u8 | 1).collect();
    fs::write(server.tree().join("kernel"), bare_metal::counter()).unwrap();
    fs::write(server.tree().join("initrd"), initrd).unwrap();
    let more = json!({"vcpus": 1, "memory_mib": 512, "initrd_path": server.path("initrd")});
    let machine = client.boot(&server.path("kernel"), &more).unwrap();
    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(machine, &state, &memory, true).unwrap();
    let before = fs::read(&state).unwrap();
    let names = server.names().unwrap();

    let answered = AtomicBool::new(false);
    let answer = thread::scope(|scope| {
        let request = scope.spawn(|| {
            let answer = client.try_snapshot(machine.port, &state, &memory, true);
            answered.store(true, Ordering::SeqCst);
            answer
        });
        wait::until("the snapshot to begin", || {
            let saving = client.vm(machine.pid).unwrap().state == api_types::VmState::Saving;
            (saving || answered.load(Ordering::SeqCst)).then_some(())
        })
        .unwrap();
        let pid = Pid::from_raw(machine.pid as i32).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
        request.join().unwrap().unwrap()
    });
    assert_eq!(answer.status, 502, "{answer:?}");
    assert_eq!(fs::read(&state).unwrap(), before);
    assert_eq!(server.names().unwrap(), names);
    let ended = wait::until("the machine to end", || {
        client.vm(machine.pid).unwrap().ended
    })
    .unwrap();
    assert_eq!(ended.reason, EndReason::Killed);
    let restored = client.restore(&state, &memory).unwrap();
    let console = server.console(restored).unwrap();
    console.first("a count", bare_metal::count).unwrap();
}
