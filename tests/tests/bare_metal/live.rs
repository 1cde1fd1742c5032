//! Machines go on beside their snapshots.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use api_types::VmState;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use system_tests::{bare_metal, cli::Cli, http::Machine, server::Server, wait};

use crate::{boot, cli, counting, gauge, hear, server};

/// The saved machine that `words` name, as `fermata restore` wants it, goes on.
pub(crate) fn restored(cli: &Cli, server: &Server, words: &[&str]) -> Machine {
    let answer = cli.json(&[&["restore", "--json"], words].concat()).unwrap();
    let pid = answer["pid"].as_u64().unwrap() as u32;
    let vms = server.client.get("/vms").unwrap().body;
    let mut vms = vms.as_array().unwrap().iter();
    let vm = vms.find(|vm| vm["pid"] == pid).unwrap();
    let port = vm["port"].as_u64().unwrap() as u16;
    Machine { pid, port }
}

/// How many snapshots are taken where more show more; this variable asks for others than are taken as a rule.
pub(crate) fn rounds(usual: u64) -> u64 {
    let asked = std::env::var("FERMATA_TEST_ROUNDS").ok();
    asked.map_or(usual, |rounds| rounds.parse().unwrap())
}

/// The saved machine `name` goes on as one fork.
fn forked(cli: &Cli, name: &str) -> Machine {
    let forks = cli.json(&["fork", name, "--json"]).unwrap();
    Machine {
        pid: forks[0]["pid"].as_u64().unwrap() as u32,
        port: forks[0]["port"].as_u64().unwrap() as u16,
    }
}

/// Saves the machine `pid` at any moment of what its guest does, two times of five by pre-copy, so that each way follows each on each
/// destination; and has it go on as another: from the store, on demand, as a fork, or from files.
fn saved_and_gone_on(cli: &Cli, server: &Server, pid: &str, round: u64) -> Machine {
    let name = format!("snapshot-{round}");
    // What goes into files takes all of memory and leaves the store's last what the next builds on.
    let to = match round % 4 {
        3 => &["state", "memory"][..],
        _ => &[name.as_str()],
    };
    thread::sleep(Duration::from_millis(round * 7919 % 41));
    let copy = ["copy-on-write", "pre-copy"][usize::from(round % 5 < 2)];
    let words = [&["snapshot", "--json", pid, "--copy", copy], to].concat();
    let report = cli.json(&words).unwrap();
    assert_eq!(report["copy"], copy, "{report}");
    assert!(report["rounds"].as_u64().unwrap() > 0, "{report}");
    match round % 4 {
        1 => restored(cli, server, &[&name, "--on-demand"]),
        2 => forked(cli, &name),
        _ => restored(cli, server, to),
    }
}

/// Ends `copy`, and now and then removes a snapshot that others were built on.
fn done_with(cli: &Cli, copy: Machine, round: u64) {
    cli.run(&["stop", &copy.pid.to_string()]).unwrap();
    if round % 4 == 3 {
        cli.run(&["store", "rm", &format!("snapshot-{}", round - 2)])
            .unwrap();
        cli.run(&["store", "gc"]).unwrap();
    }
}

fn assert_clean(cli: &Cli) {
    let checked = cli.json(&["store", "fsck", "--json"]).unwrap();
    assert_eq!(checked["problems"], json!([]), "{checked}");
}

#[test]
fn a_guest_that_writes_all_the_time_is_saved_as_it_was_at_each_cut() {
    let Some(server) = server() else { return };
    let cli = cli(&server);
    cli.run(&["store", "init"]).unwrap();
    let witness = boot(&server, &bare_metal::witness());
    hear(&server, witness);
    let pid = witness.pid.to_string();
    let mut before = 0;
    for round in 0..rounds(8) {
        let copy = saved_and_gone_on(&cli, &server, &pid, round);
        // It verifies what it wrote before the cut.
        let said = hear(&server, copy);
        assert!(!said.disturbed && said.round > before, "{round}: {said:?}");
        before = hear(&server, witness).round;
        done_with(&cli, copy, round);
    }
    assert!(!hear(&server, witness).disturbed);
    assert_clean(&cli);
}

