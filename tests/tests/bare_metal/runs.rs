//! A guest that says by itself that it is done runs over and over.

use std::{
    fs,
    num::NonZeroU32,
    thread::{self, JoinHandle},
    time::Duration,
};

use api_types::VmState;
use control::{Client, GuestClock, Registry, RunsRequest};
use serde_json::{Value, json};
use system_tests::{
    bare_metal::{self, RUN_ENDLESS, RUN_PAGES, RUN_POWER_OFF, RUN_RESULT, WENT_ON},
    http::{Answer, Machine},
    server::Server,
    wait,
};

use crate::{boot, cli, gauge, server};

/// A fork of the runner, which waits for its first run.
fn runner(server: &Server) -> Machine {
    let parent = boot(server, &bare_metal::runner());
    let console = server.console(parent).unwrap();
    console.first("the runner", bare_metal::count).unwrap();
    fork(server, parent)
}

/// Forks `of`, which ends.
fn fork(server: &Server, of: Machine) -> Machine {
    let pid = of.pid.to_string();
    let forks = cli(server).json(&["fork", "--json", &pid]).unwrap();
    cli(server).run(&["stop", &pid]).unwrap();
    let number = |key: &str| forks[0][key].as_u64().unwrap();
    Machine {
        pid: number("pid") as u32,
        port: number("port") as u16,
    }
}

fn ask(server: &Server, machine: Machine, request: &Value) -> Answer {
    let path = format!("/vms/{}/runs", machine.pid);
    server.client.post(&path, request).unwrap()
}

fn runs(server: &Server, machine: Machine, request: &Value) -> Value {
    let answer = ask(server, machine, request);
    assert_eq!(answer.status, 200, "{:?}", answer.body);
    answer.body
}

/// Has it be in a run that does not end, which another thread waits for.
fn endless(server: &Server, machine: Machine) -> JoinHandle<Answer> {
    let client = server.client.clone();
    let path = format!("/vms/{}/runs", machine.pid);
    let request = json!({"runs": 2, "first": RUN_ENDLESS});
    let waiting = thread::spawn(move || client.post(&path, &request).unwrap());
    begun(server, machine, RUN_ENDLESS);
    waiting
}

/// Waits until it is in the run of this number, and was not before.
fn begun(server: &Server, machine: Machine, number: u32) {
    let console = server.console(machine).unwrap();
    let said = |line: &str| bare_metal::count(line).filter(|said| *said == u64::from(number));
    console.first("the run's number", said).unwrap();
}

fn state(server: &Server, machine: Machine) -> VmState {
    server.client.vm(machine.pid).unwrap().state
}

/// How the runs ended that `waiting` waits for.
fn ended(waiting: JoinHandle<Answer>) -> String {
    let answer = waiting.join().unwrap();
    assert_eq!(answer.status, 200, "{:?}", answer.body);
    answer.body["ended"].as_str().unwrap().to_owned()
}

#[test]
fn runs_are_numbered_and_each_finds_memory_as_it_was() {
    let Some(server) = server() else { return };
    let machine = runner(&server);
    let report = runs(&server, machine, &json!({"runs": 5, "first": 7}));
    assert_eq!(report["ended"], "all-done", "{report}");
    let [done, last, result] = ["done", "last", "result"].map(|key| report[key].as_u64());
    assert_eq!([done, last, result], [Some(5), Some(11), Some(0)]);
    let dirty = report["dirty_pages"].as_u64().unwrap();
    assert!((5 * RUN_PAGES..6 * RUN_PAGES).contains(&dirty), "{report}");
    assert_eq!(state(&server, machine), VmState::Paused);
    // Once more than there were runs: before the first.
    assert_eq!(gauge(&server, machine.pid, "fermata_resets_total"), 6);

    // From where it is held, and by the command.
    let cli = cli(&server);
    let pid = machine.pid.to_string();
    let report = cli
        .json(&["reset", &pid, "--runs", "300", "--json"])
        .unwrap();
    assert_eq!(
        (&report["done"], &report["last"]),
        (&300.into(), &300.into())
    );
    let said = cli
        .run(&["reset", &pid, "--runs", "1", "--first", "500"])
        .unwrap();
    assert!(said.contains("is what it was, and held: 1 runs"), "{said}");
    let text = server.console(machine).unwrap().text();
    let numbers: Vec<u64> = text.lines().filter_map(bare_metal::count).collect();
    let expected: Vec<u64> = (7..=11).chain(1..=300).chain([500]).collect();
    assert_eq!(numbers, expected);
    // Let go, it waits for a run.
    cli.run(&["resume", &pid]).unwrap();
    cli.run(&["pause", &pid]).unwrap();
    assert_eq!(runs(&server, machine, &json!({"runs": 1}))["result"], 0);
    // Saved where it is held, which it has not run from, it is what it was as well.
    cli.run(&["snapshot", &pid, "state", "memory", "--halt"])
        .unwrap();
    let (saved, memory) = (server.path("state"), server.path("memory"));
    let restored = server.client.restore(&saved, &memory).unwrap();
    let report = runs(&server, restored, &json!({"runs": 20}));
    assert_eq!(report["ended"], "all-done", "{report}");
}

