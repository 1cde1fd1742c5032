//! Limits on disks, from the request to the machine that goes on.

use serde_json::{Value, json};
use system_tests::{bare_metal, cli::Cli, http::Machine, server::Server};

use crate::server;

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
    let console = server.console(restored).unwrap();
    console.first("a count", bare_metal::count).unwrap();
}
