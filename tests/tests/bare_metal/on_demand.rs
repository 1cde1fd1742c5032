//! Machines that run before their memory is there: it comes from the store when it is touched.

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use system_tests::{
    bare_metal::{self, count},
    console::Console,
    http::{Answer, Machine},
    server::Server,
    wait,
};

use crate::{fork::prepared, gauge, server, server_with, store::Beside};

/// A machine that is restored by name, or is about to be saved so.
pub(crate) struct Restored {
    pub(crate) pid: String,
    console: Console,
}

impl Restored {
    fn on_demand(beside: &Beside, name: &str) -> Self {
        Self::on_demand_with(beside, name, &[])
    }

    pub(crate) fn on_demand_with(beside: &Beside, name: &str, how: &[&str]) -> Self {
        let words = [&["restore", name, "--on-demand", "--json"], how].concat();
        let machine = beside.json(&words);
        Self::of(beside, machine["pid"].to_string())
    }

    pub(crate) fn of(beside: &Beside, pid: String) -> Self {
        let console = shown(beside, &pid)["console"].as_str().unwrap().to_owned();
        Self {
            pid,
            console: Console::new(console),
        }
    }

    /// Waits until its guest has looked at all of its memory `times` times, and returns what it says then.
    #[track_caller]
    pub(crate) fn looks(&self, times: usize) -> u64 {
        let mut said = Vec::new();
        let looked = || {
            let text = self.console.text();
            said = text.lines().filter_map(count).collect();
            said.iter().for_each(|looks| assert_sound(*looks));
            said.get(times - 1).copied()
        };
        wait::until("the guest to look at its memory", looked).unwrap()
    }
}

#[track_caller]
fn assert_sound(looks: u64) {
    assert_eq!(looks >> 31, 0, "the guest has lost something: {looks:x}");
}

/// What `fermata ps` says of a machine.
fn shown(beside: &Beside, pid: &str) -> Value {
    let vms = beside.json(&["ps", "--json"]);
    let mut vms = vms.as_array().unwrap().iter();
    let pid: u64 = pid.parse().unwrap();
    vms.find(|vm| vm["pid"] == pid).unwrap().clone()
}

/// Boots the keeper, and waits until it has looked at its memory once.
pub(crate) fn keeping(server: &Server, beside: &Beside) -> Restored {
    fs::write(server.tree().join("kernel"), bare_metal::keeper()).unwrap();
    let more = json!({"vcpus": 1, "memory_mib": 128});
    let machine = server.client.boot(&server.path("kernel"), &more).unwrap();
    let keeper = Restored::of(beside, machine.pid.to_string());
    keeper.looks(1);
    keeper
}

/// Whether memory of the machine is still to come.
pub(crate) fn is_missing(server: &Server, pid: &str) -> bool {
    let gauge = |name| gauge(server, pid, name);
    gauge("fermata_arrived_bytes") < gauge("fermata_arriving_total_bytes")
}

#[test]
fn a_guest_finds_all_of_its_memory_and_is_saved_while_it_comes() {
    let Some(server) = server() else { return };
    let beside = Beside::new(&server);
    beside.run(&["store", "init"]);
    let keeper = keeping(&server, &beside);
    beside.run(&["snapshot", &keeper.pid, "0", "--halt"]);
    let mut saved_early = 0;
    for round in 1..=5 {
        let restored = Restored::on_demand(&beside, &(round - 1).to_string());
        if round % 2 == 0 {
            beside.run(&["pause", &restored.pid]);
            beside.run(&["resume", &restored.pid]);
        }
        let early = is_missing(&server, &restored.pid);
        saved_early += u32::from(early);
        beside.run(&["snapshot", &restored.pid, &round.to_string()]);
        assert!(!is_missing(&server, &restored.pid));
        restored.looks(2);
        beside.run(&["stop", &restored.pid]);
    }
    assert!(saved_early > 0, "it was never saved before all was there");
    // What was saved so is whole, however it is loaded.
    let whole = beside.json(&["restore", "5", "--json"]);
    Restored::of(&beside, whole["pid"].to_string()).looks(2);
    let checked = beside.json(&["store", "fsck", "--json"]);
    assert_eq!(checked["problems"], Value::Array(vec![]));
}