#[test]
fn a_result_ends_them_and_the_machine_is_held_there() {
    let Some(server) = server() else { return };
    let machine = runner(&server);
    let first = RUN_RESULT - 1;
    let report = runs(&server, machine, &json!({"runs": 9, "first": first}));
    assert_eq!(report["ended"], "result", "{report}");
    let [done, last, result] = ["done", "last", "result"].map(|key| report[key].as_u64());
    assert_eq!(
        [done, last, result],
        [Some(2), Some(RUN_RESULT as u64 + 1), Some(1)]
    );
    assert_eq!(state(&server, machine), VmState::Paused);
    // It goes on behind what it said, with what it wrote.
    let pid = machine.pid.to_string();
    let cli = cli(&server);
    cli.run(&["resume", &pid]).unwrap();
    let went_on = |line: &str| bare_metal::count(line).filter(|said| said & WENT_ON != 0);
    let console = server.console(machine).unwrap();
    let said = console.first("what it wrote", went_on).unwrap();
    assert_eq!(said, WENT_ON | u64::from(RUN_RESULT) | 1);
    let arguments = ["reset", &pid, "--runs", "1", "--first", "65543", "--json"];
    let output = cli.command(&arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["result"], 7);
}

#[test]
fn a_run_that_takes_too_long_ends_them() {
    let Some(server) = server() else { return };
    let machine = runner(&server);
    let request = json!({"runs": 100, "run_limit_ms": 3000});
    let report = runs(&server, machine, &request);
    assert_eq!(report["ended"], "all-done", "{report}");
    let request = json!({"runs": 2, "first": RUN_ENDLESS, "run_limit_ms": 100});
    let report = runs(&server, machine, &request);
    assert_eq!(report["ended"], "limit", "{report}");
    let [done, last, result] = ["done", "last", "result"].map(|key| report[key].as_u64());
    assert_eq!(
        [done, last, result],
        [Some(0), Some(RUN_ENDLESS.into()), None]
    );
    assert_eq!(state(&server, machine), VmState::Paused);
}

#[test]
fn whoever_asks_for_something_else_ends_them() {
    let Some(server) = server() else { return };
    let cli = cli(&server);
    let interrupt: [(&[&str], VmState); 4] = [
        (&["pause"], VmState::Paused),
        (&["resume"], VmState::Running),
        (&["reset"], VmState::Running),
        (&["reset", "--runs", "1"], VmState::Paused),
    ];
    for (arguments, after) in interrupt {
        let machine = runner(&server);
        let waiting = endless(&server, machine);
        assert_eq!(state(&server, machine), VmState::Running);
        let pid = machine.pid.to_string();
        let command = [&arguments[..1], &[&pid], &arguments[1..]].concat();
        cli.run(&command).unwrap();
        assert_eq!(ended(waiting), "interrupted", "{arguments:?}");
        assert_eq!(state(&server, machine), after, "{arguments:?}");
        cli.run(&["stop", &pid]).unwrap();
    }
    let machine = runner(&server);
    let pid = machine.pid.to_string();
    let waiting = endless(&server, machine);
    cli.run(&["snapshot", &pid, "state", "memory"]).unwrap();
    assert_eq!(ended(waiting), "interrupted");
    assert_eq!(state(&server, machine), VmState::Running);
    // And again, with a machine that was in a run when it was saved.
    cli.run(&["stop", &pid]).unwrap();
    let (saved, memory) = (server.path("state"), server.path("memory"));
    let restored = server.client.restore(&saved, &memory).unwrap();
    cli.run(&["pause", &restored.pid.to_string()]).unwrap();
    let request = json!({"runs": 1, "run_limit_ms": 10});
    assert_eq!(runs(&server, restored, &request)["ended"], "limit");

    let machine = runner(&server);
    let waiting = endless(&server, machine);
    cli.run(&["stop", &machine.pid.to_string()]).unwrap();
    assert_eq!(ended(waiting), "interrupted");
    let machine = runner(&server);
    let report = runs(
        &server,
        machine,
        &json!({"runs": 1, "first": RUN_POWER_OFF}),
    );
    assert_eq!(report["ended"], "ended", "{report}");
}

#[test]
fn runs_that_nobody_waits_for_end() {
    let Some(server) = server() else { return };
    let machine = runner(&server);
    let registry = Registry::open(server.run_directory()).unwrap();
    let record = registry.find_pid(machine.pid).unwrap().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let request = RunsRequest {
        runs: NonZeroU32::MIN,
        first: NonZeroU32::new(RUN_ENDLESS).unwrap(),
        run_limit_ms: None,
        clock: GuestClock::StandStill,
    };
    runtime.block_on(async {
        let client = Client::connect(record.port, &record.secret).await.unwrap();
        let runs = client.runs(request);
        tokio::pin!(runs);
        let console = server.console(machine).unwrap();
        let begun = |line: &str| bare_metal::count(line).filter(|said| *said != 0);
        while console.last(begun).is_none() {
            let moment = tokio::time::sleep(Duration::from_millis(1));
            tokio::select! {
                report = &mut runs => panic!("{report:?}"),
                () = moment => {}
            }
        }
    });
    drop(runtime);
    let held = || (state(&server, machine) == VmState::Paused).then_some(());
    wait::until("the end of the runs", held).unwrap();
    assert_eq!(
        runs(&server, machine, &json!({"runs": 1}))["ended"],
        "all-done"
    );
}

