//! One machine goes on as many.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    process::{Child, Stdio},
    thread,
};

use control::{ProcessId, Record, Registry};
use serde_json::{Value, json};
use system_tests::{bare_metal, http::Machine, server::Server, wait};

use crate::{boot, cli, hear, server, server_with};

/// Runs `fermata fork` and returns the machines that it has made.
fn fork(server: &Server, words: &[&str]) -> Vec<Machine> {
    let words = [&["fork", "--json"], words].concat();
    machines(&cli(server).json(&words).unwrap())
}

fn machines(forks: &Value) -> Vec<Machine> {
    let number = |fork: &Value, key: &str| fork[key].as_u64().unwrap();
    let machine = |fork| Machine {
        pid: number(fork, "pid") as u32,
        port: number(fork, "port") as u16,
    };
    forks.as_array().unwrap().iter().map(machine).collect()
}

/// Asks the server to fork, and returns the machines that it has made.
fn ask(server: &Server, body: &Value) -> Vec<Machine> {
    let answer = server.client.post("/fork", body).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    machines(&answer.body["forks"])
}

#[test]
fn twenty_forks_of_a_machine_at_work_have_its_memory_and_never_each_others() {
    let Some(server) = server() else { return };
    let parent = boot(&server, &bare_metal::witness());
    let before = hear(&server, parent);
    let forks = fork(&server, &[&parent.pid.to_string(), "--count", "20"]);
    assert_eq!(forks.len(), 20);
    for machine in forks.iter().chain([&parent]) {
        let first = hear(&server, *machine);
        assert!(first.round > before.round, "{first:?} after {before:?}");
    }
    // Each has marked its memory with its own generation by now, while all others did.
    let mut generations = BTreeSet::new();
    for machine in forks.iter().chain([&parent]) {
        let said = hear(&server, *machine);
        assert!(!said.disturbed, "{machine:?} {said:?}");
        generations.insert(said.generation);
    }
    assert_eq!(generations.len(), 21);
    assert!(generations.contains(&before.generation));
}

#[test]
fn saved_machines_are_forked_from_files_and_from_a_store() {
    let Some(server) = server() else { return };
    let machine = boot(&server, &bare_metal::witness());
    hear(&server, machine);
    let cli = cli(&server);
    let pid = machine.pid.to_string();
    cli.run(&["snapshot", &pid, "state", "memory"]).unwrap();
    cli.run(&["store", "init"]).unwrap();
    cli.run(&["snapshot", &pid, "monday", "--halt"]).unwrap();
    let files = fork(&server, &["state", "memory", "--count", "2"]);
    let stored = fork(&server, &["monday", "--count", "2"]);
    // Forks of a fork, too.
    let again = fork(&server, &[&stored[0].pid.to_string()]);
    let mut generations = BTreeSet::new();
    for machine in files.iter().chain(&stored).chain(&again) {
        hear(&server, *machine);
        let said = hear(&server, *machine);
        assert!(!said.disturbed, "{said:?}");
        generations.insert(said.generation);
    }
    assert_eq!(generations.len(), 5);
    let origin = |machine: Machine| {
        let vm = server.client.vm(machine.pid).unwrap();
        serde_json::to_value(vm.origin).unwrap()
    };
    assert_eq!(
        origin(again[0]),
        json!({"kind": "fork", "of": stored[0].pid})
    );
    assert_eq!(origin(stored[0])["snapshot"], "monday");

    let memory = server.tree().join("memory");
    let mut bytes = fs::read(&memory).unwrap();
    bytes[0x100_0000] ^= 1;
    fs::write(&memory, bytes).unwrap();
    let refused = cli.refused(&["fork", "state", "memory"]).unwrap();
    assert!(refused.contains("checksum mismatch"), "{refused}");
}

