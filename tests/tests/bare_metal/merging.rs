//! Layers of disks that become fewer while their machine is saved again and again.

use serde_json::{Value, json};
use system_tests::{bare_metal, cli::Cli, http::Machine, server::Server, wait};

use crate::{server, writes};

/// So many become few.
const SNAPSHOTS: u64 = 70;
const FEW: usize = 12;

fn layers(server: &Server) -> Vec<String> {
    let names = server.names().unwrap().into_iter();
    names.filter(|name| name.ends_with(".layer")).collect()
}

fn machine(json: &Value) -> Machine {
    let number = |key: &str| json[key].as_u64().unwrap();
    Machine {
        pid: number("pid") as u32,
        port: number("port") as u16,
    }
}

/// The number that the guest has written last to the disk of a snapshot.
fn written(cli: &Cli, name: &str) -> u64 {
    let disk = cli.command(&["store", "cat", name, "disk0"]).output();
    let disk = disk.unwrap().stdout;
    u32::from_le_bytes(disk[..4].try_into().unwrap()).into()
}

#[test]
fn a_machine_that_is_saved_again_and_again_keeps_few_layers() {
    let Some(server) = server() else { return };
    let client = &server.client;
    let cli = Cli::new(&server.tree(), &server.run_directory());
    std::fs::write(server.tree().join("kernel"), bare_metal::writer()).unwrap();
    cli.run(&["disk", "create", "d", "--size", "1M"]).unwrap();
    cli.run(&["store", "init"]).unwrap();
    let more = json!({
        "vcpus": 1,
        "memory_mib": 64,
        "disks": [{"path": server.path("d"), "format": "branch"}],
    });
    let writer = client.boot(&server.path("kernel"), &more).unwrap();
    let pid = writer.pid.to_string();
    writes(&server, writer, 0);
    // This one needs its layer for itself, as files do not have the disk.
    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(writer, &state, &memory, true).unwrap();
    let [in_files] = layers(&server).try_into().unwrap();

    let mut times = 0;
    for number in 0..SNAPSHOTS {
        times = writes(&server, writer, times);
        let name = format!("snapshot-{number}");
        cli.run(&["snapshot", &pid, &name]).unwrap();
        assert!(layers(&server).len() <= 2 + number as usize);
    }
    let few = || (layers(&server).len() < FEW).then_some(());
    wait::until("the layers to become few", few).unwrap();
    assert!(layers(&server).contains(&in_files));

    // It writes on, and is saved on, of what it was before: its disk is not read again.
    times = writes(&server, writer, times + 5);
    let saved = cli.json(&["snapshot", &pid, "last", "--halt", "--json"]);
    let new = saved.unwrap()["stored"]["new_bytes"].as_u64().unwrap();
    assert!(new < 200 << 10, "{new}");
    let checked = cli.json(&["disk", "check", "d", "--json"]).unwrap();
    assert!(
        checked["layers"].as_u64().unwrap() < FEW as u64,
        "{checked}"
    );
    assert_eq!(checked["problems"], json!([]));

    // All snapshots go on: the last and the one in files where they are, others as the store has them.
    assert!(written(&cli, "last") >= times);
    let last = cli.json(&["restore", "last", "--json"]).unwrap();
    writes(&server, machine(&last), times);
    let first = client.restore(&state, &memory).unwrap();
    writes(&server, first, 1);
    let refused = cli.refused(&["restore", "snapshot-3"]).unwrap();
    assert!(refused.contains("--disks"), "{refused}");
    std::fs::create_dir(server.tree().join("disks")).unwrap();
    let early = ["restore", "snapshot-3", "--disks", "disks", "--json"];
    let early = cli.json(&early).unwrap();
    writes(&server, machine(&early), written(&cli, "snapshot-3"));
}

#[test]
fn snapshots_that_fail_leave_few_layers() {
    let Some(server) = server() else { return };
    let client = &server.client;
    let cli = Cli::new(&server.tree(), &server.run_directory());
    std::fs::write(server.tree().join("kernel"), bare_metal::writer()).unwrap();
    cli.run(&["disk", "create", "d", "--size", "1M"]).unwrap();
    let raw = server.tree().join("raw");
    std::fs::write(&raw, [0; 4096]).unwrap();
    let more = json!({
        "vcpus": 1,
        "memory_mib": 64,
        "disks": [{"path": server.path("d"), "format": "branch"}, {"path": server.path("raw")}],
    });
    let writer = client.boot(&server.path("kernel"), &more).unwrap();
    // What was written there cannot be brought to the host's disk before the snapshot is to be seen.
    std::fs::remove_file(&raw).unwrap();
    let (state, memory) = (server.path("state"), server.path("memory"));
    let mut times = 0;
    for _ in 0..SNAPSHOTS {
        times = writes(&server, writer, times);
        let refused = client.try_snapshot(writer.port, &state, &memory, true);
        assert_ne!(refused.unwrap().status, 200);
    }
    let few = || (layers(&server).len() < FEW).then_some(());
    wait::until("the layers to become few", few).unwrap();

    std::fs::write(&raw, [0; 4096]).unwrap();
    client.snapshot(writer, &state, &memory, true).unwrap();
    writes(&server, writer, times);
    let restored = client.restore(&state, &memory).unwrap();
    writes(&server, restored, times);
}
