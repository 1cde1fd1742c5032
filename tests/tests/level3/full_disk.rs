//! Places that a snapshot cannot be written to, which only root can make.

use std::{fs, path::Path, process::Command};

use system_tests::linux;

#[test]
fn a_snapshot_that_finds_no_room_leaves_nothing_and_the_guest_goes_on() {
    let server = linux::server().unwrap();
    let machine = linux::boot(&server, "counter").unwrap();
    let console = server.console(machine).unwrap();
    linux::verify(&console).unwrap();
    for (name, options, status, words) in [
        ("full", "size=4m", 507, "no space"),
        ("read-only", "ro", 500, "Read-only"),
    ] {
        let directory = server.tree().join(name);
        fs::create_dir(&directory).unwrap();
        mount(&directory, options);
        let path = |file: &str| server.path(&format!("{name}/{file}"));
        let answer = server
            .client
            .try_snapshot(machine.port, &path("state"), &path("memory"), true)
            .unwrap();
        assert_eq!(answer.status, status, "{answer:?}");
        assert!(answer.body.to_string().contains(words), "{answer:?}");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        unmount(&directory);
        let then = console.last(system_tests::console::count).unwrap();
        linux::counts_past(&console, then).unwrap();
    }
    let (state, memory) = (server.path("state"), server.path("memory"));
    server
        .client
        .snapshot(machine, &state, &memory, true)
        .unwrap();
}

fn mount(directory: &Path, options: &str) {
    let status = Command::new("mount")
        .args(["-t", "tmpfs", "-o", options, "tmpfs"])
        .arg(directory)
        .status()
        .unwrap();
    assert!(status.success());
}

fn unmount(directory: &Path) {
    assert!(
        Command::new("umount")
            .arg(directory)
            .status()
            .unwrap()
            .success()
    );
}
