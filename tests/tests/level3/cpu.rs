//! A guest of a level sees no more of the CPU than the level has, and goes on with it.

use system_tests::{console::count, linux, wait};

#[test]
fn a_linux_guest_of_level_2_sees_level_2() {
    let server = linux::server().unwrap();
    let client = &server.client;
    let more = serde_json::json!({
        "vcpus": 2,
        "memory_mib": 256,
        "cpu": "x86-64-v2",
        "initrd_path": server.path("initrd"),
        "cmdline": format!("{} fermata.role=cpu", linux::CMDLINE),
        "disks": [{"path": server.path("disk")}],
    });
    let machine = client.boot(&server.path("vmlinuz"), &more).unwrap();
    let console = server.console(machine).unwrap();
    let told = |line: &str| line.strip_prefix("fermata-guest: cpu ").map(str::to_owned);
    let flags = console.first("the guest to tell of its CPU", told).unwrap();
    println!("a guest of x86-64-v2 has {flags}");
    let has = |flag| flags.split_whitespace().any(|word| word == flag);
    assert!(has("sse4_2") && has("hypervisor"), "{flags}");
    assert!(!has("avx") && !has("avx2") && !has("aes"), "{flags}");

    linux::counts_past(&console, 3).unwrap();
    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(machine, &state, &memory, false).unwrap();
    wait::until("the machine to end", || {
        client.vm(machine.pid).unwrap().ended
    })
    .unwrap();
    let cut = console.last(count).unwrap();
    let restored = client.restore(&state, &memory).unwrap();
    linux::counts_past(&server.console(restored).unwrap(), cut + 3).unwrap();
}
