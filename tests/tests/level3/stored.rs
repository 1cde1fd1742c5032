//! A Linux guest in a store: saved by reference and by name, and gone on with by name.

use api_types::EndReason;
use system_tests::{cli::Cli, console::count, http::Machine, linux, server::Server, wait};

#[test]
fn a_linux_guest_goes_on_from_a_store() {
    let directory = tempfile::tempdir().unwrap();
    let cli = Cli::new(directory.path(), &directory.path().join("none"));
    cli.run(&["store", "init"]).unwrap();
    let store = cli.store().display().to_string();
    let server: Server = linux::server_with(&["--store", &store]).unwrap();
    let client = &server.client;
    let cli = Cli::new(directory.path(), &server.run_directory());
    let machine = linux::boot(&server, "counter").unwrap();
    let console = server.console(machine).unwrap();
    let before = linux::verify(&console).unwrap();

    // By the contract's paths, and it goes on; by name, and it ends.
    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(machine, &state, &memory, true).unwrap();
    let then = console.last(count).unwrap();
    linux::counts_past(&console, then).unwrap();
    let pid = machine.pid.to_string();
    let report = cli
        .json(&["snapshot", &pid, "evening", "--halt", "--json"])
        .unwrap();
    let ended = wait::until("the machine to end", || {
        client.vm(machine.pid).unwrap().ended
    })
    .unwrap();
    assert_eq!(ended.reason, EndReason::Halted);
    let cut = console.last(count).unwrap();
    // What has not changed since the first is not stored again.
    let (new, in_use) = (
        report["stored"]["new_bytes"].as_u64().unwrap(),
        report["written_bytes"].as_u64().unwrap(),
    );
    assert!(new < in_use / 4, "{report}");

    let restored = cli.json(&["restore", "evening", "--json"]).unwrap();
    let restored = Machine {
        pid: u32::try_from(restored["pid"].as_u64().unwrap()).unwrap(),
        port: u16::try_from(restored["port"].as_u64().unwrap()).unwrap(),
    };
    let console = server.console(restored).unwrap();
    let first = linux::counts_past(&console, 0).unwrap();
    assert!((cut + 1..=cut + 2).contains(&first), "{first} after {cut}");
    linux::nothing_lost(&before, &linux::verify(&console).unwrap()).unwrap();
}
