//! `fermata store`.

use std::{fs, process::Output};

use serde_json::Value;

use super::{Bench, text};

/// A bench with a store `s`, in which a file is saved as `monday`.
fn with_a_snapshot() -> Bench {
    let bench = Bench::new();
    assert!(store(&bench, &["init"]).status.success());
    let opened = dedup::Store::open_dir(bench.path().join("s"), dedup::OpenOptions::default());
    let file = bench.path().join("file");
    fs::write(&file, "content").unwrap();
    opened.unwrap().save_file("monday", file).unwrap();
    bench
}

fn store(bench: &Bench, arguments: &[&str]) -> Output {
    bench.run(&[&["store", "--store", "s"], arguments].concat())
}

#[test]
fn a_tag_that_is_removed_leaves_its_snapshot() {
    let bench = with_a_snapshot();
    let store = |arguments: &[&str]| store(&bench, arguments);
    assert!(store(&["tag", "monday", "gold"]).status.success());
    let said = text(&store(&["rm", "gold"]).stdout);
    assert_eq!(said, "removed the tag gold; monday stays\n");
    let said = text(&store(&["rm", "monday"]).stdout);
    assert!(said.contains("gc"), "{said}");
}

#[test]
fn a_store_without_its_config_says_what_brings_it_back() {
    let bench = with_a_snapshot();
    let store = |arguments: &[&str]| store(&bench, arguments);
    let config = bench.path().join("s/config");
    let whole = fs::read(&config).unwrap();
    let mut damaged = whole.clone();
    damaged[50] ^= 1;
    for content in [None, Some(damaged)] {
        match content {
            None => fs::remove_file(&config).unwrap(),
            Some(content) => fs::write(&config, content).unwrap(),
        }
        for (command, code) in [("ls", 1), ("fsck", 2)] {
            let output = store(&[command]);
            assert_eq!(output.status.code(), Some(code), "{output:?}");
            let said = text(&output.stderr);
            assert!(said.contains("run `fsck --repair`"), "{said}");
        }
        // As after any repair, there was something wrong, and JSON tells all.
        let output = store(&["fsck", "--repair", "--json"]);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["problems"][0]["file"], "config");
        assert_eq!(report["repaired"][0], "restored config from a pack");
        assert_eq!(fs::read(&config).unwrap(), whole);
        assert!(store(&["fsck"]).status.success());
    }
}

#[test]
fn a_snapshot_is_not_exported_over_a_file() {
    let bench = Bench::new();
    assert!(
        bench
            .run(&["store", "init", "--store", "s"])
            .status
            .success()
    );
    let disk = bench.path().join("disk");
    fs::write(&disk, "a guest's").unwrap();
    std::os::unix::fs::symlink("nowhere", bench.path().join("link")).unwrap();
    for (state, memory) in [("disk", "new"), ("new", "disk"), ("link", "new")] {
        let export = ["store", "export", "--store", "s", "one", state, memory];
        let refusal = bench.refusal(&export);
        assert!(refusal.contains("exists; name others"), "{refusal}");
    }
    assert_eq!(fs::read(&disk).unwrap(), b"a guest's");
    // New names are not what is wrong.
    let refusal = bench.refusal(&["store", "export", "--store", "s", "one", "new", "newer"]);
    assert!(!refusal.contains("exists"), "{refusal}");
}
