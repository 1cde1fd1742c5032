//! Disks that come from a store while their machine runs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use serde_json::json;
use system_tests::{bare_metal, cli::Cli, http::Machine, server::Server, wait};

use crate::{gauge, server, writes};

const PAGE: usize = 4096;
const PAGES: u64 = 1024;
/// Of those, one whose frame has none that the guest's own has.
const FAR: u64 = 700;

/// What the guest's disk is before it writes to its first sector.
fn content() -> Vec<u8> {
    let page = |number: u64| {
        (number + 1)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .to_le_bytes()
    };
    (0..PAGES)
        .flat_map(|number| page(number).repeat(PAGE / 8))
        .collect()
}

/// A machine that writes to its disk, in a store in which nothing is compressed; its files are gone.
struct Bench {
    server: Server,
    cli: Cli,
    /// How often it has written when it was saved.
    times: u64,
}

impl Bench {
    fn new() -> Option<Self> {
        let server = server()?;
        let tree = server.tree();
        let cli = Cli::new(&tree, &server.run_directory());
        fs::write(tree.join("kernel"), bare_metal::writer()).unwrap();
        fs::write(tree.join("base"), content()).unwrap();
        cli.run(&["disk", "create", "d", "--base", "base"]).unwrap();
        cli.run(&["store", "init", "--level", "0"]).unwrap();
        let more = json!({
            "vcpus": 1,
            "memory_mib": 64,
            "disks": [{"path": server.path("d"), "format": "branch"}],
        });
        let writer = server.client.boot(&server.path("kernel"), &more).unwrap();
        writes(&server, writer, 0);
        cli.run(&["snapshot", &writer.pid.to_string(), "monday", "--halt"])
            .unwrap();
        for name in server.names().unwrap() {
            if name.starts_with("d.") || ["d", "base"].contains(&name.as_str()) {
                fs::remove_file(tree.join(name)).unwrap();
            }
        }
        let times = last(&disk_of(&cli, "monday"));
        Some(Self { server, cli, times })
    }

    fn restored(&self, directory: &str) -> Machine {
        let directory = self.server.tree().join(directory);
        fs::create_dir_all(&directory).unwrap();
        let directory = directory.to_str().unwrap();
        let words = [
            "restore",
            "monday",
            "--on-demand",
            "--disks",
            directory,
            "--json",
        ];
        let restored = self.cli.json(&words).unwrap();
        let number = |key: &str| restored[key].as_u64().unwrap();
        Machine {
            pid: number("pid") as u32,
            port: number("port") as u16,
        }
    }

    fn has_come(&self, machine: Machine) -> bool {
        let gauge = |name| gauge(&self.server, machine.pid, name);
        gauge("fermata_disk_arrived_bytes") == gauge("fermata_disk_arriving_total_bytes")
    }

    /// The files of a directory whose names end so.
    fn named(&self, directory: &str, ending: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.server.tree().join(directory)).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths
            .filter(|path| path.to_str().unwrap().ends_with(ending))
            .collect()
    }

    /// What the guest has written last to a disk that is otherwise what it was.
    fn disk(&self, head: &Path) -> u64 {
        let head = head.to_str().unwrap();
        let checked = self.cli.json(&["disk", "check", head, "--json"]).unwrap();
        assert_eq!(checked["problems"], json!([]));
        let raw = self.server.tree().join("raw");
        let _ = fs::remove_file(&raw);
        let words = ["disk", "export", head, raw.to_str().unwrap()];
        self.cli.run(&words).unwrap();
        last(&fs::read(&raw).unwrap())
    }

    /// Changes what the store has of the page [`FAR`]; gives who changes it back.
    fn damage(&self) -> impl FnOnce() {
        let page = &content()[FAR as usize * PAGE..][..PAGE];
        let packs = fs::read_dir(self.cli.store().join("packs")).unwrap();
        let mut packs = packs.map(|pack| pack.unwrap().path());
        let found = packs.find_map(|pack| {
            let bytes = fs::read(&pack).unwrap();
            let at = bytes.windows(PAGE).position(|window| window == page)?;
            Some((pack, bytes, at))
        });
        let (pack, bytes, at) = found.unwrap();
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        fs::write(&pack, damaged).unwrap();
        move || fs::write(&pack, bytes).unwrap()
    }
}

fn disk_of(cli: &Cli, name: &str) -> Vec<u8> {
    let disk = cli.command(&["store", "cat", name, "disk0"]).output();
    disk.unwrap().stdout
}

/// What the guest has written last to a disk that is otherwise what it was.
fn last(disk: &[u8]) -> u64 {
    assert!(disk[512..] == content()[512..]);
    u32::from_le_bytes(disk[..4].try_into().unwrap()).into()
}

