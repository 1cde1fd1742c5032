//! Saved, and gone on with in a fresh process.

use api_types::EndReason;
use system_tests::bare_metal;

use crate::{counting, server};

#[test]
fn the_count_goes_on_from_where_it_was_cut() {
    let Some(server) = server() else { return };
    let client = &server.client;
    let machine = counting(&server, 5);
    let console = server.console(machine).unwrap();
    let (state, memory) = (server.path("state"), server.path("memory"));

    // A snapshot that the machine goes on after.
    client.snapshot(machine, &state, &memory, true).unwrap();
    let then = console.last(bare_metal::count).unwrap();
    console
        .first("the next count", |line| {
            bare_metal::count(line).filter(|n| *n > then)
        })
        .unwrap();

    // One that it ends after: it has when that is said.
    client.snapshot(machine, &state, &memory, false).unwrap();
    assert_eq!(control::ProcessId::alive(machine.pid).unwrap(), None);
    let ended = client.vm(machine.pid).unwrap().ended.unwrap();
    assert_eq!(ended.reason, EndReason::Halted);
    let cut = console.last(bare_metal::count).unwrap();
    assert_eq!(server.names().unwrap(), ["kernel", "memory", "state"]);

    for _ in 0..2 {
        let restored = client.restore(&state, &memory).unwrap();
        assert_ne!(restored.pid, machine.pid);
        let console = server.console(restored).unwrap();
        let first = console.first("a count", bare_metal::count).unwrap();
        // The line may have been cut in the middle; then the first whole one is the next but one.
        assert!((cut + 1..=cut + 2).contains(&first), "{first} after {cut}");
        let next = console
            .first("the next count", |line| {
                bare_metal::count(line).filter(|n| *n > first)
            })
            .unwrap();
        assert_eq!(next, first + 1);
    }
}

#[test]
fn a_machine_survives_its_server_and_is_found_by_the_next() {
    let Some(mut server) = server() else { return };
    let machine = counting(&server, 3);
    server.crash_and_restart().unwrap();
    let found = server.client.vm(machine.pid).unwrap();
    assert_eq!((found.pid, found.port), (machine.pid, machine.port));
    let console = server.console(machine).unwrap();
    let before = console.last(bare_metal::count).unwrap();
    console
        .first("the next count", |line| {
            bare_metal::count(line).filter(|n| *n > before)
        })
        .unwrap();
    let (state, memory) = (server.path("state"), server.path("memory"));
    server
        .client
        .snapshot(machine, &state, &memory, true)
        .unwrap();
    assert_eq!(
        server
            .client
            .delete(&format!("/vms/{}", machine.pid))
            .unwrap()
            .status,
        200
    );
    assert_eq!(
        server
            .client
            .get(&format!("/vms/{}", machine.pid))
            .unwrap()
            .status,
        404
    );
}