/// Has the crew's balloon become one of so many MiB, some time.
fn ballooned(server: &Server, machine: Machine, mib: u64) {
    let path = format!("/vms/{}/balloon", machine.pid);
    let answer = server.client.patch(&path, &json!({"target_mib": mib}));
    assert_eq!(answer.unwrap().status, 200);
}

#[test]
fn all_vcpus_write_while_memory_is_given_back_and_nothing_is_torn_lost_or_leaked() {
    let Some(server) = server() else { return };
    let cli = cli(&server);
    cli.run(&["store", "init"]).unwrap();
    fs::write(server.tree().join("kernel"), bare_metal::crew()).unwrap();
    let balloon = json!({"deflate_on_oom": true, "free_page_reporting": true});
    let more = json!({"vcpus": 3, "memory_mib": 64, "balloon": balloon});
    let crew = server.client.boot(&server.path("kernel"), &more).unwrap();
    hear(&server, crew);
    let pid = crew.pid.to_string();
    let mut before = 0;
    for round in 0..rounds(4) {
        ballooned(&server, crew, [16, 2, 10, 0][round as usize % 4]);
        let copy = saved_and_gone_on(&cli, &server, &pid, round);
        // It gives memory back, or takes it, while more of it comes.
        ballooned(&server, copy, [2, 16, 4, 12][round as usize % 4]);
        let said = hear(&server, copy);
        // The first line of a copy has the least round of all vCPUs, in which the slowest may still have been when the crew last said so.
        assert!(!said.disturbed && said.round >= before, "{round}: {said:?}");
        before = hear(&server, crew).round;
        done_with(&cli, copy, round);
    }
    assert!(!hear(&server, crew).disturbed);
    let counted = |what| {
        gauge(
            &server,
            crew.pid,
            &format!("fermata_device_{what}_bytes_total"),
        )
    };
    let (reported, discarded) = (counted("reported"), counted("discarded"));
    assert!(
        reported > 0 && discarded > reported / 2,
        "{discarded} of {reported}"
    );
    assert_clean(&cli);
}

#[test]
fn a_snapshot_takes_what_was_written_to_since_the_last() {
    let Some(server) = server() else { return };
    let cli = cli(&server);
    cli.run(&["store", "init"]).unwrap();
    let machine = counting(&server, 3);
    let pid = machine.pid.to_string();
    let save = |words: &[&str]| -> Value {
        let words = [&["snapshot", "--json", &pid], words].concat();
        cli.json(&words).unwrap()
    };
    let new = |report: &Value| report["stored"]["new_bytes"].as_u64().unwrap();
    // Of the last snapshot: it has no disk, so that this is memory alone.
    let read = || gauge(&server, machine.pid, control::SNAPSHOT_BYTES_TOTAL);
    save(&["first"]);
    let all = read();
    // It writes to a page or two meanwhile. The rest is not even looked at.
    let second = save(&["second"]);
    assert!(read() * 4 < all, "{} of {all}", read());
    assert!(new(&second) < (64 << 20) / 200, "{second}");
    // What stood still in between is no base that anything is known of.
    let third = save(&["third", "--copy", "stop-and-copy"]);
    assert_eq!(
        (&third["copy"], &third["rounds"]),
        (&json!("stop-and-copy"), &json!(0))
    );
    let fourth = save(&["fourth"]);
    assert_eq!(fourth["copy"], "copy-on-write");
    assert!(read() * 4 > all * 3, "{} of {all}", read());
    assert!(new(&fourth) < (64 << 20) / 200, "{fourth}");
    // Nor is what is in the base copied.
    let copied = save(&["copied", "--copy", "pre-copy"]);
    let copied_bytes = copied["copied_bytes"].as_u64().unwrap();
    assert!(copied_bytes * 4 < all, "{copied}");
    assert!(new(&copied) < (64 << 20) / 200, "{copied}");
    cli.run(&["store", "rm", "copied"]).unwrap();
    // Nor is one that is gone.
    cli.run(&["store", "rm", "fourth"]).unwrap();
    cli.run(&["store", "gc"]).unwrap();
    save(&["fifth"]);
    assert_clean(&cli);
    let copy = restored(&cli, &server, &["fifth"]);
    let console = server.console(copy).unwrap();
    console.first("a count", bare_metal::count).unwrap();
}

