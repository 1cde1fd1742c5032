//! The dependency arrows between our crates are those that `ARCHITECTURE.md` draws.

#![allow(clippy::unwrap_used)] // a test that cannot go on should stop

use std::{collections::BTreeMap, path::Path};

use serde_json::Value;

/// What each crate may know of, besides what others have written.
const ARROWS: &[(&str, &[&str])] = &[
    ("api-server", &["api-types", "control"]),
    ("api-types", &[]),
    (
        "benches",
        &["branch-disk", "control", "dedup", "system-tests", "testbed"],
    ),
    ("branch-disk", &["golden"]),
    (
        "cli",
        &[
            "api-server",
            "api-types",
            "branch-disk",
            "control",
            "dedup",
            "hypervisor",
            "saved-state",
            "snapshot",
        ],
    ),
    ("control", &[]),
    ("dedup", &["golden"]),
    (
        "devices",
        &["branch-disk", "golden", "memory", "saved-state"],
    ),
    ("golden", &["saved-state"]),
    ("hypervisor", &["golden", "memory", "saved-state"]),
    ("memory", &[]),
    ("peer", &[]),
    ("saved-state", &[]),
    (
        "snapshot",
        &["dedup", "golden", "memory", "peer", "saved-state"],
    ),
    (
        "system-tests",
        &["api-types", "control", "snapshot", "testbed"],
    ),
    ("testbed", &[]),
    (
        "vmm",
        &[
            "branch-disk",
            "control",
            "devices",
            "golden",
            "hypervisor",
            "memory",
            "saved-state",
            "snapshot",
        ],
    ),
    ("xtask", &["testbed"]),
];

#[test]
fn no_crate_knows_of_more_than_is_drawn() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root)
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let name = |value: &Value| value["name"].as_str().unwrap().to_owned();
    let mut ours: Vec<String> = packages.iter().map(name).collect();
    ours.sort();
    let drawn: BTreeMap<_, _> = ARROWS.iter().copied().collect();
    assert!(
        ours.iter().map(String::as_str).eq(drawn.keys().copied()),
        "{ours:?}"
    );
    for package in packages {
        let allowed = drawn[name(package).as_str()];
        for dependency in package["dependencies"].as_array().unwrap() {
            let kind = &dependency["kind"];
            let dependency = name(dependency);
            assert!(
                dependency != "golden" || kind == "dev",
                "{} -> golden is for tests alone",
                name(package)
            );
            let drawn = !ours.contains(&dependency) || allowed.contains(&dependency.as_str());
            assert!(drawn, "{} -> {dependency} is not drawn", name(package));
        }
    }
}

/// KVM, and HTTP, stay in their rooms.
#[test]
fn what_belongs_in_one_room_is_in_no_other() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for (dependency, rooms) in [
        ("kvm-ioctls", &["hypervisor"] as &[&str]),
        ("kvm-bindings", &["hypervisor"]),
        ("rocket", &["api-server", "cli"]),
    ] {
        for (package, _) in ARROWS {
            let directory = if *package == "system-tests" {
                "tests"
            } else {
                package
            };
            let manifest =
                std::fs::read_to_string(root.join(directory).join("Cargo.toml")).unwrap();
            let has = manifest.lines().any(|line| line.starts_with(dependency));
            assert!(
                !has || rooms.contains(package),
                "{package} has {dependency}"
            );
        }
    }
}