#[test]
fn each_fork_writes_to_its_own_layer_and_none_to_a_raw_disk() {
    let Some(server) = server() else { return };
    let tree = server.tree();
    fs::write(tree.join("kernel"), bare_metal::counter()).unwrap();
    fs::write(tree.join("base"), vec![7; 1 << 20]).unwrap();
    for name in ["raw", "image"] {
        fs::write(tree.join(name), vec![7; 1 << 20]).unwrap();
    }
    let cli = cli(&server);
    cli.run(&["disk", "create", "d", "--base", "base"]).unwrap();
    let boot = |disk: Value| {
        let more = json!({"vcpus": 1, "memory_mib": 64, "disks": [disk]});
        server.client.boot(&server.path("kernel"), &more).unwrap()
    };
    let heads = || {
        let names = server.names().unwrap().into_iter();
        names.filter(|name| name.ends_with(".head")).count()
    };
    let branching = boot(json!({"path": server.path("d"), "format": "branch"}));
    fork(&server, &[&branching.pid.to_string(), "--count", "3"]);
    assert_eq!(heads(), 3);

    let read = boot(json!({"path": server.path("raw"), "read_only": true}));
    fork(&server, &[&read.pid.to_string(), "--count", "2"]);

    let written = boot(json!({"path": server.path("image"), "read_only": false}));
    let pid = written.pid.to_string();
    cli.run(&["snapshot", &pid, "state", "memory"]).unwrap();
    for of in [&[pid.as_str()][..], &["state", "memory"]] {
        let refused = cli.refused(&[&["fork"], of].concat()).unwrap();
        assert!(refused.contains("let it branch"), "{refused}");
    }
    // It goes on.
    let console = server.console(written).unwrap();
    let now = console.last(bare_metal::count).unwrap_or(0);
    let next = |line: &str| bare_metal::count(line).filter(|count| *count > now);
    console.first("the next count", next).unwrap();
}

#[test]
fn a_hook_is_told_of_each_fork() {
    let Some(server) = server() else { return };
    let machine = boot(&server, &bare_metal::spinner());
    let hook = server.tree().join("hook");
    fs::write(
        &hook,
        "#!/bin/sh\ntest -f $FERMATA_FORK_CONSOLE && echo $FERMATA_FORK_PID $FERMATA_FORK_PORT > told$FERMATA_FORK_NUMBER\n",
    )
    .unwrap();
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o700)).unwrap();
    let pid = machine.pid.to_string();
    let forks = fork(&server, &[&pid, "--count", "2", "--hook", "hook"]);
    for (number, fork) in forks.iter().enumerate() {
        let told = fs::read_to_string(server.tree().join(format!("told{number}"))).unwrap();
        assert_eq!(told, format!("{} {}\n", fork.pid, fork.port));
    }
    fs::write(&hook, "#!/bin/sh\nexit 7\n").unwrap();
    let words = ["fork", &pid, "--hook", "hook"];
    let refused = cli(&server).refused(&words).unwrap();
    assert!(refused.contains("exit status: 7"), "{refused}");
}

