//! The `dedup` command.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]
#![cfg(feature = "cli")]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use dedup::{OpenOptions, Store};
use support::image;

fn dedup(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dedup"))
        .args(args)
        .current_dir(dir)
        .env_remove("DEDUP_STORE")
        .env_remove("DEDUP_KEY_FILE")
        .output()
        .unwrap()
}

fn json(dir: &Path, args: &[&str]) -> serde_json::Value {
    let output = dedup(dir, &[args, &["--json"]].concat());
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn files_are_saved_listed_loaded_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let image = image(500, 1);
    std::fs::write(dir.join("image"), &image).unwrap();
    json(dir, &["init"]);
    json(dir, &["save", "a", "image"]);
    let again = json(dir, &["save", "b", "image"]);
    assert_eq!(again["images"][0]["new_chunks"], 0);
    json(dir, &["tag", "a", "gold"]);
    assert_eq!(json(dir, &["ls"]).as_array().unwrap().len(), 2);
    assert_eq!(json(dir, &["stat"])["snapshots"], 2);
    assert!(
        json(dir, &["diff", "a", "b"])[0]["changed"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    json(dir, &["load", "gold", "loaded"]);
    assert!(std::fs::read(dir.join("loaded")).unwrap() == image);
    json(dir, &["rm", "a"]);
    json(dir, &["rm", "b"]);
    assert_eq!(json(dir, &["gc"])["packs_removed"], 1);
    assert!(
        json(dir, &["fsck"])["problems"]
            .as_array()
            .unwrap()
            .is_empty()
    );
}

#[test]
fn several_files_are_one_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir(dir.join("in")).unwrap();
    let images = [("in/memory", image(700, 1)), ("disk", image(1500, 2))];
    for (file, image) in &images {
        std::fs::write(dir.join(file), image).unwrap();
    }
    json(dir, &["init"]);
    let saved = json(dir, &["save", "both", "in/memory", "disk"]);
    assert_eq!(saved["images"][0]["name"], "memory");
    json(dir, &["load", "both", "out"]);
    for (name, (_, image)) in ["memory", "disk"].iter().zip(&images) {
        assert!(std::fs::read(dir.join("out").join(name)).unwrap() == *image);
    }
    std::fs::write(dir.join("in/disk"), "another").unwrap();
    let output = dedup(dir, &["save", "twice", "disk", "in/disk"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("would be called \"disk\""), "{said}");
}

#[test]
fn errors_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dedup(dir.path(), &["ls"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("create one first"));
    json(dir.path(), &["init"]);
    let unknown = dedup(dir.path(), &["load", "nobody", "x"]);
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("list those that there are"));
}

/// Of as many snapshots as there are, a process has but a few open.
#[test]
fn there_may_be_more_snapshots_than_files_may_be_open() {
    let dir = tempfile::tempdir().unwrap();
    json(dir.path(), &["init"]);
    std::fs::write(dir.path().join("file"), image(3, 1)).unwrap();
    let path = dir.path().join("dedup-store");
    let store = Store::open_dir(path, OpenOptions::default()).unwrap();
    for number in 0..120 {
        let name = number.to_string();
        store.save_file(&name, dir.path().join("file")).unwrap();
        let snapshot = store.snapshot(&name).unwrap();
        snapshot.annotate("note", b"learned later").unwrap();
    }
    drop(store);
    for command in ["ls", "gc", "stat", "fsck", "fsck --repair"] {
        let program = env!("CARGO_BIN_EXE_dedup");
        let limited = format!("ulimit -n 64; exec {program} {command}");
        let mut shell = Command::new("sh");
        shell.args(["-c", &limited]).current_dir(dir.path());
        let output = shell.output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {error}");
    }
}

#[test]
fn a_load_that_was_killed_is_in_nobodys_way_and_what_is_loaded_is_its_owners() {
    let dir = tempfile::tempdir().unwrap();
    json(dir.path(), &["init"]);
    std::fs::write(dir.path().join("file"), image(3, 1)).unwrap();
    json(dir.path(), &["save", "monday", "file"]);
    // In a container, processes have the same id each time.
    for pid in std::process::id()..std::process::id() + 200 {
        std::fs::write(dir.path().join(format!("loaded.{pid}.part")), "half").unwrap();
    }
    json(dir.path(), &["load", "monday", "loaded"]);
    let loaded = std::fs::metadata(dir.path().join("loaded")).unwrap();
    assert_eq!(loaded.permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    json(dir.path(), &["init"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut stat = Command::new(env!("CARGO_BIN_EXE_dedup"));
    stat.arg("stat").current_dir(dir.path()).stdout(writer);
    let output = stat.output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn damage_has_an_exit_code_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("image"), image(100, 2)).unwrap();
    json(dir, &["init"]);
    json(dir, &["save", "a", "image"]);
    let pack = std::fs::read_dir(dir.join("dedup-store/packs"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let mut bytes = std::fs::read(&pack).unwrap();
    bytes[3000] ^= 1;
    std::fs::write(&pack, bytes).unwrap();
    let checked = dedup(dir, &["fsck"]);
    assert_eq!(checked.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&checked.stdout).contains("snapshots hit: a"));
    assert_eq!(dedup(dir, &["fsck", "--repair"]).status.code(), Some(2));
    assert!(String::from_utf8_lossy(&dedup(dir, &["fsck"]).stdout).contains("are not there"));
}

/// Without its config a store cannot be opened, but it is one: nobody is sent to make another, or back to what cannot be done.
#[test]
fn a_store_without_its_config_says_what_brings_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("image"), image(100, 2)).unwrap();
    json(dir, &["init"]);
    json(dir, &["save", "a", "image"]);
    let config = dir.join("dedup-store/config");
    let whole = std::fs::read(&config).unwrap();
    let mut damaged = whole.clone();
    damaged[50] ^= 1;
    for content in [None, Some(damaged), Some(Vec::new())] {
        match content {
            None => std::fs::remove_file(&config).unwrap(),
            Some(content) => std::fs::write(&config, content).unwrap(),
        }
        for (command, code) in [("ls", 1), ("fsck", 2)] {
            let refused = dedup(dir, &[command]);
            assert_eq!(refused.status.code(), Some(code), "{refused:?}");
            let said = String::from_utf8(refused.stderr).unwrap();
            assert!(said.contains("run `fsck --repair`"), "{said}");
        }
        // As after any repair, there was something wrong, and JSON tells all.
        let repaired = dedup(dir, &["fsck", "--repair", "--json"]);
        assert_eq!(repaired.status.code(), Some(2));
        let report: serde_json::Value = serde_json::from_slice(&repaired.stdout).unwrap();
        assert_eq!(report["problems"][0]["file"], "config");
        assert_eq!(report["repaired"][0], "restored config from a pack");
        assert_eq!(std::fs::read(&config).unwrap(), whole);
        json(dir, &["fsck"]);
    }
    // Where nothing tells what it was, that is said, and not that there is no store.
    std::fs::remove_file(&config).unwrap();
    for pack in std::fs::read_dir(dir.join("dedup-store/packs")).unwrap() {
        std::fs::remove_file(pack.unwrap().path()).unwrap();
    }
    let refused = dedup(dir, &["fsck", "--repair"]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("no pack has a copy"));
}

#[test]
fn an_image_that_one_snapshot_has_is_added_or_removed() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for (file, pages) in [("memory", 2), ("disk", 12)] {
        std::fs::write(dir.join(file), vec![7; pages * 4096]).unwrap();
    }
    json(dir, &["init"]);
    json(dir, &["save", "both", "memory", "disk"]);
    std::fs::write(dir.join("memory"), vec![8; 8192]).unwrap();
    std::fs::create_dir(dir.join("other")).unwrap();
    std::fs::write(dir.join("other/second"), "x").unwrap();
    json(dir, &["save", "one", "memory", "other/second"]);
    let said = |args: &[&str]| String::from_utf8(dedup(dir, args).stdout).unwrap();
    assert_eq!(
        said(&["diff", "both", "one"]),
        "memory: 8.0 KiB of 8.0 KiB changed\ndisk: removed, 48.0 KiB\nsecond: added, 1 B\n"
    );
}

/// Files may be called anything, and who writes one may be nobody's friend.
#[test]
fn names_of_files_steer_no_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("image"), image(3, 2)).unwrap();
    json(dir, &["init"]);
    json(dir, &["save", "a", "image"]);
    let snapshots = dir.join("dedup-store/snapshots");
    std::fs::copy(snapshots.join("a"), snapshots.join("\u{1b}[2J")).unwrap();
    std::fs::write(snapshots.join("\u{1b}[3J"), "no snapshot").unwrap();
    for command in ["ls", "fsck", "gc"] {
        let output = dedup(dir, &[command]);
        let said = [output.stdout, output.stderr].concat();
        assert!(!said.contains(&0x1b), "{}", said.escape_ascii());
        let shown = String::from_utf8(said).unwrap();
        assert!(shown.contains("\\u{1b}[3J"), "{shown}");
    }
}