#[test]
fn what_a_guest_gives_back_while_its_memory_comes_does_not_come_back() {
    let Some(server) = server() else { return };
    let beside = Beside::new(&server);
    beside.run(&["store", "init"]);
    fs::write(server.tree().join("kernel"), bare_metal::balloon()).unwrap();
    let more = json!({"vcpus": 1, "memory_mib": 64, "balloon": {"deflate_on_oom": true}});
    let machine = server.client.boot(&server.path("kernel"), &more).unwrap();
    let booted = Restored::of(&beside, machine.pid.to_string());
    booted.looks(1);
    beside.run(&["snapshot", &booted.pid, "0", "--halt"]);
    for round in 1..=4 {
        let restored = Restored::on_demand(&beside, &(round - 1).to_string());
        let mib = if round % 2 == 0 { 0 } else { 32 };
        let target = mib.to_string();
        beside.run(&["balloon", &restored.pid, "--target", &target]);
        beside.run(&["snapshot", &restored.pid, &round.to_string()]);
        let there = || {
            let said = restored.console.last(count)?;
            assert_sound(said);
            (said == mib * 256).then_some(())
        };
        wait::until("the balloon's size", there).unwrap();
        beside.run(&["stop", &restored.pid]);
    }
}

/// The files in a directory, and what is in them.
fn files(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let files = fs::read_dir(directory).unwrap();
    let paths = files.map(|file| file.unwrap().path());
    paths
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect()
}

/// Overwrites a part of each pack of the store, and returns what they were.
fn damage(beside: &Beside, part: impl Fn(usize) -> Range<usize>) -> Vec<(PathBuf, Vec<u8>)> {
    let packs = files(&beside.cli.store().join("packs"));
    for (path, bytes) in &packs {
        let mut damaged = bytes.clone();
        damaged[part(bytes.len())].fill(0xee);
        fs::write(path, damaged).unwrap();
    }
    packs
}

/// What a machine needs to start is at a pack's beginning, and the table at its end.
fn behind_the_middle(bytes: usize) -> Range<usize> {
    let middle = bytes / 2;
    middle..middle + middle / 2
}

#[test]
fn a_machine_stands_still_while_its_store_is_damaged_or_gone_and_goes_on_when_it_is_back() {
    let Some(server) = server() else { return };
    let beside = Beside::new(&server);
    // Nothing is compressed, so that almost all of a pack is frames.
    beside.run(&["store", "init", "--level", "0"]);
    let keeper = keeping(&server, &beside);
    beside.run(&["snapshot", &keeper.pid, "one", "--halt"]);
    let store = beside.cli.store();
    let packs = damage(&beside, behind_the_middle);
    let restored = Restored::on_demand(&beside, "one");
    let lost = wait::until("the machine to stand still", || {
        let vm = shown(&beside, &restored.pid);
        (vm["state"] == "paused").then(|| vm["lost_memory"].as_str().unwrap().to_owned())
    })
    .unwrap();
    for part in ["the guest's memory at 0x", "snapshot one", "packs/", "fsck"] {
        assert!(lost.contains(part), "{lost}");
    }
    let vm = server.client.vm(restored.pid.parse().unwrap()).unwrap();
    assert_eq!(vm.lost_memory, Some(lost));
    assert!(beside.run(&["ps"]).contains("cannot be had"));
    // It cannot be let go on, nor saved, and says why; it can be asked.
    let pid = restored.pid.as_str();
    for words in [&["resume", pid][..], &["snapshot", pid, "two"]] {
        let refused = beside.cli.refused(words).unwrap();
        assert!(refused.contains("cannot be had"), "{refused}");
        assert_eq!(shown(&beside, pid)["state"], "paused");
    }
    beside.run(&["pause", pid]);
    // Gone altogether.
    let away = beside.directory.path().join("away");
    fs::rename(&store, &away).unwrap();
    let refused = beside.cli.refused(&["resume", pid]).unwrap();
    assert!(refused.contains("cannot be had"), "{refused}");
    assert_eq!(shown(&beside, pid)["state"], "paused");
    // And back, as it was.
    fs::rename(&away, &store).unwrap();
    for (path, bytes) in &packs {
        fs::write(path, bytes).unwrap();
    }
    beside.run(&["resume", pid]);
    restored.looks(2);
    let vm = shown(&beside, pid);
    assert_eq!(
        (&vm["state"], &vm["lost_memory"]),
        (&"running".into(), &Value::Null)
    );
    beside.run(&["snapshot", pid, "two", "--halt"]);
    Restored::on_demand(&beside, "two").looks(2);
}

