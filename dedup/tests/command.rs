//! The `dedup` command.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]
#![cfg(feature = "cli")]

mod support;

use std::path::Path;
use std::process::{Command, Output};

use support::image;

fn dedup(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dedup"))
        .args(args)
        .current_dir(dir)
        .env_remove("DEDUP_STORE")
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
fn errors_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dedup(dir.path(), &["ls"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("create one first"));
    json(dir.path(), &["init"]);
    let unknown = dedup(dir.path(), &["load", "nobody", "x"]);
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("`log` lists"));
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
