//! `fermata disk`.

use std::fs;

use branch_disk::{Disk, Foundation, anything};
use serde_json::Value;

use super::{Bench, text};

#[test]
fn layers_of_a_disk_are_merged() {
    let bench = Bench::new();
    let path = bench.path().join("d");
    let on = Foundation::Nothing;
    let mut disk = Disk::create(&path, Some(1 << 20), &on, &anything).unwrap();
    let mut cut = || {
        disk.write(0, &mut &[1; 512][..]).unwrap();
        disk.cut(disk.prepare().unwrap()).unwrap().finish().unwrap()
    };
    let layers = [cut(), cut(), cut()].map(|layer| layer.path.to_str().unwrap().to_owned());
    let refusal = bench.refusal(&["disk", "merge", "d"]);
    assert!(refusal.contains("is in use"), "{refusal}");
    drop(disk);
    // A disk in the same directory stands on the second.
    let said = bench.run(&["disk", "branch", &layers[1], "e"]);
    assert!(said.status.success(), "{said:?}");
    let said = bench.run(&["disk", "merge", "d", "--remove"]);
    let said = text(&said.stdout);
    assert!(
        said.starts_with(&format!("3 layers are {}\n", layers[2])),
        "{said}"
    );
    for layer in &layers[..2] {
        assert!(
            said.contains(&format!("not needed by this disk: {layer}\n")),
            "{said}"
        );
    }
    let said = bench.run(&["disk", "merge", "d", "--json"]);
    let said: Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!((&said["layers"], &said["into"]), (&1.into(), &Value::Null));

    let said = bench.run(&["disk", "merge", "e", "--remove", "--json"]);
    let said: Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!(said["into"], layers[1]);
    assert_eq!(said["removed"], serde_json::json!([layers[0]]));
    for disk in ["d", "e"] {
        let said = text(&bench.run(&["disk", "check", disk]).stdout);
        assert_eq!(said, "2 layers, nothing wrong\n");
    }
}

#[test]
fn a_disk_is_made_branched_shown_checked_and_copied() {
    let bench = Bench::new();
    fs::write(bench.path().join("base"), vec![5; 1 << 20]).unwrap();
    let json = |arguments: &[&str]| -> Value {
        let output = bench.run(&[&["disk", "--json"], arguments].concat());
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let made = json(&["create", "d", "--base", "base", "--size", "2M"]);
    assert_eq!(made["bytes"], 2 << 20);
    json(&["branch", "d", "e"]);
    let info = json(&["info", "e"]);
    assert_eq!(info["layers"].as_array().unwrap().len(), 2);
    assert_eq!(info["layers"][1]["sealed"], true);
    assert!(info["base"]["path"].as_str().unwrap().ends_with("/base"));
    assert_eq!(json(&["check", "e"])["problems"], Value::Array(vec![]));
    for format in ["raw", "qcow2"] {
        let (image, back) = (&*format!("{format}.img"), &*format!("{format}.disk"));
        let copied = json(&["export", "e", image, "--format", format]);
        assert_eq!(copied["data_bytes"], 1 << 20);
        assert_eq!(json(&["import", image, back, "--format", format]), copied);
        json(&["export", back, &format!("{format}.back")]);
        let back = fs::read(bench.path().join(format!("{format}.back"))).unwrap();
        assert!(back == [vec![5; 1 << 20], vec![0; 1 << 20]].concat());
    }
    // What does not look raw is taken for that only when it is said to be.
    let refusal = bench.refusal(&["disk", "import", "qcow2.img", "f"]);
    assert!(refusal.contains("--format qcow2"), "{refusal}");
    json(&["import", "qcow2.img", "f", "--format", "raw"]);
    let refusal = bench.refusal(&["disk", "import", "e", "g"]);
    assert!(refusal.contains("a disk that branches"), "{refusal}");
    let refusal = bench.refusal(&["disk", "create", "g", "--base", "e"]);
    assert!(refusal.contains("a disk that branches"), "{refusal}");
    let refusal = bench.refusal(&["disk", "info", "base"]);
    assert!(refusal.contains("is no branching disk"), "{refusal}");
    // A damaged layer is found, and told by the exit code.
    let layer = info["layers"][1]["path"].as_str().unwrap();
    let mut bytes = fs::read(layer).unwrap();
    bytes[40] ^= 1;
    fs::write(layer, bytes).unwrap();
    let output = bench.run(&["disk", "check", "e"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(text(&output.stdout).contains("is damaged"), "{output:?}");
}

#[test]
fn what_is_refused_of_a_disk_is_told_once_and_changes_nothing() {
    let bench = Bench::new();
    let output = bench.run(&["disk", "create", "--size", "1M", "s.disk"]);
    assert!(output.status.success(), "{output:?}");
    let names = || {
        let entries = fs::read_dir(bench.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = names();
    let long = "a".repeat(250);
    for to in ["s.disk", "away/b.disk", "/proc/b.disk", &long] {
        bench.refusal(&["disk", "branch", "s.disk", to]);
        assert_eq!(names(), before, "{to}");
    }
    let refusal = bench.refusal(&["disk", "create", "--size", "1M", &long]);
    assert!(refusal.contains("at most 216 bytes"), "{refusal}");
    for arguments in [
        &["info", "nope"][..],
        &["export", "nope", "image"],
        &["create", "d", "--base", "nope"],
        &["branch", "nope", "d"],
        &["merge", "nope"],
        &["import", "nope", "d"],
    ] {
        let refusal = bench.refusal(&[&["disk"], arguments].concat());
        assert_eq!(refusal.matches("os error").count(), 1, "{refusal}");
        assert!(refusal.contains("give the path"), "{refusal}");
    }
}
