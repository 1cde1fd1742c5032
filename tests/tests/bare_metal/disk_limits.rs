//! Limits on disks, from the request to the machine that goes on.

use serde_json::{Value, json};
use system_tests::{
    bare_metal::{self, count},
    cli::Cli,
    http::{Answer, Machine},
    server::Server,
    wait,
};

use crate::{cli, gauge, server, writes};

const BYTES: u64 = 1 << 20;

/// Asks for a change of a machine's disk.
fn change(server: &Server, machine: Machine, disk: &str, change: &Value) -> Answer {
    let path = format!("/vms/{}/disks/{disk}", machine.pid);
    server.client.patch(&path, change).unwrap()
}

/// The first disk of a machine as it is now.
fn disk(server: &Server, machine: Machine) -> Value {
    let answer = server.client.get(&format!("/vms/{}", machine.pid)).unwrap();
    answer.body["disks"][0].clone()
}

/// How often a limit has stopped the guest from writing.
fn stopped(server: &Server, machine: Machine) -> u64 {
    gauge(server, machine.pid, "fermata_device_write_throttled_total")
}

/// Waits until a limit has stopped the guest more than `times`.
fn is_stopped(server: &Server, machine: Machine, times: u64) {
    let look = || (stopped(server, machine) > times).then_some(());
    wait::until("a write to wait", look).unwrap();
}

/// The disks of a machine, as the server describes it.
fn described(server: &Server, machine: Machine) -> Value {
    let answer = server.client.get(&format!("/vms/{}", machine.pid)).unwrap();
    answer.body["origin"]["disks"].clone()
}

#[test]
fn a_machine_with_limited_disks_is_described_saved_and_goes_on() {
    let Some(server) = server() else { return };
    let client = &server.client;
    let tree = server.tree();
    std::fs::write(tree.join("kernel"), bare_metal::counter()).unwrap();
    std::fs::write(tree.join("raw"), vec![7; 1 << 20]).unwrap();
    let cli = Cli::new(&tree, &server.run_directory());
    cli.run(&["disk", "create", "branch", "--size", "1M"])
        .unwrap();
    let machine = |rate: u64| {
        json!({
            "vcpus": 1,
            "memory_mib": 64,
            "disks": [
                {"path": server.path("raw"), "bytes_per_second": 1000, "read_operations_per_second": 7},
                {"path": server.path("branch"), "format": "branch", "write_bytes_per_second": rate},
            ],
        })
    };
    let mut nothing = machine(0);
    nothing["kernel_path"] = server.path("kernel").into();
    nothing["resume"] = false.into();
    let refused = client.post("/create", &nothing).unwrap();
    assert_eq!(refused.status, 400);
    let booted = client.boot(&server.path("kernel"), &machine(9)).unwrap();
    let disks = described(&server, booted);
    assert_eq!(disks[0]["bytes_per_second"], 1000);
    assert_eq!(disks[0]["read_operations_per_second"], 7);
    assert_eq!(disks[0].get("write_bytes_per_second"), None);
    assert_eq!(disks[1]["write_bytes_per_second"], 9);
    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(booted, &state, &memory, false).unwrap();
    let restored = client.restore(&state, &memory).unwrap();
    let expected =
        json!({"size_bytes": BYTES, "bytes_per_second": 1000, "read_operations_per_second": 7});
    assert_eq!(disk(&server, restored), expected);
    let console = server.console(restored).unwrap();
    console.first("a count", bare_metal::count).unwrap();
}