#[test]
fn a_machine_that_lacks_what_it_starts_with_is_not_started() {
    let Some(server) = server() else { return };
    let beside = Beside::new(&server);
    beside.run(&["store", "init", "--level", "0"]);
    let keeper = keeping(&server, &beside);
    beside.run(&["snapshot", &keeper.pid, "one", "--halt"]);
    damage(&beside, |bytes| 200..bytes * 3 / 4);
    let refused = beside
        .cli
        .refused(&["restore", "one", "--on-demand"])
        .unwrap();
    assert!(refused.contains("fsck"), "{refused}");
}

#[test]
fn a_machine_that_stands_still_so_can_be_stopped() {
    let Some(server) = server() else { return };
    let beside = Beside::new(&server);
    beside.run(&["store", "init", "--level", "0"]);
    let keeper = keeping(&server, &beside);
    beside.run(&["snapshot", &keeper.pid, "one", "--halt"]);
    damage(&beside, behind_the_middle);
    let restored = Restored::on_demand(&beside, "one");
    wait::until("the machine to stand still", || {
        (shown(&beside, &restored.pid)["state"] == "paused").then_some(())
    })
    .unwrap();
    let log = shown(&beside, &restored.pid)["log"]
        .as_str()
        .unwrap()
        .to_owned();
    let answer = server
        .client
        .delete(&format!("/vms/{}", restored.pid))
        .unwrap();
    assert_eq!(answer.status, 200, "{:?}", answer.body);
    assert_eq!(
        answer.body["killed"],
        false,
        "{}",
        fs::read_to_string(log).unwrap()
    );
}

#[test]
fn a_server_restores_on_demand_what_its_store_has() {
    let directory = tempfile::tempdir().unwrap();
    let Some(without) = server() else { return };
    let beside = Beside::new(&without);
    let store = directory.path().join("store").display().to_string();
    beside.run(&["store", "init", "--store", &store]);
    let server = server_with(&["--store", &store, "--pool", "1"]).unwrap();
    let restore = |server: &Server, working_set: Option<&str>| {
        let body = json!({
            "working_set": working_set,
            "cpu_snapshot_path": server.path("state"),
            "memory_snapshot_path": server.path("memory"),
            "resume": true,
            "on_demand": true,
        });
        server.client.post("/create", &body).unwrap()
    };
    for (server, can) in [(&server, true), (&without, false)] {
        let machine = crate::counting(server, 3);
        let (state, memory) = (server.path("state"), server.path("memory"));
        let client = &server.client;
        client.snapshot(machine, &state, &memory, false).unwrap();
        let answer = restore(server, None);
        if can {
            assert_eq!(answer.status, 200, "{answer:?}");
            let goes_on = |answer: &Answer| {
                let number = |name: &str| answer.body[name].as_u64().unwrap();
                let restored = Machine {
                    pid: number("pid") as u32,
                    port: number("port") as u16,
                };
                let console = server.console(restored).unwrap();
                console.first("a count", count).unwrap();
                restored.pid
            };
            goes_on(&answer);
            // The next ones begin in processes that were prepared for machines like this.
            wait::until("a prepared process to become the machine", || {
                let waiting = prepared(server);
                let restored = goes_on(&restore(server, Some("ignore")));
                waiting.contains(&restored).then_some(())
            })
            .unwrap();
            let recorded = |working_set: &str| {
                let restored = goes_on(&restore(server, Some(working_set))).to_string();
                let come = || (!is_missing(server, &restored)).then_some(());
                wait::until("all to come", come).unwrap();
                gauge(server, &restored, "fermata_recorded_pages")
            };
            assert_eq!(recorded("ignore"), 0);
            assert!(recorded("record") > 0);
        } else {
            assert_eq!(answer.status, 400, "{answer:?}");
            let said = answer.body.to_string();
            assert!(said.contains("on demand"), "{said}");
        }
    }
}
