//! Machines in a store: saved and restored by name, or through memory files that refer to it.

use std::fs;

use serde_json::Value;
use system_tests::{bare_metal, cli::Cli, console::Console, server::Server, wait};
use tempfile::TempDir;

use crate::{counting, server, server_with};

/// The command line beside a server, with a store of its own.
pub(crate) struct Beside {
    pub(crate) directory: TempDir,
    pub(crate) cli: Cli,
}

impl Beside {
    pub(crate) fn new(server: &Server) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let cli = Cli::new(directory.path(), &server.run_directory());
        Self { directory, cli }
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> String {
        self.cli.run(arguments).unwrap()
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        self.cli.json(arguments).unwrap()
    }

    /// Restores a machine in the background, and returns the first number that it counts.
    fn first_count(&self, arguments: &[&str]) -> u64 {
        let restored = self.json(&[&["restore", "--json"], arguments].concat());
        let vms = self.json(&["ps", "--json"]);
        let mut vms = vms.as_array().unwrap().iter();
        let vm = vms.find(|vm| vm["pid"] == restored["pid"]).unwrap();
        let console = Console::new(vm["console"].as_str().unwrap());
        let first = console.first("a count", bare_metal::count).unwrap();
        self.run(&["stop", &restored["pid"].to_string()]);
        first
    }
}

#[track_caller]
fn goes_on(cut: u64, first: u64) {
    // The line may have been cut in the middle; then the first whole one is the next but one.
    assert!((cut + 1..=cut + 2).contains(&first), "{first} after {cut}");
}

#[test]
fn a_machine_is_saved_by_name_and_goes_on_by_name() {
    let Some(server) = server() else { return };
    let beside = Beside::new(&server);
    beside.run(&["store", "init"]);
    let machine = counting(&server, 3);
    let console = server.console(machine).unwrap();
    let pid = machine.pid.to_string();

    let monday = beside.json(&["snapshot", &pid, "monday", "--json"]);
    assert_eq!(monday["memory_bytes"], 64 << 20);
    assert_eq!(monday["stored"]["name"], "monday");
    // A name that is taken costs the machine nothing: it runs on.
    let taken = beside.cli.refused(&["snapshot", &pid, "monday"]).unwrap();
    assert!(taken.contains("choose another name"), "{taken}");
    let then = console.last(bare_metal::count).unwrap();
    console
        .first("the next count", |line| {
            bare_metal::count(line).filter(|n| *n > then)
        })
        .unwrap();
    let tuesday = beside.json(&["snapshot", &pid, "tuesday", "--halt", "--json"]);
    wait::until("the machine to end", || {
        server.client.vm(machine.pid).unwrap().ended
    })
    .unwrap();
    let cut = console.last(bare_metal::count).unwrap();

    goes_on(cut, beside.first_count(&["tuesday"]));
    assert!(beside.first_count(&["monday"]) <= cut);
    let id = tuesday["stored"]["id"].as_str().unwrap();
    goes_on(cut, beside.first_count(&[&id[..12]]));

    // The second was built on the first, and says so.
    let log = beside.json(&["store", "log", "tuesday", "--json"]);
    assert_eq!(log[0]["name"], "tuesday");
    assert_eq!(log[0]["machine"]["vcpus"], 1);
    assert_eq!(log[1]["name"], "monday");
    assert!(beside.run(&["store", "log"]).contains("snapshot monday"));

    let unknown = beside.cli.refused(&["restore", "wednesday"]).unwrap();
    assert!(unknown.contains("no snapshot \"wednesday\""), "{unknown}");
}

#[test]
fn a_store_is_kept_in_order() {
    let Some(server) = server() else { return };
    let beside = Beside::new(&server);
    beside.run(&["store", "init", "--level", "-10"]);
    let machine = counting(&server, 3);
    let console = server.console(machine).unwrap();
    let pid = machine.pid.to_string();
    beside.run(&["snapshot", &pid, "one"]);
    beside.run(&["snapshot", &pid, "two", "--halt"]);
    wait::until("the machine to end", || {
        server.client.vm(machine.pid).unwrap().ended
    })
    .unwrap();
    let cut = console.last(bare_metal::count).unwrap();

    beside.run(&["store", "tag", "two", "best"]);
    assert!(beside.run(&["store", "ls"]).contains("best"));
    let diff = beside.json(&["store", "diff", "one", "best", "--json"]);
    assert_eq!(diff[0]["name"], "memory");
    let stat = beside.json(&["store", "stat", "--json"]);
    assert_eq!(
        (&stat["snapshots"], &stat["level"]),
        (&2.into(), &(-10).into())
    );

    // Out of the store and into it again.
    beside.run(&["store", "export", "best", "state", "memory"]);
    goes_on(cut, beside.first_count(&["state", "memory"]));
    beside.run(&["store", "import", "again", "state", "memory"]);
    goes_on(cut, beside.first_count(&["again"]));
    let same = beside.json(&["store", "diff", "best", "again", "--json"]);
    assert_eq!(same[0]["changed"], Value::Array(vec![]));
    let cat = |what: &str| {
        let output = beside.cli.command(&["store", "cat", "best", what]).output();
        output.unwrap().stdout
    };
    let file = |name: &str| fs::read(beside.directory.path().join(name)).unwrap();
    assert!(cat("memory") == file("memory")[..64 << 20]);
    assert!(cat("state") == file("state"));

    for name in ["one", "two", "again"] {
        beside.run(&["store", "rm", name]);
    }
    let freed = beside.json(&["store", "gc", "--json"]);
    assert!(freed["bytes_freed"].as_u64().unwrap() > 0, "{freed}");
    let checked = beside.json(&["store", "fsck", "--json"]);
    assert_eq!(checked["problems"], Value::Array(vec![]));
    assert_eq!(checked["chunks"], 0);
}

