//! Disks that branch with the snapshots of their machine.

use std::path::Path;

use serde_json::{Value, json};
use system_tests::{bare_metal, cli::Cli, http::Machine, server::Server};

use crate::server;

/// A server whose tree has a base and a disk `d` on it, and the counter as its kernel.
fn bench() -> Option<(Server, Cli)> {
    let server = server()?;
    let tree = server.tree();
    std::fs::write(tree.join("kernel"), bare_metal::counter()).unwrap();
    std::fs::write(tree.join("base"), vec![7; 1 << 20]).unwrap();
    let cli = Cli::new(&tree, &server.run_directory());
    cli.run(&["disk", "create", "d", "--base", "base"]).unwrap();
    Some((server, cli))
}

fn disk(server: &Server, name: &str) -> Value {
    json!({
        "vcpus": 1,
        "memory_mib": 64,
        "disks": [{"path": server.path(name), "format": "branch", "serial": "a serial"}],
    })
}

fn counts(server: &Server, machine: Machine) {
    let console = server.console(machine).unwrap();
    console.first("a count", bare_metal::count).unwrap();
}

/// A machine that goes on from a snapshot in the store, with what is not here of its disks in `elsewhere`.
fn restored_elsewhere(cli: &Cli, name: &str) -> Machine {
    let restored = cli
        .json(&["restore", name, "--disks", "elsewhere", "--json"])
        .unwrap();
    let number = |key: &str| restored[key].as_u64().unwrap();
    Machine {
        pid: number("pid") as u32,
        port: number("port") as u16,
    }
}

fn named(server: &Server, ending: &str) -> Vec<String> {
    let names = server.names().unwrap().into_iter();
    names.filter(|name| name.ends_with(ending)).collect()
}

#[test]
fn machines_go_on_from_one_snapshot_beside_each_other_and_the_one_it_is_of() {
    let Some((server, cli)) = bench() else { return };
    let client = &server.client;
    let machine = client
        .boot(&server.path("kernel"), &disk(&server, "d"))
        .unwrap();
    counts(&server, machine);
    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(machine, &state, &memory, true).unwrap();
    let [layer] = named(&server, ".layer").try_into().unwrap();
    // Nothing was written since: the next snapshot is of the same layer.
    client
        .snapshot(
            machine,
            &server.path("state2"),
            &server.path("memory2"),
            true,
        )
        .unwrap();
    assert_eq!(named(&server, ".layer"), [layer.as_str()]);

    // A raw disk could be had by one of them only, and not after it was written to.
    let restored = [0, 1].map(|_| client.restore(&state, &memory).unwrap());
    for machine in restored {
        counts(&server, machine);
    }
    let heads = named(&server, ".head");
    assert_eq!(heads.len(), 2, "{heads:?}");
    // And the next generation: a snapshot of one that was restored.
    let (state, memory) = (server.path("state3"), server.path("memory3"));
    client.snapshot(restored[0], &state, &memory, true).unwrap();
    counts(&server, client.restore(&state, &memory).unwrap());

    let info = cli.json(&["disk", "info", "--json", &layer]).unwrap();
    assert_eq!(info["layers"][0]["sealed"], true);
    assert_eq!(info["layers"][0]["mapped"], true);
    // The machine's own disk goes on under its name, and is in use.
    let refused = cli.refused(&["disk", "info", "d"]).unwrap();
    assert!(refused.contains("in use by another machine"), "{refused}");
}

#[test]
fn a_disk_is_saved_into_a_store_with_its_machine_and_made_elsewhere() {
    let Some((server, cli)) = bench() else { return };
    let base: Vec<u8> = (0..1 << 20).map(|at: u32| (at / 4097) as u8).collect();
    // A base may not change under a disk.
    std::fs::write(server.tree().join("base2"), &base).unwrap();
    cli.run(&["disk", "create", "d2", "--base", "base2"])
        .unwrap();
    let machine = server
        .client
        .boot(&server.path("kernel"), &disk(&server, "d2"))
        .unwrap();
    counts(&server, machine);
    let pid = machine.pid.to_string();
    cli.run(&["store", "init"]).unwrap();
    cli.run(&["snapshot", &pid, "monday"]).unwrap();
    let tuesday = cli
        .json(&["snapshot", &pid, "tuesday", "--halt", "--json"])
        .unwrap();
    // The disk's content was there, and is not read again.
    let new = tuesday["stored"]["new_bytes"].as_u64().unwrap();
    assert!(new < base.len() as u64, "{new}");
    for name in ["monday", "tuesday"] {
        let cat = cli.command(&["store", "cat", name, "disk0"]).output();
        assert!(cat.unwrap().stdout == base, "{name}");
    }

    for name in server.names().unwrap() {
        if name.starts_with("d2") || name == "base2" {
            std::fs::remove_file(server.tree().join(name)).unwrap();
        }
    }
    let refused = cli.refused(&["restore", "tuesday"]).unwrap();
    assert!(refused.contains("--disks"), "{refused}");
    std::fs::create_dir(server.tree().join("elsewhere")).unwrap();
    // Two from one snapshot: the second finds the layer that the first has made.
    for _ in 0..2 {
        counts(&server, restored_elsewhere(&cli, "tuesday"));
    }
    let made = std::fs::read_dir(server.tree().join("elsewhere")).unwrap();
    let made: Vec<String> = made
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let [layer] = made
        .iter()
        .filter(|name| name.ends_with(".layer"))
        .collect::<Vec<_>>()
        .try_into()
        .unwrap();
    assert_eq!(made.len(), 3, "{made:?}");
    let layer = format!("elsewhere/{layer}");
    cli.run(&["disk", "export", &layer, "again.raw"]).unwrap();
    assert!(std::fs::read(server.tree().join("again.raw")).unwrap() == base);
}

