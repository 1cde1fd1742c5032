//! Memory of huge pages that the host has reserved: had at once or refused, saved and restored like any other.

use serde_json::json;
use system_tests::{
    bare_metal::{self, count},
    huge_pages::{self, Reserved},
    memory::taken,
    wait,
};

use crate::server;

const MIB: u64 = 1 << 20;
/// Huge pages of a machine of 64 MiB.
const COUNT: u64 = 32;

#[test]
fn a_machine_of_huge_pages_is_saved_and_restored_and_gives_memory_back() {
    let Some(server) = server() else { return };
    let client = &server.client;
    std::fs::write(server.tree().join("kernel"), bare_metal::balloon()).unwrap();
    let machine = json!({
        "kernel_path": server.path("kernel"), "resume": false,
        "vcpus": 1, "memory_mib": 64, "balloon": {}, "hugepages": true,
    });
    if huge_pages::free().is_none_or(|free| free < COUNT) {
        let refused = client.post("/create", &machine).unwrap();
        assert_eq!(refused.status, 500, "{:?}", refused.body);
        let said = refused.body["message"].to_string();
        assert!(said.contains("vm.nr_hugepages=32"), "{said}");
    }
    // For the machine itself and one that is restored beside it.
    let Some(_reserved) = Reserved::new(2 * COUNT) else {
        eprintln!("this host gives no huge pages, so that only the refusal was tested");
        return;
    };
    let free = huge_pages::free().unwrap();
    let machine = client.boot(&server.path("kernel"), &machine).unwrap();
    let path = format!("/vms/{}/balloon", machine.pid);
    let holds = |machine, mib: u64| {
        let console = server.console(machine).unwrap();
        let wanted = |line: &str| count(line).filter(|pages| *pages == mib << 8);
        console.first("the balloon's size", wanted).unwrap();
    };
    holds(machine, 0);
    // The guest has touched half of its memory, all of which is its own.
    assert!(huge_pages::free().unwrap() <= free - COUNT / 2);
    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(machine, &state, &memory, true).unwrap();
    let full = taken(&memory).unwrap();
    assert!((32 * MIB..34 * MIB).contains(&full), "{full}");
    client.patch(&path, &json!({"target_mib": 32})).unwrap();
    holds(machine, 32);
    client.snapshot(machine, &state, &memory, false).unwrap();
    wait::until("the machine's huge pages to be free", || {
        (huge_pages::free().unwrap() == free).then_some(())
    })
    .unwrap();
    let rest = taken(&memory).unwrap();
    assert!(rest + 30 * MIB < full, "{rest} of {full}");

    for hugepages in [true, false] {
        let restored = json!({
            "cpu_snapshot_path": state, "memory_snapshot_path": memory, "resume": true, "hugepages": hugepages,
        });
        let before = huge_pages::free().unwrap();
        let restored = client.boot("", &restored).unwrap();
        let path = format!("/vms/{}/balloon", restored.pid);
        client.patch(&path, &json!({"target_mib": 0})).unwrap();
        // It says so with the topmost bit set if a page came back with content, which is then not what is waited for.
        holds(restored, 0);
        let taken = before - huge_pages::free().unwrap();
        assert_eq!(taken >= COUNT / 2, hugepages, "{taken} of {before}");
        client.delete(&format!("/vms/{}", restored.pid)).unwrap();
    }
}
