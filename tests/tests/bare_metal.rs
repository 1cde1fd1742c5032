//! The whole product on any `/dev/kvm`, with guests of a few instructions.
//!
//! Without `/dev/kvm` there is nothing to test with, and the tests say so and pass; the machines that
//! the project is built on have it.

#![allow(clippy::unwrap_used)] // a test that cannot go on should stop

#[path = "bare_metal/bad_input.rs"]
mod bad_input;
#[path = "bare_metal/balloon.rs"]
mod balloon;
#[path = "bare_metal/branching.rs"]
mod branching;
#[path = "bare_metal/command_line.rs"]
mod command_line;
#[path = "bare_metal/cpu_template.rs"]
mod cpu_template;
#[path = "bare_metal/crash.rs"]
mod crash;
#[path = "bare_metal/disk_limits.rs"]
mod disk_limits;
#[path = "bare_metal/disks_on_demand.rs"]
mod disks_on_demand;
#[path = "bare_metal/ends.rs"]
mod ends;
#[path = "bare_metal/errands.rs"]
mod errands;
#[path = "bare_metal/fork.rs"]
mod fork;
#[path = "bare_metal/generation.rs"]
mod generation;
#[path = "bare_metal/huge_pages.rs"]
mod huge_pages;
#[path = "bare_metal/live.rs"]
mod live;
#[path = "bare_metal/merging.rs"]
mod merging;
#[path = "bare_metal/network.rs"]
mod network;
#[path = "bare_metal/on_demand.rs"]
mod on_demand;
#[path = "bare_metal/pause.rs"]
mod pause;
#[path = "bare_metal/python.rs"]
mod python;
#[path = "bare_metal/reset.rs"]
mod reset;
#[path = "bare_metal/resize.rs"]
mod resize;
#[path = "bare_metal/round_trip.rs"]
mod round_trip;
#[path = "bare_metal/runs.rs"]
mod runs;
#[path = "bare_metal/sent.rs"]
mod sent;
#[path = "bare_metal/store.rs"]
mod store;
#[path = "bare_metal/working_set.rs"]
mod working_set;

use serde_json::json;
use system_tests::{
    bare_metal::{self, Testimony},
    cli::Cli,
    http::Machine,
    server::Server,
};

/// A server, unless this machine has no KVM.
fn server() -> Option<Server> {
    server_with(&[])
}

/// As [`server`], with more arguments.
fn server_with(arguments: &[&str]) -> Option<Server> {
    bare_metal::has_kvm().then(|| Server::start(arguments).unwrap())
}

/// Boots `kernel` with one vCPU and 64 MiB.
fn boot(server: &Server, kernel: &[u8]) -> Machine {
    std::fs::write(server.tree().join("kernel"), kernel).unwrap();
    let more = json!({"vcpus": 1, "memory_mib": 64});
    server.client.boot(&server.path("kernel"), &more).unwrap()
}

/// Waits until the writer has written more than `times`; returns how often it has.
fn writes(server: &Server, machine: Machine, times: u64) -> u64 {
    let console = server.console(machine).unwrap();
    let more = |line: &str| bare_metal::count(line).filter(|count| *count > times);
    let count = console.first("a write", more).unwrap();
    assert_eq!(count >> 31, 0, "a write has failed");
    count
}

/// Boots the counter and waits until it has counted to `count`.
fn counting(server: &Server, count: u64) -> Machine {
    let machine = boot(server, &bare_metal::counter());
    let console = server.console(machine).unwrap();
    let reached = |line: &str| bare_metal::count(line).filter(|found| *found >= count);
    console.first("the count", reached).unwrap();
    machine
}

/// The command line in the server's tree, with a store there.
fn cli(server: &Server) -> Cli {
    Cli::new(&server.tree(), &server.run_directory())
}

/// What the witness says from now on, once it has written to all of its pages at least three times more.
fn hear(server: &Server, machine: Machine) -> Testimony {
    let console = server.console(machine).unwrap();
    let now = console.last(Testimony::read).map_or(0, |said| said.round);
    let later = |line: &str| Testimony::read(line).filter(|said| said.round > now + 3);
    console.first("the witness", later).unwrap()
}

/// A counter or a gauge of the machine in this process.
fn gauge(server: &Server, pid: impl std::fmt::Display, name: &str) -> u64 {
    let metrics = server.client.get(&format!("/vms/{pid}/metrics")).unwrap();
    let mut metrics = metrics.body.as_array().unwrap().iter();
    let found = metrics.find(|metric| metric["name"] == name).unwrap();
    found["value"].as_u64().unwrap()
}
