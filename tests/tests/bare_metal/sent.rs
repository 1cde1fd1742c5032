//! Snapshots that are sent to another fermata, which is beside this one here.

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use system_tests::{bare_metal, cli::Cli, http::Machine, server::Server, wait};

use crate::{
    boot, cli, hear,
    live::{restored, rounds},
    server, server_with,
};

/// Another host, with a store and a directory of its own, that runs its machines in the same run directory.
struct Host {
    directory: tempfile::TempDir,
    cli: Cli,
    receiver: Child,
    address: String,
}

impl Host {
    /// One that receives with these arguments.
    fn new(server: &Server, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let cli = Cli::new(directory.path(), &server.run_directory());
        cli.run(&["store", "init"]).unwrap();
        let (receiver, address) = receive(&cli, "127.0.0.1:0", arguments);
        Self {
            directory,
            cli,
            receiver,
            address,
        }
    }

    /// Has the receiver be killed, and another one be there.
    fn killed(&mut self) {
        self.kill();
        self.receiver = receive(&self.cli, &self.address, &[]).0;
    }

    fn kill(&mut self) {
        self.receiver.kill().unwrap();
        self.receiver.wait().unwrap();
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    /// The words that send the machine `pid` here as `name`.
    fn send<'a>(&'a self, pid: &'a str, name: &'a str, key: &'a str) -> Vec<&'a str> {
        let to = self.address.as_str();
        vec![
            "snapshot",
            "--json",
            pid,
            name,
            "--to",
            to,
            "--peer-key",
            key,
        ]
    }

    fn assert_clean(&self) {
        let checked = self.cli.json(&["store", "fsck", "--json"]).unwrap();
        assert_eq!(checked["problems"], json!([]), "{checked}");
    }

    fn has(&self, name: &str) -> bool {
        let listed = self.cli.json(&["store", "ls", "--json"]).unwrap();
        let mut listed = listed.as_array().unwrap().iter();
        listed.any(|snapshot| snapshot["name"] == name)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.receiver.kill();
        let _ = self.receiver.wait();
    }
}

/// Starts a receiver, and says where it listens.
fn receive(cli: &Cli, listen: &str, arguments: &[&str]) -> (Child, String) {
    let words = ["receive", "--listen", listen, "--peer-key", "key"];
    let mut command = cli.command(&[&words[..], arguments].concat());
    let mut receiver = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(receiver.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    let address = first.split(' ').nth(3).unwrap().to_owned();
    // Who does not read on would have it wait one day.
    thread::spawn(move || lines.for_each(drop));
    (receiver, address)
}

/// A guest that writes to all of its memory all the time, and verifies it.
fn witness(server: &Server) -> (Machine, String) {
    let machine = boot(server, &bare_metal::witness());
    hear(server, machine);
    (machine, machine.pid.to_string())
}

#[test]
fn a_guest_that_writes_all_the_time_is_sent_as_it_was_at_each_cut() {
    let Some(server) = server() else { return };
    let (stored, files) = (
        Host::new(&server, &[]),
        Host::new(&server, &["--into", "."]),
    );
    let (machine, pid) = witness(&server);
    let mut before = 0;
    for round in 0..rounds(6) {
        let name = format!("snapshot-{round}");
        let host = [&stored, &files][round as usize % 2];
        let copy = ["pre-copy", "copy-on-write", "stop-and-copy"][round as usize % 3];
        let key = host.path("key");
        let words = [host.send(&pid, &name, &key), vec!["--copy", copy]].concat();
        let report = cli(&server).json(&words).unwrap();
        assert_eq!(report["copy"], copy);
        assert_eq!(report["sent"]["name"], name.as_str());
        assert_eq!(report["stored"], json!(null));
        let (state, memory) = (format!("{name}.state"), format!("{name}.memory"));
        let copy = match round % 2 {
            0 => restored(&host.cli, &server, &[&name]),
            _ => restored(&host.cli, &server, &[&state, &memory]),
        };
        let said = hear(&server, copy);
        assert!(!said.disturbed && said.round > before, "{round}: {said:?}");
        before = hear(&server, machine).round;
        host.cli.run(&["stop", &copy.pid.to_string()]).unwrap();
    }
    assert!(!hear(&server, machine).disturbed);
    stored.assert_clean();
}

#[test]
fn a_machine_that_ends_goes_on_elsewhere_with_its_disk() {
    let Some(server) = server() else { return };
    let host = Host::new(&server, &[]);
    let cli = cli(&server);
    let base: Vec<u8> = (0..1 << 20).map(|at: u32| (at / 4097) as u8).collect();
    fs::write(server.tree().join("kernel"), bare_metal::witness()).unwrap();
    fs::write(server.tree().join("base"), &base).unwrap();
    cli.run(&["disk", "create", "d", "--base", "base"]).unwrap();
    let disk = json!({
        "vcpus": 1,
        "memory_mib": 64,
        "disks": [{"path": server.path("d"), "format": "branch"}],
    });
    let machine = server.client.boot(&server.path("kernel"), &disk).unwrap();
    let before = hear(&server, machine).round;
    let (pid, key) = (machine.pid.to_string(), host.path("key"));
    let words = [
        host.send(&pid, "moved", &key),
        vec!["--halt", "--copy", "pre-copy"],
    ];
    cli.json(&words.concat()).unwrap();
    let cat = host.cli.command(&["store", "cat", "moved", "disk0"]);
    assert!({ cat }.output().unwrap().stdout == base);
    fs::create_dir(host.path("disks")).unwrap();
    let moved = restored(&host.cli, &server, &["moved", "--disks", "disks"]);
    let said = hear(&server, moved);
    assert!(!said.disturbed && said.round > before, "{said:?}");
    host.assert_clean();
}

#[test]
fn whoever_is_killed_the_machine_lives_and_the_receiver_has_all_or_nothing() {
    let Some(server) = server() else { return };
    let mut host = Host::new(&server, &[]);
    let cli = cli(&server);
    cli.run(&["store", "init"]).unwrap();
    let (mut machine, _) = witness(&server);
    let key = host.path("key");
    cli.run(&["snapshot", &machine.pid.to_string(), "first"])
        .unwrap();
    for round in 0..rounds(8) {
        let (name, pid) = (format!("snapshot-{round}"), machine.pid.to_string());
        let copy = ["pre-copy", "copy-on-write", "stop-and-copy"][round as usize % 3];
        let words = [host.send(&pid, &name, &key), vec!["--copy", copy]].concat();
        let mut command = cli.command(&words);
        let command = command.stdout(Stdio::null()).stderr(Stdio::piped());
        let sending = command.spawn().unwrap();
        thread::sleep(Duration::from_millis(round * 7919 % 83));
        match round % 2 {
            0 => host.killed(),
            _ => {
                let pid = Pid::from_raw(machine.pid as i32).unwrap();
                kill_process(pid, Signal::KILL).unwrap();
            }
        }
        let sent = sending.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&sent.stderr).into_owned();
        if sent.status.success() {
            assert!(host.has(&name), "{round}");
        }
        if round % 2 == 0 {
            let named = said.contains(&host.address);
            assert!(sent.status.success() || named, "{round}: {said}");
        } else {
            machine = restored(&cli, &server, &["first"]);
        }
        assert!(!hear(&server, machine).disturbed, "{round}: {said}");
        host.assert_clean();
        // Until the receiver has noticed that a sender is gone, the name may be taken.
        wait::until("the name to be free", || {
            let pid = machine.pid.to_string();
            let again = cli.json(&host.send(&pid, &name, &key));
            (host.has(&name) || again.is_ok()).then_some(())
        })
        .unwrap();
        host.cli.run(&["store", "gc"]).unwrap();
    }
}

#[test]
fn what_cannot_be_sent_says_why_and_the_guest_goes_on() {
    let Some(server) = server() else { return };
    let mut host = Host::new(&server, &["--max-memory", "64"]);
    let cli = cli(&server);
    let (machine, pid) = witness(&server);
    let key = host.path("key");
    cli.run(&host.send(&pid, "taken", &key)).unwrap();
    let refused = cli.refused(&host.send(&pid, "taken", &key)).unwrap();
    assert!(refused.contains("already"), "{refused}");
    let refused = cli.refused(&host.send(&pid, "no name", &key)).unwrap();
    assert!(refused.contains("is not a name"), "{refused}");

    fs::copy(&key, host.path("other")).unwrap();
    fs::write(host.path("other"), [7; 32]).unwrap();
    let other = host.path("other");
    let refused = cli.refused(&host.send(&pid, "name", &other)).unwrap();
    assert!(refused.contains("another key"), "{refused}");

    let words = host.send(&pid, "name", &key);
    let slow = [words, vec!["--limit", "1M", "--copy", "pre-copy"]].concat();
    let sending = cli.command(&slow).stderr(Stdio::piped()).spawn().unwrap();
    wait::until("the snapshot to begin", || {
        cli.run(&["cancel", &pid]).is_ok().then_some(())
    })
    .unwrap();
    let sent = sending.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&sent.stderr);
    assert!(said.contains("was cancelled"), "{said}");