/// Starts the only machine there is by `fermata run`.
fn started(server: &Server, words: &[&str]) -> (Child, Registry, Record) {
    let run = cli(server)
        .command(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let registry = Registry::open(server.run_directory()).unwrap();
    let machine = wait::until("the machine to run", || registry.list().unwrap().pop()).unwrap();
    (run, registry, machine)
}

#[test]
fn each_fork_has_addresses_of_its_own() {
    let Some(server) = server() else { return };
    fs::write(server.tree().join("kernel"), bare_metal::spinner()).unwrap();
    let switch = super::network::Switch::new(&server.tree().join("switch"));
    let cli = cli(&server);
    let net = format!("socket={}", switch.path.display());
    let vsock = "cid=7,path=v";
    let shape = ["--vcpus", "1", "--memory", "64"];
    let words = [
        &["run", "kernel", "--net", &net, "--vsock", vsock][..],
        &shape,
    ];
    let (mut run, registry, parent) = started(&server, &words.concat());
    assert!(switch.connected());
    let pid = parent.process.pid.to_string();
    let forks = fork(&server, &[&pid, "--count", "2"]);
    let mut addresses = BTreeSet::new();
    for fork in &forks {
        assert!(switch.connected());
        assert!(server.tree().join(format!("v.{}", fork.pid)).exists());
        let log = fs::read_to_string(registry.log_of(fork.pid)).unwrap();
        let mac = log
            .lines()
            .find_map(|line| line.split_once("mac="))
            .unwrap()
            .1;
        addresses.insert(mac.to_owned());
        assert!(log.contains(&format!("cid={}", fork.pid)), "{log}");
    }
    assert_eq!(addresses.len(), 2, "{addresses:?}");
    let named = ["--vsock", "path=w{n}", "--net", "saved"];
    fork(&server, &[&[&pid, "--count", "2"][..], &named].concat());
    for one in [
        ["--vsock", "cid=9"],
        ["--vsock", "path=w"],
        ["--net", "mac=02:00:00:00:00:09"],
    ] {
        let words = [&["fork", &pid, "--count", "2"][..], &one].concat();
        let refused = cli.refused(&words).unwrap();
        assert!(refused.contains("several forks cannot have"), "{refused}");
    }
    for name in ["w0", "w1"] {
        assert!(server.tree().join(name).exists());
    }
    let _ = run.kill();
    let _ = run.wait();
}

#[test]
fn forks_that_cannot_all_be_there_are_none_and_leave_nothing() {
    let Some(server) = server() else { return };
    let tree = server.tree();
    fs::write(tree.join("kernel"), bare_metal::counter()).unwrap();
    fs::write(tree.join("base"), vec![7; 1 << 20]).unwrap();
    let cli = cli(&server);
    cli.run(&["disk", "create", "d", "--base", "base"]).unwrap();
    let shape = ["--vcpus", "1", "--memory", "64"];
    let devices = ["--disk", "d,format=branch", "--vsock", "cid=7,path=v"];
    let words = [&["run", "kernel"][..], &shape, &devices].concat();
    let (mut run, registry, parent) = started(&server, &words);
    let pid = parent.process.pid.to_string();
    // What stands in the way of the last of them.
    fs::write(tree.join("w2"), "not a socket").unwrap();
    let words = ["fork", &pid, "--count", "3", "--vsock", "path=w{n}"];
    let refused = cli.refused(&words).unwrap();
    assert!(refused.contains("w2"), "{refused}");
    assert_eq!(registry.list().unwrap().len(), 1);
    let names = server.names().unwrap();
    let left = |end: &str| names.iter().filter(|name| name.ends_with(end)).count();
    // The parent's head is `d` itself.
    assert_eq!(left(".head"), 0, "{names:?}");
    assert!(!names.contains(&"w0".to_owned()), "{names:?}");
    assert!(!names.contains(&"w1".to_owned()), "{names:?}");
    // Without what stood in the way, they are.
    fs::remove_file(tree.join("w2")).unwrap();
    assert_eq!(fork(&server, &words[1..]).len(), 3);
    let _ = run.kill();
    let _ = run.wait();
}

#[test]
fn a_machine_that_was_held_stays_so_and_its_forks_run() {
    let Some(server) = server() else { return };
    let parent = boot(&server, &bare_metal::witness());
    hear(&server, parent);
    let pid = parent.pid.to_string();
    cli(&server).run(&["pause", &pid]).unwrap();
    let forks = fork(&server, &[&pid, "--count", "2"]);
    let by_request = ask(&server, &json!({"pid": parent.pid}));
    for fork in forks.iter().chain(&by_request) {
        assert!(!hear(&server, *fork).disturbed);
    }
    let state = server.client.vm(parent.pid).unwrap().state;
    assert_eq!(state, api_types::VmState::Paused);
    cli(&server).run(&["resume", &pid]).unwrap();
    assert!(!hear(&server, parent).disturbed);
}

#[test]
fn generations_of_forks_at_any_moment_never_see_each_others_writes() {
    let Some(server) = server() else { return };
    let mut machines = vec![boot(&server, &bare_metal::witness())];
    hear(&server, machines[0]);
    // Each time of another, so that forks of forks are there, while all others write.
    for round in 0..6 {
        let of = machines[round * 7 % machines.len()].pid.to_string();
        machines.extend(fork(&server, &[&of, "--count", "2"]));
    }
    let mut generations = BTreeSet::new();
    for machine in &machines {
        let said = hear(&server, *machine);
        assert!(!said.disturbed, "{machine:?} {said:?}");
        generations.insert(said.generation);
    }
    assert_eq!(generations.len(), machines.len());
}

#[test]
fn a_server_forks_within_its_tree() {
    let Some(server) = server() else { return };
    let parent = boot(&server, &bare_metal::witness());
    hear(&server, parent);
    let forks = ask(&server, &json!({"pid": parent.pid, "count": 3}));
    let (state, memory) = (server.path("state"), server.path("memory"));
    let client = &server.client;
    client.snapshot(parent, &state, &memory, true).unwrap();
    let files = json!({"cpu_snapshot_path": state, "memory_snapshot_path": "memory", "count": 2});
    let mut forks = [forks, ask(&server, &files), ask(&server, &files)].concat();
    assert_eq!(forks.len(), 7);
    forks.push(parent);
    let mut generations = BTreeSet::new();
    for machine in &forks {
        hear(&server, *machine);
        let said = hear(&server, *machine);
        assert!(!said.disturbed, "{said:?}");
        generations.insert(said.generation);
    }
    assert_eq!(generations.len(), 8);
    // They are the server's to end.
    let path = format!("/vms/{}", forks[0].pid);
    assert_eq!(client.delete(&path).unwrap().status, 200);
    for (body, status, said) in [
        (json!({"pid": 1}), 404, "GET /vms"),
        (json!({"pid": parent.pid, "count": 512}), 503, "may be 512"),
        (
            json!({"cpu_snapshot_path": "/etc/passwd", "memory_snapshot_path": "memory"}),
            400,
            "outside",
        ),
        (
            json!({"cpu_snapshot_path": "memory", "memory_snapshot_path": "state"}),
            422,
            "memory",
        ),
        (
            json!({"pid": parent.pid, "nets": [{"tap_device": "a{n}"}]}),
            400,
            "0 network devices",
        ),
    ] {
        let answer = client.post("/fork", &body).unwrap();
        assert_eq!(answer.status, status, "{body} {answer:?}");
        assert!(answer.body.to_string().contains(said), "{body} {answer:?}");
    }
    // What could not be forked left no machine behind.
    let left = client.get("/vms").unwrap().body;
    assert_eq!(left.as_array().unwrap().len(), 7);
}

#[test]
fn who_fork_one_saved_machine_at_once_share_its_image() {
    let Some(server) = server_with(&["--pool", "1"]) else {
        return;
    };
    let parent = boot(&server, &bare_metal::witness());
    hear(&server, parent);
    let (state, memory) = (server.path("state"), server.path("memory"));
    let client = &server.client;
    client.snapshot(parent, &state, &memory, true).unwrap();
    let body = json!({"cpu_snapshot_path": state, "memory_snapshot_path": memory, "count": 1});
    let forks = thread::scope(|scope| {
        let asked: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| ask(&server, &body)))
            .collect();
        let forks = asked.into_iter().map(|forks| forks.join().unwrap());
        forks.flatten().collect::<Vec<_>>()
    });
    assert_eq!(forks.len(), 8);
    let images: BTreeSet<_> = forks.iter().map(|machine| image_of(*machine)).collect();
    assert_eq!(images.len(), 1, "{images:?}");
}

