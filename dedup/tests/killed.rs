//! A real writer is killed again and again; what it had saved is there.
//!
//! `DEDUP_KILLS` is the number of kills, 25 by default.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

mod support;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use dedup::{GcOptions, Store};
use support::{Random, create_options, image, load, options, save, touch};

const STORE: &str = "DEDUP_TEST_STORE";
const WRITER: &str = "DEDUP_TEST_WRITER";

fn image_of(writer: u64, round: u64) -> Vec<u8> {
    let mut image = image(600, writer / 5);
    touch(&mut image, 50, writer << 32 | round);
    image
}

/// The writer: runs when the test below starts it as a process of its own.
#[test]
fn writer_process() {
    let (Ok(store), Ok(writer)) = (std::env::var(STORE), std::env::var(WRITER)) else {
        return;
    };
    let store = Store::open_dir(store, options()).unwrap();
    let writer = writer.parse().unwrap();
    for round in 0.. {
        let name = format!("w{writer}-{round}");
        save(&store, &name, &image_of(writer, round)).unwrap();
        println!("\nsaved {round}");
        if round % 3 == 2 {
            // Sometimes in the middle of a collection.
            let _ = store.gc(&GcOptions::default());
        }
    }
}

/// The name of the test above, which is in another module in `encrypted.rs`.
fn writer_process_name() -> String {
    let path = concat!(module_path!(), "::writer_process");
    path.split_once("::")
        .map_or("", |(_, name)| name)
        .to_owned()
}

#[test]
fn a_killed_writer_loses_nothing_it_had_saved() {
    let kills: u64 = std::env::var("DEDUP_KILLS")
        .ok()
        .and_then(|kills| kills.parse().ok())
        .unwrap_or(25);
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create_dir(dir.path(), &create_options(), options()).unwrap();
    let mut random = Random::new(kills);
    for writer in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &writer_process_name(), "--nocapture"])
            .env(STORE, dir.path())
            .env(WRITER, writer.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let saved = |line: std::io::Result<String>| {
            line.unwrap()
                .strip_prefix("saved ")
                .map(|round| round.parse().unwrap())
        };
        // Once it is at work, at any moment.
        let mut last: u64 = lines.by_ref().find_map(saved).unwrap();
        std::thread::sleep(Duration::from_micros(random.below(60_000) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        last = lines.filter_map(saved).last().unwrap_or(last);

        for round in 0..=last {
            let name = format!("w{writer}-{round}");
            assert!(
                load(&store, &name).unwrap() == image_of(writer, round),
                "{name}"
            );
        }
        let report = store.fsck().unwrap();
        assert!(report.problems.is_empty(), "{report:?}");
        // The next writers share chunks with what this one left.
        for entry in store.log().unwrap().iter().skip(3) {
            store.rm(&entry.name).unwrap();
        }
        if writer % 4 == 3 {
            store.gc(&GcOptions::default()).unwrap();
        }
    }
    store.gc(&GcOptions::default()).unwrap();
    for leftover in ["tmp", "leases", "condemned"] {
        assert_eq!(
            std::fs::read_dir(dir.path().join(leftover))
                .unwrap()
                .count(),
            0,
            "{leftover}"
        );
    }
}
