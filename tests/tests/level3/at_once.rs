//! A Linux guest goes on before its memory has come, as many at once, and from snapshots that it did not stand still for.

use std::fs;

use api_types::EndReason;
use serde_json::{Value, json};
use system_tests::{
    cli::Cli,
    console::{Console, count},
    http::Machine,
    linux::{self, CMDLINE},
    server::Server,
    wait,
};

fn machine(answer: &Value) -> Machine {
    Machine {
        pid: u32::try_from(answer["pid"].as_u64().unwrap()).unwrap(),
        port: u16::try_from(answer["port"].as_u64().unwrap()).unwrap(),
    }
}

/// Waits until a machine that was saved at the count `cut` has gone on, from there.
fn goes_on(server: &Server, machine: Machine, cut: u64) -> Console {
    let console = server.console(machine).unwrap();
    let first = linux::counts_past(&console, 0).unwrap();
    assert!((cut..=cut + 2).contains(&first), "{first} after {cut}");
    console
}

#[test]
fn a_linux_guest_goes_on_at_once_on_demand_and_forked() {
    let server: Server = linux::server().unwrap();
    let client = &server.client;
    let cli = Cli::new(&server.tree(), &server.run_directory());
    cli.run(&["store", "init"]).unwrap();
    // Each has a layer of its own of it.
    cli.run(&["disk", "create", "web.disk", "--base", "disk"])
        .unwrap();
    let more = json!({
        "vcpus": 2,
        "memory_mib": 256,
        "initrd_path": server.path("initrd"),
        "cmdline": format!("{CMDLINE} fermata.role=counter"),
        "disks": [{"path": server.path("web.disk"), "format": "branch"}],
    });
    let parent = client.boot(&server.path("vmlinuz"), &more).unwrap();
    let console = server.console(parent).unwrap();
    let before = linux::verify(&console).unwrap();
    let pid = parent.pid.to_string();

    // Two forks of it as it runs, which go on by themselves, and so does it.
    let forks = cli.json(&["fork", &pid, "--count", "2", "--json"]).unwrap();
    for fork in forks.as_array().unwrap() {
        let fork = machine(fork);
        let console = server.console(fork).unwrap();
        linux::counts_past(&console, 0).unwrap();
        cli.run(&["stop", &fork.pid.to_string()]).unwrap();
    }
    let then = console.last(count).unwrap();
    linux::counts_past(&console, then).unwrap();

    // By pre-copy into the store, and then it ends.
    let pre_copy = ["--copy", "pre-copy", "--halt", "--json"];
    let report = cli
        .json(&[&["snapshot", &pid, "noon"][..], &pre_copy].concat())
        .unwrap();
    let copied = report["copied_bytes"].as_u64().unwrap();
    let written = report["written_bytes"].as_u64().unwrap();
    assert!(copied > written / 2, "{report}");
    let ended = wait::until("the machine to end", || {
        client.vm(parent.pid).unwrap().ended
    });
    assert_eq!(ended.unwrap().reason, EndReason::Halted);
    let cut = console.last(count).unwrap();

    // Its memory comes when it is touched, and its disk, which is not here any more, when it is read; nothing of them is lost.
    for name in server.names().unwrap() {
        if name.starts_with("web.disk") {
            fs::remove_file(server.tree().join(name)).unwrap();
        }
    }
    let elsewhere = server.tree().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let words = ["restore", "noon", "--on-demand", "--json", "--disks"];
    let words = [&words[..], &[elsewhere.to_str().unwrap()]].concat();
    let lazy = machine(&cli.json(&words).unwrap());
    let console = goes_on(&server, lazy, cut);
    linux::nothing_lost(&before, &linux::verify(&console).unwrap()).unwrap();
    // With what it has come to.
    cli.run(&["snapshot", &lazy.pid.to_string(), "one"])
        .unwrap();
    let made = fs::read_dir(&elsewhere).unwrap();
    let made = made.map(|entry| entry.unwrap().path());
    let layers = made.filter(|path| path.extension().is_some_and(|end| end == "layer"));
    assert!(layers.count() >= 1);
}