#[test]
fn where_the_guest_cannot_go_on_it_stands_still_or_that_is_said() {
    let Some(server) = server() else { return };
    let cli = cli(&server);
    let machine = counting(&server, 1);
    let pid = machine.pid.to_string();
    let copying = ["--copy", "copy-on-write"];
    let halting = [&["snapshot", &pid, "s", "m", "--halt"], &copying[..]].concat();
    let refused = cli.refused(&halting).unwrap();
    assert!(refused.contains("does not go on"), "{refused}");
    cli.run(&["snapshot", &pid, "s", "m"]).unwrap();

    // Linux does not watch what is mapped from most files.
    let mapped = restored(&cli, &server, &["s", "m"]);
    let pid = mapped.pid.to_string();
    let words = ["snapshot", "--json", &pid, "t", "n"];
    let report = cli.json(&words).unwrap();
    assert_eq!(report["copy"], "stop-and-copy", "{report}");
    let refused = cli.refused(&[&words, &copying[..]].concat()).unwrap();
    assert!(refused.contains("mapped from a memory file"), "{refused}");
    // It goes on.
    let console = server.console(mapped).unwrap();
    let now = console.last(bare_metal::count).unwrap_or(0);
    let next = |line: &str| bare_metal::count(line).filter(|count| *count > now);
    console.first("the next count", next).unwrap();
}

/// How a snapshot that takes minutes ends when `then` is done.
fn slow_snapshot(cli: &Cli, server: &Server, pid: &str, copy: &str, then: impl FnOnce()) -> String {
    let words = ["snapshot", pid, "slow", "--limit", "200K", "--copy", copy];
    thread::scope(|scope| {
        let saving = scope.spawn(|| cli.refused(&words).unwrap());
        let pid = pid.parse().unwrap();
        wait::until("the snapshot to begin", || {
            (server.client.vm(pid).unwrap().state == VmState::Saving).then_some(())
        })
        .unwrap();
        then();
        saving.join().unwrap()
    })
}

#[test]
fn a_snapshot_is_cancelled_and_the_machine_goes_on_and_is_saved_again() {
    let Some(server) = server() else { return };
    let cli = cli(&server);
    cli.run(&["store", "init"]).unwrap();
    let witness = boot(&server, &bare_metal::witness());
    hear(&server, witness);
    let pid = witness.pid.to_string();
    let none = cli.refused(&["cancel", &pid]).unwrap();
    assert!(none.contains("no snapshot"), "{none}");
    let cancel = || drop(cli.run(&["cancel", &pid]).unwrap());
    let delete = || {
        let path = format!("/vms/{pid}/snapshot");
        let answer = server.client.delete(&path).unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
    };
    let ways: [(&str, &dyn Fn()); 4] = [
        ("copy-on-write", &cancel),
        ("pre-copy", &cancel),
        ("copy-on-write", &delete),
        ("pre-copy", &delete),
    ];
    for (copy, way) in ways {
        let said = slow_snapshot(&cli, &server, &pid, copy, way);
        assert!(said.contains("was cancelled"), "{said}");
        assert!(!hear(&server, witness).disturbed);
    }
    let listed = cli.json(&["store", "ls", "--json"]).unwrap();
    assert_eq!(listed, json!([]));
    cli.run(&["snapshot", &pid, "whole"]).unwrap();
    let copy = restored(&cli, &server, &["whole"]);
    assert!(!hear(&server, copy).disturbed);
    assert_clean(&cli);

    // Nor does it keep its machine from ending.
    let stop = || drop(cli.run(&["stop", &pid]).unwrap());
    let said = slow_snapshot(&cli, &server, &pid, "pre-copy", stop);
    assert!(
        said.contains("cancelled") || said.contains("went away"),
        "{said}"
    );
}

