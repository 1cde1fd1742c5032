//! One machine goes back to where it began, again and again.

use std::{collections::BTreeSet, fs};

use api_types::VmState;
use control::{Client, GuestClock, Registry};
use serde_json::{Value, json};
use system_tests::{
    bare_metal::{self, Testimony},
    http::Machine,
    server::Server,
};

use crate::{boot, cli, gauge, hear, server};

/// Forks `of` once.
fn fork(server: &Server, of: &str) -> Machine {
    let forks = cli(server).json(&["fork", "--json", of]).unwrap();
    let number = |key: &str| forks[0][key].as_u64().unwrap();
    Machine {
        pid: number("pid") as u32,
        port: number("port") as u16,
    }
}

fn path(machine: Machine) -> String {
    format!("/vms/{}/reset", machine.pid)
}

fn reset(server: &Server, machine: Machine) -> Value {
    let answer = server.client.post(&path(machine), &json!({})).unwrap();
    assert_eq!(answer.status, 200, "{:?}", answer.body);
    answer.body
}

/// Resets it, which is refused, and returns why.
fn refused(server: &Server, machine: Machine) -> String {
    let answer = server.client.post(&path(machine), &json!({})).unwrap();
    assert_eq!(answer.status, 409, "{:?}", answer.body);
    answer.body["message"].to_string()
}

#[test]
fn a_fork_is_what_it_was_and_another_machine_each_time() {
    let Some(server) = server() else { return };
    let parent = boot(&server, &bare_metal::witness());
    let before = hear(&server, parent);
    let machine = fork(&server, &parent.pid.to_string());
    // It was forked after this round and before that.
    let latest = hear(&server, parent).round;
    let console = server.console(machine).unwrap();
    let mut generations = BTreeSet::from([before.generation]);
    for _ in 0..5 {
        // So long that what it says first after a reset is less.
        let far = |line: &str| {
            let said = Testimony::read(line).filter(|said| said.round > latest + 3);
            said.filter(|said| !generations.contains(&said.generation))
        };
        let said = console.first("the witness", far).unwrap();
        assert!(!said.disturbed, "{said:?}");
        generations.insert(said.generation);
        let report = reset(&server, machine);
        // Its 2048 pages, but for those that it had not come to again.
        assert!(report["dirty_pages"].as_u64().unwrap() > 1000, "{report}");
        let other = |line: &str| {
            let said = Testimony::read(line)?;
            (!generations.contains(&said.generation)).then_some(said)
        };
        let said = console.first("another generation", other).unwrap();
        assert!(!said.disturbed, "{said:?}");
        assert!(said.round <= latest + 1, "{said:?} after {latest}");
    }
    assert_eq!(gauge(&server, machine.pid, "fermata_resets_total"), 5);
    // Its parent and what it was forked from are untouched, and it can be forked and saved as any.
    assert!(!hear(&server, parent).disturbed);
    let again = fork(&server, &machine.pid.to_string());
    reset(&server, again);
    assert!(!hear(&server, again).disturbed);
    let saved = ["snapshot", &machine.pid.to_string(), "state", "memory"];
    cli(&server).run(&saved).unwrap();
    assert!(!hear(&server, machine).disturbed);
}

#[test]
fn memory_and_registers_are_of_one_instant_after_hundreds_of_resets() {
    let Some(server) = server() else { return };
    fs::write(server.tree().join("kernel"), bare_metal::keeper()).unwrap();
    let more = json!({"vcpus": 2, "memory_mib": 160});
    let parent = server.client.boot(&server.path("kernel"), &more).unwrap();
    let round = |line: &str| bare_metal::count(line).filter(|round| *round > 2);
    server.console(parent).unwrap().first("2", round).unwrap();
    let machine = fork(&server, &parent.pid.to_string());
    server
        .client
        .delete(&format!("/vms/{}", parent.pid))
        .unwrap();
    let record = Registry::open(server.run_directory()).unwrap();
    let record = record.find_pid(machine.pid).unwrap().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let client = Client::connect(record.port, &record.secret).await.unwrap();
        for number in 0..300 {
            let clock = match number % 2 {
                0 => GuestClock::StandStill,
                _ => GuestClock::Follow,
            };
            client.reset(clock).await.unwrap();
        }
    });
    // It has looked at all of its memory, in the middle of which it was forked.
    let console = server.console(machine).unwrap();
    let said = console.last(bare_metal::count).unwrap_or(0);
    let later = |line: &str| bare_metal::count(line).filter(|round| *round > said + 2);
    let round = console.first("two rounds more", later).unwrap();
    assert!(round < 1 << 31, "{round:x}");
}

#[test]
fn a_machine_that_is_held_stays_so() {
    let Some(server) = server() else { return };
    let parent = boot(&server, &bare_metal::witness());
    let parents = hear(&server, parent);
    let machine = fork(&server, &parent.pid.to_string());
    // It was forked before this, and goes further.
    let latest = hear(&server, parent).round;
    let console = server.console(machine).unwrap();
    let far = |line: &str| Testimony::read(line).filter(|said| said.round > latest + 3);
    let before = console.first("the witness", far).unwrap();
    let cli = cli(&server);
    let pid = machine.pid.to_string();
    cli.run(&["pause", &pid]).unwrap();
    for expected in [1, 0] {
        let report = cli.json(&["reset", &pid, "--json"]).unwrap();
        let dirty = report["dirty_pages"].as_u64().unwrap();
        assert_eq!(dirty.min(1), expected, "{report}");
        let vm = server.client.vm(machine.pid).unwrap();
        assert_eq!(vm.state, VmState::Paused);
    }
    let said = cli.run(&["reset", &pid, "--clock", "follow"]).unwrap();
    assert!(said.contains("is what it was: 0 pages"), "{said}");
    cli.run(&["resume", &pid]).unwrap();
    let other = |line: &str| {
        let known = [parents.generation, before.generation];
        Testimony::read(line).filter(|said| !known.contains(&said.generation))
    };
    let said = console.first("another generation", other).unwrap();
    assert!(
        !said.disturbed && said.round <= latest + 1,
        "{said:?} after {latest}"
    );
}

