//! A client of a dozen lines in Python's standard library, sending only what the contract says.

use std::process::Command;

use system_tests::bare_metal;

use crate::server;

const CLIENT: &str = r#"
import json, sys, urllib.request
base, kernel, cpu, memory = sys.argv[1:]
def post(path, **body):
    request = urllib.request.Request(base + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))
vm = post("/create", cpu_snapshot_path="", memory_snapshot_path="", kernel_path=kernel, resume=False)
done = post("/snapshot", cpu_snapshot_path=cpu, memory_snapshot_path=memory, rpc_port=vm["port"], resume=False)
assert done == "Snapshot Taken Successfully", done
again = post("/create", cpu_snapshot_path=cpu, memory_snapshot_path=memory, kernel_path=kernel, resume=True)
assert set(again) == {"pid", "port"} and again["pid"] != vm["pid"], again
print(again["pid"])
"#;

#[test]
fn a_client_that_knows_only_the_contract_creates_saves_and_restores() {
    let Some(server) = server() else { return };
    std::fs::write(server.tree().join("kernel"), bare_metal::counter()).unwrap();
    let output = Command::new("python3")
        .args(["-c", CLIENT, server.client.base()])
        .args(["kernel", "state", "memory"].map(|name| server.path(name)))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let pid: u32 = String::from_utf8(output.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let machine = server.client.vm(pid).unwrap();
    assert_eq!((machine.vcpus, machine.memory_mib), (Some(2), Some(256)));
}
