//! Machines whose first touches are known from the last time.

use std::fs;

use serde_json::Value;
use system_tests::wait;

use crate::{
    gauge,
    on_demand::{Restored, is_missing, keeping},
    server,
    store::Beside,
};

/// What the store says of the first pages of the snapshot `one`.
fn kept(beside: &Beside) -> Option<u64> {
    let log = beside.json(&["store", "log", "one", "--json"]);
    log[0]["working_set_pages"].as_u64()
}

#[test]
fn what_a_guest_touched_first_is_there_the_next_time() {
    let Some(server) = server() else { return };
    let beside = Beside::new(&server);
    beside.run(&["store", "init"]);
    let keeper = keeping(&server, &beside);
    beside.run(&["snapshot", &keeper.pid, "one", "--halt"]);
    assert_eq!(kept(&beside), None);
    let waits = |machine: &Restored| gauge(&server, &machine.pid, "fermata_waits_for_memory_total");

    let first = Restored::on_demand_with(&beside, "one", &[]);
    let pages = wait::until("the working set to be kept", || kept(&beside)).unwrap();
    assert_eq!(gauge(&server, &first.pid, "fermata_recorded_pages"), pages);
    assert_eq!(gauge(&server, &first.pid, "fermata_working_set_pages"), 0);
    first.looks(2);
    let without = waits(&first);
    beside.run(&["stop", &first.pid]);
    assert!(pages > 1000 && without >= pages, "{pages} of {without}");
    assert!(
        beside
            .run(&["store", "log", "one"])
            .contains(&format!("{pages} pages"))
    );

    let second = Restored::on_demand_with(&beside, "one", &[]);
    second.looks(2);
    assert_eq!(
        gauge(&server, &second.pid, "fermata_working_set_pages"),
        pages
    );
    assert_eq!(gauge(&server, &second.pid, "fermata_recorded_pages"), 0);
    // It comes with what lies around it; the guest is faster here and there.
    let bytes = gauge(&server, &second.pid, "fermata_working_set_bytes");
    assert!(bytes > pages * 4096, "{bytes} bytes of {pages} pages");
    let with = waits(&second);
    assert!(
        with * 4 < without,
        "waited {with} times instead of {without}"
    );
    beside.run(&["snapshot", &second.pid, "two", "--halt"]);

    // Another machine's is its own.
    let other = Restored::on_demand_with(&beside, "two", &["--working-set", "ignore"]);
    other.looks(2);
    assert_eq!(gauge(&server, &other.pid, "fermata_working_set_pages"), 0);
    let checked = beside.json(&["store", "fsck", "--json"]);
    assert_eq!(checked["problems"], Value::Array(vec![]));
    beside.run(&["store", "rm", "one"]);
    assert_eq!(beside.json(&["store", "stat", "--json"])["annotations"], 0);
}

#[test]
fn a_guest_runs_on_whatever_becomes_of_the_record() {
    let Some(server) = server() else { return };
    let beside = Beside::new(&server);
    beside.run(&["store", "init"]);
    let keeper = keeping(&server, &beside);
    beside.run(&["snapshot", &keeper.pid, "one", "--halt"]);
    let annotations = beside.cli.store().join("annotations");
    // Nothing can be put there: root may write anywhere, but not below a file.
    fs::remove_dir(&annotations).unwrap();
    fs::write(&annotations, "in the way").unwrap();
    let first = Restored::on_demand_with(&beside, "one", &[]);
    first.looks(2);
    wait::until("all to come", || {
        (!is_missing(&server, &first.pid)).then_some(())
    })
    .unwrap();
    fs::remove_file(&annotations).unwrap();
    // Gone while it is recorded.
    let second = Restored::on_demand_with(&beside, "one", &[]);
    beside.run(&["store", "rm", "one"]);
    second.looks(3);
    wait::until("all to come", || {
        (!is_missing(&server, &second.pid)).then_some(())
    })
    .unwrap();
    beside.run(&["snapshot", &second.pid, "two", "--halt"]);
    let whole = beside.json(&["restore", "two", "--json"]);
    Restored::of(&beside, whole["pid"].to_string()).looks(2);
}
