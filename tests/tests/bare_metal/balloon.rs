//! What a guest gives back is the host's, and not in the next snapshot.

use std::fs;

use serde_json::{Value, json};
use system_tests::{
    bare_metal::{self, count},
    cli::Cli,
    http::Machine,
    memory::{pss, taken},
    server::Server,
};

use crate::server;

const MIB: u64 = 1 << 20;
/// Pages in a MiB.
const PAGES: u64 = 256;

fn boot(server: &Server) -> Machine {
    fs::write(server.tree().join("kernel"), bare_metal::balloon()).unwrap();
    let more = json!({"vcpus": 1, "memory_mib": 64, "balloon": {"deflate_on_oom": true}});
    server.client.boot(&server.path("kernel"), &more).unwrap()
}

fn path(machine: Machine) -> String {
    format!("/vms/{}/balloon", machine.pid)
}

/// Waits until the guest has said that `mib` are in its balloon, and that nothing came back with content.
fn holds(server: &Server, machine: Machine, mib: u64) {
    let console = server.console(machine).unwrap();
    let wanted = mib * PAGES;
    console
        .first("the balloon's size", |_| {
            let said = console.last(count)?;
            assert_eq!(said >> 31, 0, "what was given away came back");
            (said == wanted).then_some(())
        })
        .unwrap();
}

/// Has the machine's balloon become one of `mib`.
fn inflate_to(server: &Server, machine: Machine, mib: u64) {
    let answer = server
        .client
        .patch(&path(machine), &json!({"target_mib": mib}))
        .unwrap();
    assert_eq!(answer.status, 200, "{:?}", answer.body);
    assert_eq!(answer.body["target_mib"], mib);
    holds(server, machine, mib);
}

/// Saves the machine; returns the two paths, and the bytes that its memory file takes.
fn save(server: &Server, machine: Machine, name: &str, go_on: bool) -> (String, String, u64) {
    let paths = [format!("state-{name}"), format!("memory-{name}")];
    let [state, memory] = paths.map(|name| server.path(&name));
    server
        .client
        .snapshot(machine, &state, &memory, go_on)
        .unwrap();
    let bytes = taken(&memory).unwrap();
    (state, memory, bytes)
}

#[test]
fn what_a_guest_gives_back_is_the_hosts_and_a_hole_in_the_next_snapshot() {
    let Some(server) = server() else { return };
    let machine = boot(&server);
    holds(&server, machine, 0);
    let (_, _, full) = save(&server, machine, "full", true);
    let before = pss(machine).unwrap();
    inflate_to(&server, machine, 32);
    let after = pss(machine).unwrap();
    assert!(after + 30 * MIB < before, "{after} of {before}");
    let (state, memory, rest) = save(&server, machine, "rest", true);
    assert!(rest + 30 * MIB < full, "{rest} of {full}");
    // The pages come back, and so they do in a copy of the machine, whose balloon is as full.
    let restored = server.client.restore(&state, &memory).unwrap();
    for machine in [machine, restored] {
        let shown: Value = server.client.get(&path(machine)).unwrap().body;
        assert_eq!(shown["actual_bytes"], 32 * MIB, "{shown}");
        assert_eq!(
            (&shown["driver"], &shown["target_mib"]),
            (&true.into(), &32.into())
        );
        inflate_to(&server, machine, 4);
    }
}

#[test]
fn what_a_restored_guest_gives_back_does_not_come_back_from_the_image() {
    let Some(server) = server() else { return };
    let machine = boot(&server);
    holds(&server, machine, 0);
    let (state, memory, full) = save(&server, machine, "full", false);
    let restored = server.client.restore(&state, &memory).unwrap();
    holds(&server, restored, 0);
    inflate_to(&server, restored, 32);
    let (state, memory, rest) = save(&server, restored, "rest", false);
    assert!(rest + 30 * MIB < full, "{rest} of {full}");
    let again = server.client.restore(&state, &memory).unwrap();
    inflate_to(&server, again, 0);
}

#[test]
fn pages_that_are_given_back_while_a_machine_is_saved_again_and_again_are_saved_as_what_they_were()
{
    let Some(server) = server() else { return };
    let machine = boot(&server);
    holds(&server, machine, 0);
    for round in 0..6 {
        let target = if round % 2 == 0 { 32 } else { 0 };
        let change = json!({"target_mib": target});
        server.client.patch(&path(machine), &change).unwrap();
        // At some point on the guest's way there.
        let (state, memory, _) = save(&server, machine, "midway", true);
        let restored = server.client.restore(&state, &memory).unwrap();
        for machine in [restored, machine] {
            holds(&server, machine, target);
        }
        server
            .client
            .delete(&format!("/vms/{}", restored.pid))
            .unwrap();
    }
}

#[test]
fn a_balloon_is_shown_and_changed_from_the_command_line() {
    let Some(server) = server() else { return };
    let machine = boot(&server);
    holds(&server, machine, 0);
    let cli = Cli::new(&server.tree(), &server.run_directory());
    let pid = machine.pid.to_string();
    let words = [
        "balloon",
        &pid,
        "--target",
        "8",
        "--statistics-interval",
        "9",
    ];
    let shown = cli.run(&words).unwrap();
    assert!(shown.contains("target          8 MiB"), "{shown}");
    holds(&server, machine, 8);
    let shown = cli.json(&["balloon", &pid, "--json"]).unwrap();
    assert_eq!(shown["actual_bytes"], 8 * MIB, "{shown}");
    assert_eq!(shown["statistics_interval_s"], 9, "{shown}");
    // A change that is refused changes nothing.
    let said = cli.refused(&["balloon", &pid, "--target", "65"]).unwrap();
    assert!(said.contains("ask for less"), "{said}");
    // One that stands still follows when it goes on, and not before.
    cli.run(&["pause", &pid]).unwrap();
    cli.run(&["balloon", &pid, "--target", "4"]).unwrap();
    let shown = cli.json(&["balloon", &pid, "--json"]).unwrap();
    assert_eq!(
        (&shown["target_mib"], &shown["actual_bytes"]),
        (&4.into(), &(8 * MIB).into())
    );
    cli.run(&["resume", &pid]).unwrap();
    holds(&server, machine, 4);
}

#[test]
fn what_cannot_be_done_with_a_balloon_is_said() {
    let Some(server) = server() else { return };
    let machine = boot(&server);
    let large = server
        .client
        .patch(&path(machine), &json!({"target_mib": 65}))
        .unwrap();
    assert_eq!(large.status, 400, "{:?}", large.body);
    let without = crate::boot(&server, &bare_metal::spinner());
    let none = server.client.get(&path(without)).unwrap();
    assert_eq!(none.status, 404, "{:?}", none.body);
}