#[test]
fn a_machine_from_its_files_goes_back_to_them_and_others_say_what_to_do() {
    let Some(server) = server() else { return };
    let booted = boot(&server, &bare_metal::witness());
    let before = hear(&server, booted);
    let cli = cli(&server);
    let pid = booted.pid.to_string();
    assert!(refused(&server, booted).contains("fermata fork"));
    let said = cli.refused(&["reset", &pid]).unwrap();
    assert!(said.contains("fermata fork"), "{said}");
    cli.run(&["store", "init"]).unwrap();
    cli.run(&["snapshot", &pid, "monday"]).unwrap();
    cli.run(&["snapshot", &pid, "state", "memory", "--halt"])
        .unwrap();
    let (state, memory) = (server.path("state"), server.path("memory"));
    let restored = server.client.restore(&state, &memory).unwrap();
    let first = hear(&server, restored);
    reset(&server, restored);
    let other = |line: &str| {
        let known = [before.generation, first.generation];
        Testimony::read(line).filter(|said| !known.contains(&said.generation))
    };
    let console = server.console(restored).unwrap();
    let said = console.first("another generation", other).unwrap();
    assert!(!said.disturbed, "{said:?}");
    let nobody = Machine { pid: 1, port: 1 };
    assert_eq!(
        server
            .client
            .post(&path(nobody), &json!({}))
            .unwrap()
            .status,
        404
    );
    let clock = format!("{}?clock=sideways", path(restored));
    assert_eq!(server.client.post(&clock, &json!({})).unwrap().status, 400);
}

#[test]
fn disks_that_branch_go_back_and_raw_ones_that_are_written_to_do_not() {
    let Some(server) = server() else { return };
    let tree = server.tree();
    const BYTES: u64 = 1 << 20;
    for name in ["base", "read", "raw"] {
        fs::write(tree.join(name), vec![7; BYTES as usize]).unwrap();
    }
    fs::write(tree.join("kernel"), bare_metal::counter()).unwrap();
    let cli = cli(&server);
    cli.run(&["disk", "create", "d", "--base", "base"]).unwrap();
    let boot = |disks: Value| {
        let more = json!({"vcpus": 1, "memory_mib": 64, "disks": disks});
        server.client.boot(&server.path("kernel"), &more).unwrap()
    };
    let parent = boot(json!([
        {"path": server.path("d"), "format": "branch"},
        {"path": server.path("read"), "read_only": true},
    ]));
    let machine = fork(&server, &parent.pid.to_string());
    let heads = || {
        let names = server.names().unwrap().into_iter();
        names.filter(|name| name.ends_with(".head")).count()
    };
    let pid = machine.pid.to_string();
    for _ in 0..3 {
        assert_eq!(heads(), 1);
        // It is larger, which is a layer more.
        cli.run(&["disk", "resize", &pid, "0", "2M"]).unwrap();
        reset(&server, machine);
        // Else it would be as large already, and this refused.
        let smaller = cli.refused(&["disk", "resize", &pid, "0", "512K"]).unwrap();
        assert!(smaller.contains("has 1048576 bytes"), "{smaller}");
    }
    cli.run(&["stop", &pid]).unwrap();
    cli.run(&["stop", &parent.pid.to_string()]).unwrap();

    let written = boot(json!([{"path": server.path("raw"), "read_only": false}]));
    let pid = written.pid.to_string();
    cli.run(&["snapshot", &pid, "state", "memory", "--halt"])
        .unwrap();
    let (state, memory) = (server.path("state"), server.path("memory"));
    let restored = server.client.restore(&state, &memory).unwrap();
    let why = refused(&server, restored);
    assert!(why.contains("let it branch"), "{why}");
    // It goes on.
    let console = server.console(restored).unwrap();
    let now = console.last(bare_metal::count).unwrap_or(0);
    let next = |line: &str| bare_metal::count(line).filter(|count| *count > now);
    console.first("the next count", next).unwrap();
}

#[test]
fn what_the_guest_gave_back_is_there_again() {
    let Some(server) = server() else { return };
    fs::write(server.tree().join("kernel"), bare_metal::balloon()).unwrap();
    let more = json!({"vcpus": 1, "memory_mib": 64, "balloon": {"target_mib": 0}});
    let parent = server.client.boot(&server.path("kernel"), &more).unwrap();
    let console = server.console(parent).unwrap();
    let none = |line: &str| bare_metal::count(line).filter(|pages| *pages == 0);
    console.first("no page", none).unwrap();
    let machine = fork(&server, &parent.pid.to_string());
    let cli = cli(&server);
    let pid = machine.pid.to_string();
    let console = server.console(machine).unwrap();
    let holds = |pages: u64| {
        let last = |_: &str| {
            console
                .last(bare_metal::count)
                .filter(|said| *said == pages)
        };
        console.first("the balloon's size", last).unwrap();
    };
    for _ in 0..3 {
        cli.run(&["balloon", &pid, "--target", "16"]).unwrap();
        holds(4096);
        let report = reset(&server, machine);
        assert!(report["dirty_pages"].as_u64().unwrap() >= 4096, "{report}");
        let shown = cli.json(&["balloon", &pid, "--json"]).unwrap();
        assert_eq!(
            (&shown["target_mib"], &shown["actual_bytes"]),
            (&0.into(), &0.into())
        );
        holds(0);
    }
}
