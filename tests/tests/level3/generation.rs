//! A Linux guest with a driver for the machine's generation notices that it is a copy, every time that it is one.

use serde_json::json;
use system_tests::{
    http::Machine,
    linux::{CMDLINE, copy_sparse},
    server::Server,
};
use testbed::environment;

/// Waits until the guest says that it has drawn new random numbers so often.
fn reseeded(server: &Server, machine: Machine, times: u64) {
    let console = server.console(machine).unwrap();
    let said = |line: &str| line.strip_prefix("fermata-guest: reseeded ")?.parse().ok();
    let so_often = |line: &str| said(line).filter(|said: &u64| *said == times);
    console.first("the guest to tell", so_often).unwrap();
}

#[test]
fn a_linux_guest_draws_new_random_numbers_in_every_copy() {
    let server = Server::start(&[]).unwrap();
    for (variable, name) in [
        (environment::GUEST_GENERIC_KERNEL, "vmlinuz"),
        (environment::GUEST_GENERIC_INITRD, "initrd"),
    ] {
        let from = environment::path(variable).unwrap();
        copy_sparse(&from, &server.tree().join(name)).unwrap();
    }
    let client = &server.client;
    let more = json!({
        "vcpus": 2,
        "memory_mib": 256,
        "initrd_path": server.path("initrd"),
        "cmdline": format!("{CMDLINE} fermata.role=generation"),
    });
    let machine = client.boot(&server.path("vmlinuz"), &more).unwrap();
    reseeded(&server, machine, 0);
    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(machine, &state, &memory, false).unwrap();
    let copy = client.restore(&state, &memory).unwrap();
    reseeded(&server, copy, 1);
    // A copy of the copy is one once more.
    client.snapshot(copy, &state, &memory, false).unwrap();
    reseeded(&server, client.restore(&state, &memory).unwrap(), 2);
}