#[test]
fn limits_are_changed_while_the_guest_writes_and_a_machine_goes_on_with_those_of_then() {
    let Some(server) = server() else { return };
    let client = &server.client;
    let cli = cli(&server);
    std::fs::write(server.tree().join("kernel"), bare_metal::writer()).unwrap();
    cli.run(&["disk", "create", "disk", "--size", "1M"])
        .unwrap();
    let more = json!({
        "vcpus": 1,
        "memory_mib": 64,
        // Whoever writes for the second time waits for eight minutes, for which nobody here has the patience.
        "disks": [{"path": server.path("disk"), "format": "branch", "write_bytes_per_second": 1}],
    });
    let machine = client.boot(&server.path("kernel"), &more).unwrap();
    is_stopped(&server, machine, 0);
    assert_eq!(writes(&server, machine, 0), 1);

    let faster = json!({"write_bytes_per_second": 0, "operations_per_second": 1_000_000});
    let faster = change(&server, machine, "0", &faster);
    let expected = json!({"size_bytes": BYTES, "operations_per_second": 1_000_000});
    assert_eq!((faster.status, faster.body), (200, expected));
    writes(&server, machine, 5);
    let times = stopped(&server, machine);
    let slower = change(&server, machine, "0", &json!({"write_bytes_per_second": 1}));
    let limited = json!({
        "size_bytes": BYTES, "operations_per_second": 1_000_000, "write_bytes_per_second": 1,
    });
    assert_eq!((slower.status, &slower.body), (200, &limited));
    is_stopped(&server, machine, times);
    let console = server.console(machine).unwrap();
    let written = console.last(count).unwrap();

    // Who goes on from there has the limits, and what waits.
    let forks = cli.json(&["fork", "--json", &machine.pid.to_string()]);
    let forks = forks.unwrap();
    let number = |key: &str| forks[0][key].as_u64().unwrap();
    let fork = Machine {
        pid: number("pid") as u32,
        port: number("port") as u16,
    };
    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(machine, &state, &memory, false).unwrap();
    let restored = client.restore(&state, &memory).unwrap();
    for machine in [fork, restored] {
        is_stopped(&server, machine, 0);
        assert_eq!(disk(&server, machine), limited);
        let pid = machine.pid.to_string();
        let without = ["disk", "limit", &pid, "0", "write_bytes_per_second=0"];
        let said = cli.run(&without).unwrap();
        assert_eq!(said, "disk 0: operations_per_second=1000000\n");
        writes(&server, machine, written + 5);
    }
    // What is reset is what it was.
    let reset = client.post(&format!("/vms/{}/reset", fork.pid), &json!({}));
    assert_eq!(reset.unwrap().status, 200);
    assert_eq!(disk(&server, fork), limited);
}

#[test]
fn changes_of_a_disk_that_cannot_be_meant_change_nothing() {
    let Some(server) = server() else { return };
    std::fs::write(server.tree().join("kernel"), bare_metal::counter()).unwrap();
    std::fs::write(server.tree().join("raw"), vec![7; BYTES as usize]).unwrap();
    let more = json!({
        "vcpus": 1,
        "memory_mib": 64,
        "disks": [{"path": server.path("raw"), "bytes_per_second": 7}],
    });
    let machine = server.client.boot(&server.path("kernel"), &more).unwrap();
    for (disk, what, status, said) in [
        ("0", json!({}), 400, "name a size, or a limit"),
        (
            "0",
            json!({"bytes_per_second": null}),
            400,
            "name a size, or a limit",
        ),
        (
            "0",
            json!({"bytes_per_second": -1}),
            400,
            "not the JSON that is meant",
        ),
        (
            "0",
            json!({"bytes_per_second": "1M"}),
            400,
            "not the JSON that is meant",
        ),
        (
            "0",
            json!({"size_bytes": BYTES * 2, "write_byte_per_second": 1}),
            400,
            "not the JSON that is meant",
        ),
        (
            "1",
            json!({"bytes_per_second": 1}),
            404,
            "none with number 1",
        ),
        (
            "0",
            json!({"size_bytes": 512, "bytes_per_second": 1}),
            400,
            "disks only grow",
        ),
    ] {
        let refused = change(&server, machine, disk, &what);
        let message = refused.body["message"].to_string();
        assert_eq!(refused.status, status, "{what}: {message}");
        assert!(message.contains(said), "{what}: {message}");
    }
    let before = json!({"size_bytes": BYTES, "bytes_per_second": 7});
    assert_eq!(disk(&server, machine), before);
    let both = change(
        &server,
        machine,
        "0",
        &json!({"size_bytes": 2 * BYTES, "bytes_per_second": 8}),
    );
    let now = json!({"size_bytes": 2 * BYTES, "bytes_per_second": 8});
    assert_eq!((both.status, both.body), (200, now));
    let pid = machine.pid.to_string();
    let refused = cli(&server).refused(&["disk", "limit", &pid, "0", "bytes=1"]);
    let refused = refused.unwrap();
    assert!(
        refused.contains("expected one of `bytes_per_second`"),
        "{refused}"
    );
}