#[test]
fn a_snapshot_ends_when_its_command_is_interrupted() {
    let Some(server) = server() else { return };
    let cli = cli(&server);
    let machine = counting(&server, 1);
    let pid = machine.pid.to_string();
    let state = || server.client.vm(machine.pid).unwrap().state;
    let mut command = cli.command(&["snapshot", &pid, "s", "m", "--limit", "200K"]);
    let command = command.stderr(Stdio::piped()).spawn().unwrap();
    wait::until("the snapshot to begin", || {
        (state() == VmState::Saving).then_some(())
    })
    .unwrap();
    kill_process(Pid::from_child(&command), Signal::INT).unwrap();
    let output = command.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && said.contains("was cancelled"),
        "{said}"
    );
    assert_eq!(state(), VmState::Running);
    assert_eq!(server.names().unwrap(), ["kernel"]);
}

#[test]
fn only_what_the_guest_goes_on_beside_is_slowed() {
    let Some(server) = server() else { return };
    let cli = cli(&server);
    let machine = counting(&server, 1);
    let pid = machine.pid.to_string();
    let snapshot = ["snapshot", &pid, "s", "m", "--limit", "1G"];
    for still in [&["--halt"][..], &["--copy", "stop-and-copy"]] {
        let refused = cli.refused(&[&snapshot, still].concat()).unwrap();
        assert!(refused.contains("leave the limit out"), "{refused}");
    }
    cli.run(&snapshot).unwrap();
}

#[test]
fn memory_is_copied_before_the_guest_stands_still_also_of_one_that_ends() {
    let Some(server) = server() else { return };
    let cli = cli(&server);
    cli.run(&["store", "init"]).unwrap();
    let number = |report: &Value, field: &str| report[field].as_u64().unwrap();
    let save = |machine: Machine, to: &[&str]| {
        let pid = machine.pid.to_string();
        let words = ["snapshot", "--json", &pid, "--copy", "pre-copy"];
        cli.json(&[&words, to].concat()).unwrap()
    };
    // One that writes to little is copied whole while it does.
    let machine = counting(&server, 3);
    let quiet = save(machine, &["quiet"]);
    let copied = number(&quiet, "copied_bytes");
    assert!(
        copied + (1 << 20) > number(&quiet, "written_bytes"),
        "{quiet}"
    );
    assert!(number(&quiet, "last_round_bytes") < 1 << 20, "{quiet}");
    // One that writes to all of its memory is not, and its memory is right all the same. A file that was written over meanwhile is
    // no larger for it.
    let witness = boot(&server, &bare_metal::witness());
    let before = hear(&server, witness).round;
    save(witness, &["stored"]);
    let ended = save(witness, &["state", "memory", "--halt"]);
    assert_eq!(ended["copy"], "pre-copy", "{ended}");
    let file = fs::metadata(server.path("memory")).unwrap();
    let (size, taken) = (file.len(), file.blocks() * 512);
    let memory = number(&ended, "memory_bytes");
    assert!(size >= memory && size - memory < memory / 100, "{size}");
    let written = number(&ended, "written_bytes");
    assert!(taken <= written + memory / 50, "{taken} for {written}");
    for words in [&["stored"][..], &["state", "memory"]] {
        let copy = restored(&cli, &server, words);
        let said = hear(&server, copy);
        assert!(!said.disturbed && said.round > before, "{said:?}");
    }
    // One that stands still leaves nothing for later but where it is told that it did.
    let copy = restored(&cli, &server, &["stored"]);
    cli.run(&["pause", &copy.pid.to_string()]).unwrap();
    let still = save(copy, &["still"]);
    assert!(number(&still, "last_round_bytes") <= 64 << 10, "{still}");
    let copy = restored(&cli, &server, &["still"]);
    assert!(!hear(&server, copy).disturbed);
}

