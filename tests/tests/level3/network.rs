//! A Linux guest on a TAP device: saved in the middle of TCP connections, which go on on another one.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
};

use serde_json::json;
use system_tests::{
    console::Console,
    http::Machine,
    linux::{self, CMDLINE},
    server::Server,
    tap::Tap,
};

const HOST: &str = "10.77.0.1";
const MIB: usize = 1 << 20;
/// What the guest sends, as in `resources/guest/init`.
const SENT: usize = 4 * MIB;

/// What comes after `word` in a line that the guest has said.
fn said(console: &Console, word: &str) -> String {
    let prefix = format!("fermata-guest: {word} ");
    let rest = |line: &str| Some(line.split_once(&prefix)?.1.to_owned());
    console.first(word, rest).unwrap()
}

/// The first 16 hexadecimal digits of the SHA-256 of `bytes`, by the program that the guest asks too.
fn digest(bytes: &[u8]) -> String {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("bytes");
    std::fs::write(&file, bytes).unwrap();
    let output = std::process::Command::new("sha256sum").arg(file).output();
    String::from_utf8(output.unwrap().stdout).unwrap()[..16].to_owned()
}

fn boot(server: &Server, tap: &Tap) -> Machine {
    let cmdline =
        format!("{CMDLINE} fermata.role=net fermata.address=10.77.0.2/24 fermata.peer={HOST}");
    let more = json!({
        "vcpus": 2,
        "memory_mib": 256,
        "initrd_path": server.path("initrd"),
        "cmdline": cmdline,
        "tap_device": tap.name(),
    });
    server.client.boot(&server.path("vmlinuz"), &more).unwrap()
}

/// A counter of the machine's network device.
fn counter(server: &Server, machine: Machine, name: &str) -> u64 {
    let metrics = server.client.get(&format!("/vms/{}/metrics", machine.pid));
    let metrics = metrics.unwrap().body;
    let name = format!("fermata_device_{name}_total");
    let mut found =
        metrics.as_array().unwrap().iter().filter(|metric| {
            metric["name"] == name.as_str() && metric["labels"]["device"] == "vnet0"
        });
    found.next().unwrap()["value"].as_u64().unwrap()
}

/// Connections of a guest that is stopped are of no more use than one that hangs.
fn accept(listener: &TcpListener) -> TcpStream {
    let (stream, _) = listener.accept().unwrap();
    stream
        .set_read_timeout(Some(system_tests::wait::PATIENCE))
        .unwrap();
    stream
        .set_write_timeout(Some(system_tests::wait::PATIENCE))
        .unwrap();
    stream
}

#[test]
fn connections_of_a_linux_guest_go_on_on_another_tap_device() {
    let server = linux::server().unwrap();
    let first = Tap::new("fermata-a", &format!("{HOST}/24")).unwrap();
    let (receiving, sending) = [7001, 7002]
        .map(|port| TcpListener::bind((HOST, port)).unwrap())
        .into();
    let machine = boot(&server, &first);
    let console = server.console(machine).unwrap();
    assert_eq!(said(&console, "ping"), HOST);
    let expected = said(&console, "sends");

    // Half of either direction; of the other half the guest does not know yet, or cannot get rid of.
    let mut from_guest = accept(&receiving);
    let mut to_guest = accept(&sending);
    let theirs: Vec<u8> = (0..SENT).map(|i| ((i * 7 / 5) ^ (i >> 9)) as u8).collect();
    let mut ours = vec![0; SENT / 2];
    from_guest.read_exact(&mut ours).unwrap();
    to_guest.write_all(&theirs[..SENT / 2]).unwrap();
    let bytes = counter(&server, machine, "sent_bytes");
    assert!(bytes as usize >= SENT / 2, "{bytes}");
    let unsegmented = |machine| {
        ["received_unsegmented", "sent_unsegmented"].map(|name| counter(&server, machine, name))
    };
    let before = unsegmented(machine);
    let (state, memory) = (server.path("state"), server.path("memory"));
    server
        .client
        .snapshot(machine, &state, &memory, false)
        .unwrap();
    drop(first);

    // What a state file says is not enough to be attached somewhere.
    let refused = server.client.try_restore(&state, &memory).unwrap();
    assert_eq!(refused.status, 400, "{refused:?}");
    assert!(
        refused.body.to_string().contains("fermata-a"),
        "{refused:?}"
    );
    let restore = |more: serde_json::Value| {
        let mut body = json!({
            "cpu_snapshot_path": state,
            "memory_snapshot_path": memory,
            "kernel_path": "",
            "resume": true,
        });
        let body_fields = body.as_object_mut().unwrap();
        body_fields.extend(more.as_object().unwrap().clone());
        server.client.post("/create", &body).unwrap()
    };
    let refused = restore(json!({"tap_device": "fermata-none"}));
    assert_eq!(refused.status, 404, "{refused:?}");

    let second = Tap::new("fermata-b", &format!("{HOST}/24")).unwrap();
    let mac = "02:00:5e:10:00:07";
    let answer = restore(json!({"nets": [{"tap_device": second.name(), "mac": mac}]}));
    assert_eq!(answer.status, 200, "{answer:?}");
    let field = |name: &str| answer.body[name].as_u64().unwrap();
    let restored = Machine {
        pid: field("pid") as u32,
        port: field("port") as u16,
    };
    let busy = restore(json!({"tap_device": second.name()}));
    assert_eq!(busy.status, 409, "{busy:?}");
    let console = server.console(restored).unwrap();
    from_guest.read_to_end(&mut ours).unwrap();
    assert_eq!((ours.len(), digest(&ours)), (SENT, expected));
    to_guest.write_all(&theirs[SENT / 2..]).unwrap();
    // The guest waits for the end of both.
    drop((from_guest, to_guest));
    assert_eq!(said(&console, "received"), digest(&theirs));

    // In both directions segments are left to be cut. A slow guest sends what it has at once, until it is not read any more.
    let after = unsegmented(restored);
    for (before, after) in before.into_iter().zip(after) {
        assert_ne!(before + after, 0);
    }

    // The driver that ran keeps its address; the next one finds the other.
    assert_ne!(said(&console, "mac"), mac);
    assert_eq!(said(&console, "rebound"), mac);
    for name in ["rules_broken", "receive_drops"] {
        assert_eq!(counter(&server, restored, name), 0, "{name}");
    }
}
