//! Every machine that runs from a snapshot is another one, and its guest can see it.

use std::collections::BTreeSet;

use system_tests::{
    bare_metal::{self, VmclockField, count},
    http::Machine,
    server::Server,
};

use crate::{boot, server};

/// The generation that the machine's guest prints from now on: the next line may still be of what it read before.
fn generation(server: &Server, machine: Machine) -> u64 {
    let console = server.console(machine).unwrap();
    let all = || console.text().lines().filter_map(count).collect::<Vec<_>>();
    let printed = all().len();
    let new = |_: &str| all().get(printed + 2).copied();
    console.first("the guest's generation", new).unwrap()
}

#[test]
fn no_two_machines_of_a_snapshot_have_one_generation() {
    let Some(server) = server() else { return };
    let machine = boot(&server, &bare_metal::generation());
    let mut seen = BTreeSet::from([generation(&server, machine)]);
    let (state, memory) = (server.path("state"), server.path("memory"));
    server
        .client
        .snapshot(machine, &state, &memory, true)
        .unwrap();
    // The machine itself goes on as the one that it was.
    assert!(seen.contains(&generation(&server, machine)));
    for _ in 0..3 {
        let restored = server.client.restore(&state, &memory).unwrap();
        assert!(seen.insert(generation(&server, restored)), "{seen:?}");
    }
    assert!(!seen.contains(&0));
}

#[test]
fn the_vmclock_page_tells_of_copies_and_of_holds() {
    let Some(server) = server() else { return };
    let client = &server.client;
    for field in [VmclockField::DisruptionMarker, VmclockField::Generation] {
        let machine = boot(&server, &bare_metal::vmclock(field));
        let first = generation(&server, machine);
        let (state, memory) = (server.path("state"), server.path("memory"));
        // A hold in which guest time stood still is a disruption, but no other machine.
        client.snapshot(machine, &state, &memory, true).unwrap();
        let held = generation(&server, machine);
        assert_eq!(held == first, field == VmclockField::Generation);
        // One that guest time followed is neither.
        let path = format!("/vms/{}", machine.pid);
        client.post(&format!("{path}/pause"), &().into()).unwrap();
        let resumed = client.post(&format!("{path}/resume?clock=follow"), &().into());
        assert_eq!(resumed.unwrap().status, 200);
        assert_eq!(generation(&server, machine), held);
        let restored = [(); 2].map(|()| client.restore(&state, &memory).unwrap());
        let mut seen = BTreeSet::from([first, held]);
        let before = seen.len();
        for machine in restored {
            seen.insert(generation(&server, machine));
        }
        assert_eq!(seen.len(), before + 2, "{field:?} {seen:?}");
    }
}
