//! A Linux guest gives memory back: what is in its balloon, and what it has no use for at the moment.

use serde_json::json;
use system_tests::{
    http::Machine,
    linux::{self, CMDLINE},
    memory::{pss, taken},
    server::Server,
    wait,
};

const MIB: u64 = 1 << 20;
/// What the guest fills and frees, as in `resources/guest/init`.
const FILLED: u64 = 64 * MIB;
/// What of it the host has at least: the guest reports whole blocks of pages, and other pages of its own lie between.
const GIVEN_BACK: u64 = FILLED / 4;

/// KiB of memory that the guest has said it has, and the digest of what it keeps.
fn memory(line: &str) -> Option<(u64, String)> {
    let (total, digest) = line
        .strip_prefix("fermata-guest: memory ")?
        .split_once(' ')?;
    Some((total.parse().ok()?, digest.to_owned()))
}

fn boot(server: &Server) -> Machine {
    let more = json!({
        "vcpus": 2,
        "memory_mib": 256,
        "initrd_path": server.path("initrd"),
        "cmdline": format!("{CMDLINE} fermata.role=balloon"),
        "balloon": {"free_page_reporting": true},
    });
    server.client.boot(&server.path("vmlinuz"), &more).unwrap()
}

/// Waits until the guest has `mib` in its balloon, by its own account.
fn inflate_to(server: &Server, machine: Machine, mib: u64) {
    let path = format!("/vms/{}/balloon", machine.pid);
    let change = json!({"target_mib": mib});
    let answer = server.client.patch(&path, &change).unwrap();
    assert_eq!(answer.status, 200, "{:?}", answer.body);
    wait::until("the balloon to have its size", || {
        let balloon = server.client.get(&path).unwrap().body;
        (balloon["actual_bytes"] == mib * MIB).then_some(())
    })
    .unwrap();
}

#[test]
fn memory_that_a_linux_guest_frees_is_the_hosts_and_not_in_the_snapshot() {
    let server = linux::server().unwrap();
    let client = &server.client;
    let machine = boot(&server);
    let console = server.console(machine).unwrap();
    let filled = |line: &str| line.strip_prefix("fermata-guest: filled ")?.parse().ok();
    let begun: u64 = console.first("the guest to fill memory", filled).unwrap();

    let path = format!("/vms/{}/balloon", machine.pid);
    let statistics = client.get(&path).unwrap().body["statistics"].clone();
    let told = |name: &str| statistics["values"][name].as_u64().unwrap();
    assert_eq!(told("total_bytes"), begun << 10, "{statistics}");
    assert!(told("free_bytes") < told("total_bytes"), "{statistics}");
    let full = pss(machine).unwrap();
    let (state, image) = (server.path("state"), server.path("memory"));
    client.snapshot(machine, &state, &image, true).unwrap();
    let full_image = taken(&image).unwrap();

    // The guest frees the rest as soon as it sees that it has less.
    inflate_to(&server, machine, 32);
    let wanted = full - GIVEN_BACK;
    wait::until("the host to have its memory back", || {
        let now = pss(machine).unwrap_or_else(|error| {
            let vm = client.get(&format!("/vms/{}", machine.pid)).unwrap();
            let log = vm.body["log"].as_str().map(std::fs::read_to_string);
            panic!("{error}: {vm:?}: {log:?}")
        });
        (now < wanted).then_some(())
    })
    .unwrap();
    let total = begun - (32 << 10);
    let less = |line: &str| memory(line).filter(|(told, _)| *told == total);
    let (_, digest) = console.first("less memory", less).unwrap();
    client.snapshot(machine, &state, &image, false).unwrap();
    let small_image = taken(&image).unwrap();
    assert!(
        small_image + GIVEN_BACK < full_image,
        "{small_image} of {full_image}"
    );
    println!(
        "memory file of {} MiB, and {} MiB after the guest has freed {} MiB",
        full_image / MIB,
        small_image / MIB,
        FILLED / MIB
    );

    // A copy goes on with as much in its balloon, and has it back when it may.
    let restored = client.restore(&state, &image).unwrap();
    let balloon = client
        .get(&format!("/vms/{}/balloon", restored.pid))
        .unwrap();
    assert_eq!(balloon.body["actual_bytes"], 32 * MIB, "{:?}", balloon.body);
    let console = server.console(restored).unwrap();
    let told = console.first("the guest to tell", memory).unwrap();
    assert_eq!(told, (total, digest.clone()));
    inflate_to(&server, restored, 0);
    let all = |line: &str| memory(line).filter(|(total, _)| *total == begun);
    let (_, kept) = console.first("all of the memory", all).unwrap();
    assert_eq!(kept, digest);
}
