//! Who is killed in the middle of a snapshot.

use std::{
    fs,
    process::Stdio,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use api_types::{EndReason, Vm, VmState};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use system_tests::{bare_metal, http::Machine, server::Server, wait};

use crate::{
    boot, cli, hear,
    live::{restored, rounds},
    server,
};

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
            let saving = client.vm(machine.pid).unwrap().state == VmState::Saving;
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

/// Waits until the machine has ended, or has done with its snapshot.
fn settled(server: &Server, machine: Machine) {
    wait::until("the snapshot to end", || {
        // The server forgets those that it has not started.
        let vm = server.client.vm(machine.pid);
        let saves = |vm: Vm| vm.ended.is_none() && vm.state == VmState::Saving;
        (!vm.is_ok_and(saves)).then_some(())
    })
    .unwrap();
}

#[test]
fn who_saves_is_killed_at_any_moment_and_the_store_stays_clean() {
    let Some(server) = server() else { return };
    let cli = cli(&server);
    cli.run(&["store", "init"]).unwrap();
    let mut machine = boot(&server, &bare_metal::witness());
    hear(&server, machine);
    cli.run(&["snapshot", &machine.pid.to_string(), "first"])
        .unwrap();
    for round in 0..rounds(9) {
        let name = format!("snapshot-{round}");
        let pid = machine.pid.to_string();
        let copy = ["copy-on-write", "pre-copy", "stop-and-copy"][round as usize % 3];
        let mut command = cli.command(&["snapshot", &pid, &name, "--copy", copy]);
        let command = command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut command = command.spawn().unwrap();
        thread::sleep(Duration::from_millis(round * 7919 % 83));
        // The machine, three times of four, or who asked.
        let dies = round % 4 != 3;
        match dies {
            true => {
                let pid = Pid::from_raw(machine.pid as i32).unwrap();
                kill_process(pid, Signal::KILL).unwrap();
            }
            // It may have ended.
            false => drop(command.kill()),
        }
        command.wait().unwrap();
        settled(&server, machine);
        let checked = cli.json(&["store", "fsck", "--json"]).unwrap();
        assert_eq!(checked["problems"], json!([]), "{round}: {checked}");
        // What is there is whole, and what is not can be.
        let listed = cli.json(&["store", "ls", "--json"]).unwrap();
        let mut listed = listed.as_array().unwrap().iter();
        let is_there = listed.any(|snapshot| snapshot["name"] == name.as_str());
        if dies {
            let from = if is_there { &name } else { "first" };
            machine = restored(&cli, &server, &[from]);
        }
        assert!(!hear(&server, machine).disturbed, "{round}");
        if !is_there {
            let pid = machine.pid.to_string();
            cli.run(&["snapshot", &pid, &name]).unwrap();
        }
        cli.run(&["store", "gc"]).unwrap();
    }
}
