//! A Linux guest whose disks grow.

use serde_json::json;
use system_tests::{cli::Cli, linux};

/// The disks' first size is that of the test bed's image, 64 MiB.
const LARGER: u64 = 96 << 20;

#[test]
fn a_linux_guest_sees_its_disks_grow_and_goes_on() {
    let server = linux::server().unwrap();
    let client = &server.client;
    let cli = Cli::new(&server.tree(), &server.run_directory());
    cli.run(&["disk", "create", "more.disk", "--size", "64M"])
        .unwrap();
    let more = json!({
        "vcpus": 2,
        "memory_mib": 256,
        "initrd_path": server.path("initrd"),
        // The kernel is to say on the console what it notices.
        "cmdline": format!("{} loglevel=6 fermata.role=counter", linux::CMDLINE),
        "disks": [
            {"path": server.path("disk")},
            {"path": server.path("more.disk"), "format": "branch"},
        ],
    });
    let machine = client.boot(&server.path("vmlinuz"), &more).unwrap();
    let console = server.console(machine).unwrap();
    let before = linux::verify(&console).unwrap();
    for (number, name) in [(0, "vda"), (1, "vdb")] {
        let path = format!("/vms/{}/disks/{number}", machine.pid);
        let answer = client.patch(&path, &json!({"size_bytes": LARGER})).unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        let news = format!("[{name}] new size: {} 512-byte", LARGER / 512);
        let said = |line: &str| line.contains(&news).then_some(());
        console.first(&news, said).unwrap();
    }
    linux::nothing_lost(&before, &linux::verify(&console).unwrap()).unwrap();
}