#[test]
fn what_two_snapshots_have_of_a_disk_that_is_only_read_does_not_meet() {
    let Some((server, cli)) = bench() else { return };
    let mut more = disk(&server, "d");
    more["disks"][0]["read_only"] = json!(true);
    let kernel = server.path("kernel");
    let machine = server.client.boot(&kernel, &more).unwrap();
    counts(&server, machine);
    let pid = machine.pid.to_string();
    cli.run(&["store", "init"]).unwrap();
    for name in ["monday", "tuesday"] {
        cli.run(&["snapshot", &pid, name]).unwrap();
    }
    cli.run(&["stop", &pid]).unwrap();
    std::fs::remove_file(server.tree().join("d")).unwrap();

    let elsewhere = server.tree().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    for name in ["monday", "tuesday", "tuesday"] {
        counts(&server, restored_elsewhere(&cli, name));
    }
    let made = std::fs::read_dir(&elsewhere).unwrap();
    let made: Vec<_> = made.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(made.len(), 2, "{made:?}");
}

#[test]
fn a_saved_layer_that_is_another_or_gone_is_refused() {
    let Some((server, _)) = bench() else { return };
    let client = &server.client;
    let machine = client
        .boot(&server.path("kernel"), &disk(&server, "d"))
        .unwrap();
    counts(&server, machine);
    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(machine, &state, &memory, false).unwrap();
    let [layer] = named(&server, ".layer").try_into().unwrap();
    let layer = server.tree().join(layer);
    let whole = std::fs::read(&layer).unwrap();
    let mut other = whole.clone();
    other[16] ^= 1;
    std::fs::write(&layer, other).unwrap();
    let answer = client.try_restore(&state, &memory).unwrap();
    assert_eq!(answer.status, 400, "{answer:?}");
    std::fs::remove_file(&layer).unwrap();
    let answer = client.try_restore(&state, &memory).unwrap();
    assert_eq!(answer.status, 404, "{answer:?}");
    std::fs::write(&layer, whole).unwrap();
    counts(&server, client.restore(&state, &memory).unwrap());
    assert_eq!(named(&server, ".head").len(), 1);
}

#[test]
fn a_disk_that_names_a_file_outside_of_the_tree_is_refused() {
    let Some((server, cli)) = bench() else { return };
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    std::fs::write(&secret, vec![9; 4096]).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    cli.run(&["disk", "create", "evil", "--base", &text(&secret)])
        .unwrap();
    let mut body = disk(&server, "evil");
    body["kernel_path"] = json!(server.path("kernel"));
    body["resume"] = json!(false);
    let answer = server.client.post("/create", &body).unwrap();
    assert_eq!(answer.status, 400, "{answer:?}");
    assert!(
        format!("{answer:?}").contains("may not be part of a disk"),
        "{answer:?}"
    );
    // A raw image is not looked into, and a branching disk that is none is refused.
    body["disks"] = json!([{"path": server.path("base"), "format": "branch"}]);
    let answer = server.client.post("/create", &body).unwrap();
    assert_eq!(answer.status, 400, "{answer:?}");
}

#[test]
fn a_disk_that_is_only_read_must_be_the_one_it_was() {
    let Some((server, cli)) = bench() else { return };
    let client = &server.client;
    let mut more = disk(&server, "d");
    more["disks"][0]["read_only"] = json!(true);
    let machine = client.boot(&server.path("kernel"), &more).unwrap();
    counts(&server, machine);
    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(machine, &state, &memory, false).unwrap();
    assert_eq!(named(&server, ".layer"), [""; 0]);
    let restored = client.restore(&state, &memory).unwrap();
    counts(&server, restored);
    let end = client.delete(&format!("/vms/{}", restored.pid)).unwrap();
    assert_eq!(end.status, 200);
    // Another head has its name now.
    cli.run(&["disk", "branch", "d", "e"]).unwrap();
    let answer = client.try_restore(&state, &memory).unwrap();
    assert_eq!(answer.status, 409, "{answer:?}");
}