    host.kill();
    let refused = cli.refused(&host.send(&pid, "name", &key)).unwrap();
    assert!(refused.contains("cannot be reached"), "{refused}");
    assert!(!host.has("name"));
    assert!(!hear(&server, machine).disturbed);
}

#[test]
fn a_server_sends_machines_to_the_peers_that_it_was_started_with() {
    let Some(first) = server() else { return };
    let host = Host::new(&first, &[]);
    let key = host.path("key");
    let arguments = ["--peer", &host.address, "--peer-key", &key];
    let Some(server) = server_with(&arguments) else {
        return;
    };
    let (machine, pid) = witness(&server);
    let send = |more: serde_json::Value| {
        let mut body = json!({"peer": host.address, "name": "monday", "resume": true});
        let fields = more.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(fields);
        server
            .client
            .post(&format!("/vms/{pid}/send"), &body)
            .unwrap()
    };
    let elsewhere = send(json!({"peer": "127.0.0.1:1"}));
    assert_eq!(elsewhere.status, 400, "{elsewhere:?}");
    let sent = send(json!({"copy": "pre-copy"}));
    assert_eq!(sent.status, 200, "{sent:?}");
    assert_eq!(sent.body["name"], "monday");
    assert!(host.has("monday"));
    assert_eq!(send(json!({})).status, 409);
    hear(&server, machine);
    let moved = send(json!({"name": "moved", "resume": false}));
    assert_eq!(moved.status, 200, "{moved:?}");
    assert!(!hear(&first, restored(&host.cli, &first, &["moved"])).disturbed);
}