#[test]
fn a_guest_goes_on_before_its_disk_is_here_and_is_saved_when_it_is() {
    let Some(bench) = Bench::new() else { return };
    let (cli, server) = (&bench.cli, &bench.server);
    let repair = bench.damage();
    let machine = bench.restored("elsewhere");
    let pid = machine.pid.to_string();
    let times = writes(server, machine, bench.times);
    // It cannot all come, and the guest goes on; what needs the whole disk says why it is not to be had.
    assert!(!bench.has_come(machine));
    assert_eq!(
        bench.named("elsewhere", ".layer"),
        [""; 0].map(PathBuf::from)
    );
    let refused = cli.refused(&["snapshot", &pid, "tuesday"]).unwrap();
    assert!(
        refused.contains("rebuild") && refused.contains("fsck"),
        "{refused}"
    );
    let patched = server.client.patch(
        &format!("/vms/{pid}/disks/0"),
        &json!({"size_bytes": 8 << 20}),
    );
    assert_eq!(patched.unwrap().status, 409);
    let times = writes(server, machine, times);

    repair();
    // Also if nobody asks for it.
    wait::until("the disk to come", || bench.has_come(machine).then_some(())).unwrap();
    let there = || bench.named("elsewhere", ".layer").pop();
    let layer = wait::until("the layer to have its name", there).unwrap();
    cli.run(&["snapshot", &pid, "tuesday"]).unwrap();
    assert!(last(&disk_of(cli, "tuesday")) >= times);
    assert_eq!(bench.disk(&layer), bench.times);
    // The next finds it here.
    writes(server, bench.restored("elsewhere"), bench.times);
}

#[test]
fn what_a_guest_wrote_is_of_use_when_its_machine_ends_and_the_disk_comes_late() {
    let Some(bench) = Bench::new() else { return };
    let repair = bench.damage();
    let [stopped, killed] = ["stopped", "killed"].map(|directory| bench.restored(directory));
    let times = writes(&bench.server, stopped, bench.times);
    writes(&bench.server, killed, bench.times);
    // It waits for the rest, and then not any more; who is impatient does not kill it.
    let stop = || {
        let pid = stopped.pid.to_string();
        let said = bench.cli.run(&["stop", &pid]).unwrap();
        assert!(said.contains("has stopped"), "{said}");
    };
    thread::scope(|scope| {
        scope.spawn(stop);
        thread::sleep(Duration::from_millis(500));
        stop();
    });
    let kill = Command::new("kill")
        .args(["-9", &killed.pid.to_string()])
        .status();
    assert!(kill.unwrap().success());
    let process = format!("/proc/{}/fd", killed.pid);
    let open = || fs::read_dir(&process).map_or(0, Iterator::count);
    let is_gone = || (open() == 0).then_some(());
    wait::until("the process to be gone", is_gone).unwrap();
    let heads = ["stopped", "killed"].map(|directory| {
        let [head] = bench.named(directory, ".head").try_into().unwrap();
        let path = head.to_str().unwrap();
        let refused = bench.cli.refused(&["disk", "info", path]).unwrap();
        assert!(refused.contains(".layer"), "{refused}");
        let check = bench
            .cli
            .command(&["disk", "check", path])
            .output()
            .unwrap();
        assert_eq!(check.status.code(), Some(2), "{check:?}");
        assert!(String::from_utf8_lossy(&check.stdout).contains(".layer"));
        head
    });
    assert!(bench.named("stopped", ".partial").is_empty());

    repair();
    for directory in ["stopped", "killed"] {
        let machine = bench.restored(directory);
        writes(&bench.server, machine, bench.times);
        bench.cli.run(&["stop", &machine.pid.to_string()]).unwrap();
        assert!(bench.named(directory, ".partial").is_empty());
        let heads = bench.named(directory, ".head");
        assert_eq!(heads.len(), 2);
    }
    // Nothing that this guest writes is flushed, but by the end of its machine.
    let [stopped, killed] = heads.map(|head| bench.disk(&head));
    assert!(stopped >= times);
    assert!(killed >= bench.times);
}

#[test]
fn machines_of_one_snapshot_share_what_the_first_of_them_has_made() {
    let Some(bench) = Bench::new() else { return };
    let repair = bench.damage();
    let machines = [(); 3].map(|()| bench.restored("elsewhere"));
    for machine in machines {
        writes(&bench.server, machine, bench.times);
        assert!(!bench.has_come(machine));
    }
    repair();
    for machine in machines {
        wait::until("the disk to come", || bench.has_come(machine).then_some(())).unwrap();
        bench.cli.run(&["stop", &machine.pid.to_string()]).unwrap();
    }
    assert_eq!(bench.named("elsewhere", ".layer").len(), 1);
    assert!(bench.named("elsewhere", ".partial").is_empty());
    for head in bench.named("elsewhere", ".head") {
        assert!(bench.disk(&head) > bench.times);
    }
}
