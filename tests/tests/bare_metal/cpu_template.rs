//! CPU templates in requests.

use serde_json::{Value, json};
use system_tests::{bare_metal, http::Answer, server::Server, wait};

use crate::{cli, server};

/// A server with a kernel that counts.
fn counter() -> Option<Server> {
    let server = server()?;
    std::fs::write(server.tree().join("kernel"), bare_metal::counter()).unwrap();
    Some(server)
}

fn boot(server: &Server, cpu: &Value) -> Answer {
    let body = json!({
        "kernel_path": server.path("kernel"), "resume": false, "vcpus": 1, "memory_mib": 64, "cpu": cpu,
    });
    server.client.post("/create", &body).unwrap()
}

/// The level, and the features besides, that a machine with such CPUs needs once it is saved.
fn needs(server: &Server, cpu: &Value) -> (String, String) {
    let answer = boot(server, cpu);
    assert_eq!(answer.status, 200, "{answer:?}");
    let pid = answer.body["pid"].to_string();
    let cli = cli(server);
    cli.run(&["snapshot", &pid, "state", "memory", "--halt"])
        .unwrap();
    let pid = pid.parse().unwrap();
    wait::until("the machine to end", || {
        server.client.vm(pid).unwrap().ended
    })
    .unwrap();
    let inspected = cli.json(&["inspect", "state", "--json"]).unwrap();
    let level = inspected["needs_cpu"].as_str().unwrap().to_owned();
    (level, inspected["needs_features"].to_string())
}

#[test]
fn a_machine_of_a_template_is_saved_as_one_and_goes_on() {
    let Some(server) = counter() else { return };
    let whole = needs(&server, &json!("host"));
    assert_eq!(needs(&server, &json!({})), whole);
    // CMPXCHG16B, which every level has.
    let less = json!({"cpuid": [{"leaf": 1, "register": "ecx", "clear": "0x2000"}]});
    let less = needs(&server, &less);
    assert_eq!(less.0, "host");
    assert!(!less.1.contains("\"cx16\""), "{less:?}");
    assert_ne!(less, whole);
    let (state, memory) = (server.path("state"), server.path("memory"));
    let restored = server.client.restore(&state, &memory).unwrap();
    let console = server.console(restored).unwrap();
    console.first("a count", bare_metal::count).unwrap();
}

#[test]
fn templates_that_cannot_be_meant_are_refused_by_what_is_wrong_with_them() {
    let Some(server) = counter() else { return };
    let cpuid = |change: Value| json!({"cpuid": [change]});
    for (cpu, said) in [
        (
            json!("x86-64-v9"),
            "unknown variant `x86-64-v9`, expected one of `host`",
        ),
        (json!(3), "expected a level of CPUs, or a template"),
        (
            cpuid(json!({"leaf": 1, "register": "ecx", "clears": 1})),
            "unknown field `clears`, expected one of `leaf`",
        ),
        (
            cpuid(json!({"leaf": 1, "register": "ecx", "clear": 3, "set": 2})),
            "cpu: CPUID leaf 0x1: 0x2 is both cleared and set; leave one out",
        ),
        (
            cpuid(json!({"leaf": 0, "register": "ebx", "clear": 1})),
            "CPUID leaf 0x0",
        ),
        // What no host has.
        (
            cpuid(json!({"leaf": 7, "subleaf": 2, "register": "edx", "set": "0x80000000"})),
            "lacks CPUID 0x7.2 EDX bit 31; leave that out of the template",
        ),
        (
            json!({"msr": [{"index": "0xffff_ffff", "set": 1}]}),
            "MSR 0xffffffff",
        ),
    ] {
        let refused = boot(&server, &cpu);
        let message = refused.body["message"].as_str().unwrap_or_default();
        assert_eq!(refused.status, 400, "{cpu}: {refused:?}");
        assert!(message.contains(said), "{cpu}: {message}");
    }
    assert_eq!(server.client.get("/vms").unwrap().body, json!([]));
}