/// The inode of the image that a fork maps.
fn image_of(machine: Machine) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{}/maps", machine.pid)).unwrap();
    let mut images = maps
        .lines()
        .filter(|line| line.contains("fermata-hot-image"));
    let inode = images
        .next()
        .and_then(|line| line.split_whitespace().nth(4));
    inode.unwrap().parse().unwrap()
}

/// The processes that are prepared for machines: they have a log and no record.
pub(crate) fn prepared(server: &Server) -> BTreeSet<u32> {
    let names = fs::read_dir(server.run_directory()).unwrap();
    let pids = names.filter_map(|entry| {
        let path = entry.unwrap().path();
        let log = path.extension().is_some_and(|end| end == "log");
        log.then(|| path.file_stem()?.to_str()?.parse().ok())?
    });
    let registry = Registry::open(server.run_directory()).unwrap();
    let waits = |pid: &u32| {
        registry.find_pid(*pid).unwrap().is_none() && ProcessId::alive(*pid).unwrap().is_some()
    };
    pids.filter(waits).collect()
}

#[test]
fn prepared_processes_become_forks_and_end_with_the_server() {
    let Some(mut server) = server_with(&["--pool", "2"]) else {
        return;
    };
    let parent = boot(&server, &bare_metal::witness());
    hear(&server, parent);
    let (state, memory) = (server.path("state"), server.path("memory"));
    let save = |server: &Server| {
        let client = &server.client;
        client.snapshot(parent, &state, &memory, true).unwrap();
    };
    save(&server);
    let of_files = |count: u32| json!({"cpu_snapshot_path": state, "memory_snapshot_path": memory, "count": count});
    let mut machines = ask(&server, &of_files(1));
    let two = |server: &Server| {
        let found = || Some(prepared(server)).filter(|pids| pids.len() == 2);
        wait::until("two prepared processes", found).unwrap()
    };
    // One that has been started need not be prepared yet.
    let one_is_used = || {
        let waiting = two(&server);
        let three = ask(&server, &of_files(3));
        machines.extend(&three);
        let mut pids = three.iter().map(|machine| machine.pid);
        pids.any(|pid| waiting.contains(&pid)).then_some(())
    };
    wait::until("a prepared process to become a fork", one_is_used).unwrap();
    // What a fork takes that then fails is made up for.
    let mut nets = of_files(2);
    nets["nets"] = json!([{"tap_device": "a{n}"}]);
    let both_are_taken = || {
        let waiting = two(&server);
        let refused = server.client.post("/fork", &nets).unwrap();
        assert_eq!(refused.status, 400, "{refused:?}");
        two(&server).is_disjoint(&waiting).then_some(())
    };
    wait::until("others to be prepared", both_are_taken).unwrap();
    machines.extend(ask(&server, &json!({"pid": parent.pid, "count": 2})));
    // Files that are others by now are read again, whatever processes are prepared for: any such machine, then the last image.
    for _ in 0..2 {
        let now = hear(&server, parent);
        save(&server);
        two(&server);
        let fresh = ask(&server, &of_files(1));
        let console = server.console(fresh[0]).unwrap();
        let first = console
            .first("the witness", bare_metal::Testimony::read)
            .unwrap();
        assert!(first.round > now.round, "{first:?} {now:?}");
        machines.extend(fresh);
        // A process that waits has the image that is kept.
        let mapped = || {
            let maps = two(&server).into_iter().filter_map(|pid| {
                let maps = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
                Some(maps.contains("fermata-hot-image"))
            });
            maps.eq([true; 2]).then_some(())
        };
        wait::until("processes prepared for the image", mapped).unwrap();
    }
    machines.push(parent);
    let mut generations = BTreeSet::new();
    for machine in &machines {
        hear(&server, *machine);
        let said = hear(&server, *machine);
        assert!(!said.disturbed, "{machine:?} {said:?}");
        generations.insert(said.generation);
    }
    assert_eq!(generations.len(), machines.len());
    // One of another size is forked in a process of its own.
    let more = json!({"vcpus": 2, "memory_mib": 96});
    let larger = server.client.boot(&server.path("kernel"), &more).unwrap();
    ask(&server, &json!({"pid": larger.pid, "count": 2}));
    two(&server);
    server.crash_and_restart().unwrap();
    let none = || prepared(&server).is_empty().then_some(());
    wait::until("the prepared processes to end", none).unwrap();
}