#[test]
fn an_encrypted_store_takes_its_key_file() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("image"), image(100, 3)).unwrap();
    let key = ["--key-file", "key"];
    let with_key = |args: &[&str]| dedup(dir, &[args, &key].concat());
    assert!(with_key(&["init"]).status.success());
    assert!(with_key(&["save", "a", "image"]).status.success());
    // Where it takes no key, none is asked for.
    for args in [
        ["ls"].as_slice(),
        &["stat"],
        &["fsck"],
        &["tag", "a", "b"],
        &["gc"],
    ] {
        json(dir, args);
    }
    assert_eq!(json(dir, &["fsck"])["digests_only"], true);
    for args in [
        ["load", "a", "loaded"],
        ["save", "b", "image"],
        ["diff", "a", "a"],
    ] {
        let refused = dedup(dir, &args);
        assert_eq!(refused.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("no key was given"));
    }
    let loaded = Command::new(env!("CARGO_BIN_EXE_dedup"))
        .args(["load", "a", "loaded"])
        .current_dir(dir)
        .env("DEDUP_KEY_FILE", "key")
        .output()
        .unwrap();
    assert!(loaded.status.success());
    assert!(std::fs::read(dir.join("loaded")).unwrap() == image(100, 3));
    std::fs::write(dir.join("other"), "0".repeat(64)).unwrap();
    let refused = dedup(dir, &["ls", "--key-file", "other"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("chmod 600"));
    // Not made but by `init`.
    assert!(!dedup(dir, &["ls", "--key-file", "absent"]).status.success());
    assert!(!dir.join("absent").exists());
}
