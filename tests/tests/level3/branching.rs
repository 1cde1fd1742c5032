//! A Linux guest on a disk that branches.

use std::{path::Path, process::Command};

use serde_json::{Value, json};
use system_tests::{cli::Cli, console::count, http::Machine, linux, server::Server, wait};

/// What a disk's file system holds: the lines of its log, and the digest of its data.
fn content(server: &Server, cli: &Cli, disk: &str) -> (Vec<String>, String) {
    let image = format!("{disk}.raw");
    cli.run(&["disk", "export", disk, &image]).unwrap();
    let image = server.tree().join(image);
    // Its journal is replayed, as by a guest that finds the disk like this.
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program)
            .args(arguments)
            .arg(&image)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
    // It mends what a replayed journal leaves to it, as the count of free blocks, and nothing that is broken.
    let (preened, said) = run("/usr/sbin/e2fsck", &["-fp"]);
    assert!(matches!(preened, Some(0 | 1)), "{disk}: {said}");
    let (checked, said) = run("/usr/sbin/e2fsck", &["-fn"]);
    assert_eq!(checked, Some(0), "{disk} is not clean: {said}");
    let (_, log) = run("/usr/sbin/debugfs", &["-R", "cat /log"]);
    let data = dump(&image);
    (log.lines().map(str::to_owned).collect(), data)
}

fn dump(image: &Path) -> String {
    let script = format!(
        "/usr/sbin/debugfs -R 'cat /data' '{}' 2>/dev/null | sha256sum",
        image.display()
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Waits until the guest has verified itself at a count past `past`: then that is in its disk's log.
fn verified_past(server: &Server, machine: Machine, past: u64) -> u64 {
    let console = server.console(machine).unwrap();
    let next = past.next_multiple_of(10) + 10;
    linux::counts_past(&console, next).unwrap()
}

fn end(server: &Server, machine: Machine) {
    let answer = server
        .client
        .delete(&format!("/vms/{}", machine.pid))
        .unwrap();
    assert_eq!(answer.status, 200);
    wait::until("the machine to be gone", || {
        (!Path::new(&format!("/proc/{}", machine.pid)).exists()).then_some(())
    })
    .unwrap();
}

#[test]
fn two_restores_see_the_disk_at_the_cut_and_write_to_their_own() {
    let server = linux::server().unwrap();
    let client = &server.client;
    let cli = Cli::new(&server.tree(), &server.run_directory());
    cli.run(&["disk", "create", "web.disk", "--base", "disk"])
        .unwrap();
    let more = json!({
        "vcpus": 2,
        "memory_mib": 256,
        "initrd_path": server.path("initrd"),
        "cmdline": format!("{} fermata.role=counter", linux::CMDLINE),
        "disks": [{"path": server.path("web.disk"), "format": "branch"}],
    });
    let machine = client.boot(&server.path("vmlinuz"), &more).unwrap();
    let console = server.console(machine).unwrap();
    let before = linux::verify(&console).unwrap();
    assert_ne!(before.disk, "none");

    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(machine, &state, &memory, true).unwrap();
    let cut = console.last(count).unwrap();
    // It goes on writing; the snapshot is still good.
    verified_past(&server, machine, cut);
    end(&server, machine);

    let one = client.restore(&state, &memory).unwrap();
    let two = client.restore(&state, &memory).unwrap();
    for machine in [one, two] {
        let console = server.console(machine).unwrap();
        linux::nothing_lost(&before, &linux::verify(&console).unwrap()).unwrap();
    }
    let further = verified_past(&server, one, cut + 20);
    end(&server, two);
    end(&server, one);

    let names = server.names().unwrap();
    let ending = |ending: &str| -> Vec<&String> {
        names.iter().filter(|name| name.ends_with(ending)).collect()
    };
    let ([layer], [head_one, head_two]) = (&*ending(".layer"), &*ending(".head")) else {
        panic!("{names:?}");
    };
    let at_the_cut = content(&server, &cli, layer);
    let written = ["web.disk", head_one, head_two].map(|head| content(&server, &cli, head));
    for (log, data) in &written {
        assert!(
            log.len() > at_the_cut.0.len(),
            "{log:?} after {at_the_cut:?}"
        );
        assert!(
            log.starts_with(&at_the_cut.0),
            "{log:?} after {at_the_cut:?}"
        );
        assert_eq!(*data, at_the_cut.1);
        // Each wrote its own lines once: nobody wrote into another's.
        let mut lines = log.clone();
        lines.dedup();
        assert_eq!(lines, *log);
    }
    assert!(further > cut);
    for disk in ["web.disk", head_one, head_two] {
        let checked: Value = cli.json(&["disk", "check", "--json", disk]).unwrap();
        assert_eq!(checked["problems"], json!([]), "{disk}");
    }
}