/// How each thread of a process is scheduled, by name: 0 is as all are of which nobody has said anything else.
fn policies(pid: u32) -> BTreeMap<String, u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let policy = |task: fs::DirEntry| {
        // It may have ended.
        let stat = fs::read_to_string(task.path().join("stat")).ok()?;
        let (name, rest) = stat.rsplit_once(')')?;
        // The 41st field, of which the name is the second (proc_pid_stat(5)).
        let policy = rest.split_whitespace().nth(38)?.parse().unwrap();
        Some((name.to_owned(), policy))
    };
    tasks.filter_map(|task| policy(task.unwrap())).collect()
}

#[test]
fn no_thread_has_priority_once_the_guest_goes_on() {
    let Some(server) = server() else { return };
    let cli = cli(&server);
    cli.run(&["store", "init"]).unwrap();
    let machine = boot(&server, &bare_metal::witness());
    hear(&server, machine);
    let pid = machine.pid.to_string();
    let permitted = Command::new("chrt").args(["-f", "1", "true"]).status();
    let permitted = permitted.is_ok_and(|status| status.success());
    let usual = policies(machine.pid);
    assert!(
        usual.len() > 3 && usual.values().all(|policy| *policy == 0),
        "{usual:?}"
    );
    let check = |machine: Machine, what: &str| {
        hear(&server, machine);
        let found = policies(machine.pid);
        assert!(
            found.values().all(|policy| *policy == 0),
            "{what}: {found:?}"
        );
    };
    for copy in ["copy-on-write", "stop-and-copy", "pre-copy"] {
        cli.run(&["snapshot", &pid, copy, "--copy", copy]).unwrap();
        check(machine, copy);
    }
    for _ in 0..2 {
        cli.run(&["pause", &pid]).unwrap();
        // Whoever is held has been given it, if that is permitted; the controller has done with it.
        let held = policies(machine.pid);
        let given = held.iter().filter(|(_, policy)| **policy != 0);
        assert!(
            given.clone().all(|(name, _)| name.contains("vcpu")),
            "{held:?}"
        );
        assert!(!permitted || given.count() == 1, "{held:?}");
        cli.run(&["resume", &pid]).unwrap();
        check(machine, "pause");
    }
    let fork = forked(&cli, "pre-copy");
    check(fork, "fork");
    cli.run(&["pause", &fork.pid.to_string()]).unwrap();
    cli.run(&["reset", &fork.pid.to_string()]).unwrap();
    cli.run(&["resume", &fork.pid.to_string()]).unwrap();
    check(fork, "reset");
}

#[test]
fn a_guest_that_would_stand_still_for_too_long_is_not_saved_and_goes_on() {
    let Some(server) = server() else { return };
    let cli = cli(&server);
    let machine = boot(&server, &bare_metal::witness());
    hear(&server, machine);
    let pid = machine.pid.to_string();
    let words = |more: &[&'static str]| {
        let begin = ["snapshot", pid.as_str(), "state", "memory", "--halt"];
        [&begin[..], more].concat()
    };
    // Nobody reads 64 MiB in a millisecond. Who is copied as slowly as this has written to about as much until it is stopped.
    let slowly = &["--copy", "pre-copy", "--limit", "64M"][..];
    for copy in [&["--copy", "stop-and-copy"], slowly] {
        let refused = cli.refused(&words(&[&["--max-downtime", "1"], copy].concat()));
        let refused = refused.unwrap();
        assert!(
            refused.contains("longer than it may"),
            "{copy:?}: {refused}"
        );
        assert!(!server.tree().join("memory").exists());
        assert!(!hear(&server, machine).disturbed, "{copy:?}");
    }
    let long = words(&["--max-downtime", "600000", "--copy", "pre-copy"]);
    cli.run(&long).unwrap();
    let restored = restored(&cli, &server, &["state", "memory"]);
    assert!(!hear(&server, restored).disturbed);
}
