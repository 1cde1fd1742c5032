//! Disks that grow while their machine lives.

use serde_json::json;
use system_tests::{bare_metal, cli::Cli, http::Machine, server::Server};

use crate::server;

const BYTES: u64 = 1 << 20;

/// What the server answers when a disk is to have `bytes`: a status, and the text of the body.
fn resize(server: &Server, machine: Machine, disk: &str, bytes: u64) -> (u16, String) {
    let path = format!("/vms/{}/disks/{disk}", machine.pid);
    let body = json!({"size_bytes": bytes});
    let answer = server.client.patch(&path, &body).unwrap();
    (answer.status, answer.body.to_string())
}

#[test]
fn disks_of_both_kinds_grow_and_are_saved_so() {
    let Some(server) = server() else { return };
    let client = &server.client;
    let tree = server.tree();
    std::fs::write(tree.join("kernel"), bare_metal::counter()).unwrap();
    std::fs::write(tree.join("raw"), vec![7; BYTES as usize]).unwrap();
    let cli = Cli::new(&tree, &server.run_directory());
    cli.run(&["disk", "create", "branch", "--size", "1M"])
        .unwrap();
    let disks = json!({
        "vcpus": 1,
        "memory_mib": 64,
        "disks": [{"path": server.path("raw")}, {"path": server.path("branch"), "format": "branch"}],
    });
    let machine = client.boot(&server.path("kernel"), &disks).unwrap();
    for disk in ["0", "1"] {
        let grown = resize(&server, machine, disk, 2 * BYTES);
        assert_eq!(grown, (200, json!({"size_bytes": 2 * BYTES}).to_string()));
        for smaller in [0, BYTES] {
            let (status, body) = resize(&server, machine, disk, smaller);
            assert_eq!(status, 400, "{body}");
            assert!(body.contains("disks only grow"), "{body}");
        }
        assert_eq!(resize(&server, machine, disk, 2 * BYTES + 1).0, 400);
    }
    assert_eq!(
        std::fs::metadata(tree.join("raw")).unwrap().len(),
        2 * BYTES
    );
    assert_eq!(resize(&server, machine, "2", 2 * BYTES).0, 404);
    assert_eq!(resize(&server, machine, "-1", 2 * BYTES).0, 400);
    let nobody = Machine { pid: 1, port: 1 };
    assert_eq!(resize(&server, nobody, "0", 2 * BYTES).0, 404);

    // One that stands still grows as well, and is saved so.
    let pid = machine.pid.to_string();
    cli.run(&["pause", &pid]).unwrap();
    for disk in ["0", "1"] {
        cli.run(&["disk", "resize", &pid, disk, "3M"]).unwrap();
    }
    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(machine, &state, &memory, false).unwrap();
    let restored = client.restore(&state, &memory).unwrap();
    for disk in ["0", "1"] {
        let (status, body) = resize(&server, restored, disk, 2 * BYTES);
        assert_eq!(status, 400, "{body}");
        assert!(body.contains(&format!("has {} bytes", 3 * BYTES)), "{body}");
        assert_eq!(resize(&server, restored, disk, 4 * BYTES).0, 200);
    }
    let console = server.console(restored).unwrap();
    console.first("a count", bare_metal::count).unwrap();
}
