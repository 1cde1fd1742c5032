//! The main job: a stock kernel boots, is saved, and goes on in a fresh process.

use std::fs;

use api_types::EndReason;
use system_tests::{console::count, linux, wait};
use testbed::environment;

#[test]
fn a_linux_guest_goes_on_with_all_it_had() {
    let server = linux::server().unwrap();
    let client = &server.client;
    let machine = linux::boot(&server, "counter").unwrap();
    let console = server.console(machine).unwrap();
    let before = linux::verify(&console).unwrap();
    assert_ne!(before.disk, "none");

    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(machine, &state, &memory, true).unwrap();
    let then = console.last(count).unwrap();
    linux::counts_past(&console, then).unwrap();

    client.snapshot(machine, &state, &memory, false).unwrap();
    let ended = wait::until("the machine to end", || {
        client.vm(machine.pid).unwrap().ended
    })
    .unwrap();
    assert_eq!(ended.reason, EndReason::Halted);
    let cut = console.last(count).unwrap();
    // The disk as it is at the cut, for the other machine.
    let share = environment::path(environment::SHARE).unwrap();
    for name in ["state", "memory", "disk"] {
        linux::copy_sparse(&server.tree().join(name), &share.join(name)).unwrap();
    }
    fs::write(
        share.join("expected"),
        format!("{cut} {} {} {}", before.process, before.memory, before.disk),
    )
    .unwrap();

    let restored = client.restore(&state, &memory).unwrap();
    let console = server.console(restored).unwrap();
    let first = linux::counts_past(&console, 0).unwrap();
    assert!((cut + 1..=cut + 2).contains(&first), "{first} after {cut}");
    linux::nothing_lost(&before, &linux::verify(&console).unwrap()).unwrap();

    // Its disk has been written to since: the old snapshot does not go with it any more.
    assert_eq!(
        client
            .delete(&format!("/vms/{}", restored.pid))
            .unwrap()
            .status,
        200
    );
    let answer = client.try_restore(&state, &memory).unwrap();
    assert_eq!(answer.status, 409, "{answer:?}");
}