#[test]
fn damage_is_named_and_not_restored() {
    let Some(server) = server() else { return };
    let beside = Beside::new(&server);
    beside.run(&["store", "init"]);
    let machine = counting(&server, 3);
    beside.run(&["snapshot", &machine.pid.to_string(), "one", "--halt"]);
    let packs = fs::read_dir(beside.cli.store().join("packs")).unwrap();
    for pack in packs {
        let path = pack.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        // In the first frame, behind the headers.
        bytes[150] ^= 1;
        fs::write(&path, bytes).unwrap();
    }
    let refused = beside.cli.refused(&["restore", "one"]).unwrap();
    assert!(refused.contains("fsck"), "{refused}");
    let checked = beside.cli.command(&["store", "fsck"]).output().unwrap();
    assert_eq!(checked.status.code(), Some(2));
    let said = String::from_utf8(checked.stdout).unwrap();
    assert!(said.contains("hits one"), "{said}");
}

#[test]
fn a_server_with_a_store_writes_memory_files_that_refer_to_it() {
    let directory = tempfile::tempdir().unwrap();
    let Some(without) = server() else { return };
    let beside = Beside::new(&without);
    let store = directory.path().join("store").display().to_string();
    beside.run(&["store", "init", "--store", &store]);
    let server = server_with(&["--store", &store]).unwrap();
    let client = &server.client;
    let machine = counting(&server, 3);
    let console = server.console(machine).unwrap();
    let (state, memory) = (server.path("state"), server.path("memory"));
    // The second replaces the first.
    client.snapshot(machine, &state, &memory, true).unwrap();
    client.snapshot(machine, &state, &memory, false).unwrap();
    wait::until("the machine to end", || {
        client.vm(machine.pid).unwrap().ended
    })
    .unwrap();
    let cut = console.last(bare_metal::count).unwrap();
    assert_eq!(server.names().unwrap(), ["kernel", "memory", "state"]);
    assert_eq!(
        fs::metadata(server.tree().join("memory")).unwrap().len(),
        128
    );
    let restored = client.restore(&state, &memory).unwrap();
    let console = server.console(restored).unwrap();
    goes_on(cut, console.first("a count", bare_metal::count).unwrap());

    // Plain files are taken by such a server, too.
    let plain = counting(&without, 3);
    let (old_state, old_memory) = (without.path("state"), without.path("memory"));
    without
        .client
        .snapshot(plain, &old_state, &old_memory, false)
        .unwrap();
    for name in ["state", "memory"] {
        fs::copy(without.tree().join(name), server.tree().join(name)).unwrap();
    }
    client.restore(&state, &memory).unwrap();

    // A reference is of no use to a server without the store, and it says so.
    let referring = counting(&server, 3);
    client.snapshot(referring, &state, &memory, false).unwrap();
    for name in ["state", "memory"] {
        fs::copy(server.tree().join(name), without.tree().join(name)).unwrap();
    }
    let answer = without.client.try_restore(&old_state, &old_memory).unwrap();
    assert_eq!(answer.status, 400, "{answer:?}");
    assert!(answer.body.to_string().contains("--store"), "{answer:?}");
}

#[test]
fn an_encrypted_store_wants_its_key() {
    let Some(server) = server() else { return };
    let beside = Beside::new(&server);
    let key = beside.directory.path().join("key").display().to_string();
    // It makes the key.
    beside.run(&["store", "init", "--key-file", &key]);
    let machine = counting(&server, 3);
    let pid = machine.pid.to_string();
    let refused = beside.cli.refused(&["snapshot", &pid, "one"]).unwrap();
    assert!(refused.contains("key"), "{refused}");
    beside.run(&["snapshot", &pid, "one", "--key-file", &key]);
    let refused = beside.cli.refused(&["restore", "one"]).unwrap();
    assert!(refused.contains("key"), "{refused}");
    beside.first_count(&["one", "--key-file", &key]);

    // With the environment's key, a plain store can be listed, but is not taken for the encrypted one.
    let plain = beside.directory.path().join("plain").display().to_string();
    beside.run(&["store", "init", "--store", &plain]);
    let with_key = |command: &str| {
        let mut command = beside.cli.command(&["store", command, "--store", &plain]);
        let output = command.env("FERMATA_KEY_FILE", &key).output();
        output.unwrap().status.success()
    };
    assert!(with_key("ls"));
    assert!(!with_key("log"));
}