#[test]
fn a_guest_whose_runs_end_just_as_it_is_done_goes_on() {
    let Some(server) = server() else { return };
    let parent = boot(&server, &bare_metal::shouter());
    let console = server.console(parent).unwrap();
    console.first("a line", |line| Some(line.len())).unwrap();
    let machine = fork(&server, parent);
    // The first of that name, which is of ports.
    let exits = || gauge(&server, machine.pid, "fermata_vcpu_exits_total");
    let resets = || gauge(&server, machine.pid, "fermata_resets_total");
    for _ in 0..20 {
        let client = server.client.clone();
        let path = format!("/vms/{}/runs", machine.pid);
        let request = json!({"runs": 1_000_000});
        let before = resets();
        let waiting = thread::spawn(move || client.post(&path, &request).unwrap());
        let some = || (resets() > before + 10).then_some(());
        wait::until("some runs", some).unwrap();
        // It runs already: this ends its runs, and nothing else.
        let resume = format!("/vms/{}/resume", machine.pid);
        assert_eq!(server.client.post(&resume, &json!({})).unwrap().status, 200);
        assert_eq!(ended(waiting), "interrupted");
        let before = exits();
        let on = || (exits() > before + 100).then_some(());
        wait::until("the guest", on).unwrap();
    }
}

#[test]
fn a_guest_that_says_so_all_the_time_on_all_vcpus_is_run_as_any() {
    let Some(server) = server() else { return };
    fs::write(server.tree().join("kernel"), bare_metal::shouter()).unwrap();
    let more = json!({"vcpus": 3, "memory_mib": 64});
    let parent = server.client.boot(&server.path("kernel"), &more).unwrap();
    let console = server.console(parent).unwrap();
    console.first("a line", |line| Some(line.len())).unwrap();
    let machine = fork(&server, parent);
    let cli = cli(&server);
    let pid = machine.pid.to_string();
    for _ in 0..3 {
        let report = runs(&server, machine, &json!({"runs": 200}));
        assert_eq!(
            (&report["ended"], &report["done"]),
            (&"all-done".into(), &200.into())
        );
        assert_eq!(state(&server, machine), VmState::Paused);
        cli.run(&["resume", &pid]).unwrap();
    }
    // Interrupted at any instant, no vCPU is lost.
    let client = server.client.clone();
    let path = format!("/vms/{pid}/runs");
    let waiting = thread::spawn(move || {
        let request = json!({"runs": 1_000_000});
        let mut interrupted = 0;
        loop {
            let answer = client.post(&path, &request).unwrap();
            if answer.status != 200 {
                break interrupted;
            }
            interrupted += u32::from(answer.body["ended"] == "interrupted");
        }
    });
    for _ in 0..30 {
        for command in ["pause", "resume", "reset", "resume", "pause"] {
            cli.run(&[command, &pid]).unwrap();
        }
    }
    cli.run(&["stop", &pid]).unwrap();
    assert!(waiting.join().unwrap() > 0);
}

#[test]
fn what_cannot_be_run_is_refused() {
    let Some(server) = server() else { return };
    let booted = boot(&server, &bare_metal::runner());
    let answer = ask(&server, booted, &json!({"runs": 1}));
    assert_eq!(answer.status, 409, "{answer:?}");
    assert_eq!(state(&server, booted), VmState::Running);
    let pid = booted.pid.to_string();
    cli(&server).run(&["pause", &pid]).unwrap();
    let said = cli(&server)
        .refused(&["reset", &pid, "--runs", "1"])
        .unwrap();
    assert!(said.contains("fermata fork"), "{said}");
    assert_eq!(state(&server, booted), VmState::Paused);
    let machine = runner(&server);
    for request in [
        json!({"runs": 0}),
        json!({}),
        json!({"runs": 1, "first": 0}),
        json!({"runs": 1, "run_limit_ms": 0}),
        json!({"runs": 2, "first": u32::MAX}),
    ] {
        let answer = ask(&server, machine, &request);
        assert_eq!(answer.status, 400, "{request}: {answer:?}");
    }
    assert_eq!(state(&server, machine), VmState::Running);
    // Nor does that end others.
    let waiting = endless(&server, machine);
    let answer = ask(&server, machine, &json!({"runs": 2, "first": u32::MAX}));
    assert_eq!(answer.status, 400, "{answer:?}");
    assert!(!waiting.is_finished());
    let pid = machine.pid.to_string();
    cli(&server).run(&["pause", &pid]).unwrap();
    assert_eq!(ended(waiting), "interrupted");
}
