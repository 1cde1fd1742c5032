//! A Linux guest whose disk has limits.

use serde_json::json;
use system_tests::{cli::Cli, console::count, http::Machine, linux, server::Server, wait};

/// How often the limits have stopped the machine's disk.
fn throttled(server: &Server, machine: Machine) -> u64 {
    let path = format!("/vms/{}/metrics", machine.pid);
    let metrics = server.client.get(&path).unwrap().body;
    let of_disk = metrics.as_array().unwrap().iter().filter(|metric| {
        let name = metric["name"].as_str().unwrap();
        metric["labels"]["device"] == "vblk0" && name.contains("_throttled")
    });
    of_disk
        .map(|metric| metric["value"].as_u64().unwrap())
        .sum()
}

/// Far less than it asks for, so that requests wait when it is saved; without them it would not go on.
#[test]
fn a_guest_that_its_disk_holds_up_loses_nothing_by_a_snapshot() {
    let server = linux::server().unwrap();
    let client = &server.client;
    let cli = Cli::new(&server.tree(), &server.run_directory());
    cli.run(&["disk", "create", "web.disk", "--base", "disk"])
        .unwrap();
    let more = json!({
        "vcpus": 2,
        "memory_mib": 256,
        "initrd_path": server.path("initrd"),
        "cmdline": format!("{} fermata.role=counter", linux::CMDLINE),
        "disks": [{
            "path": server.path("web.disk"),
            "format": "branch",
            "bytes_per_second": 2_000_000,
            "write_operations_per_second": 1,
        }],
    });
    let machine = client.boot(&server.path("vmlinuz"), &more).unwrap();
    let console = server.console(machine).unwrap();
    let before = linux::verify(&console).unwrap();
    assert_ne!(before.disk, "none");
    let held_up = |machine| {
        let so_far = throttled(&server, machine);
        wait::until("the limits to stop the disk", || {
            (throttled(&server, machine) > so_far).then_some(())
        })
        .unwrap();
    };
    held_up(machine);
    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(machine, &state, &memory, false).unwrap();
    let cut = console.last(count).unwrap();

    let machine = client.restore(&state, &memory).unwrap();
    let console = server.console(machine).unwrap();
    linux::nothing_lost(&before, &linux::verify(&console).unwrap()).unwrap();
    linux::counts_past(&console, cut + 20).unwrap();
    held_up(machine);
}
