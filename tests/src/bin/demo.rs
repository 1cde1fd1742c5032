//! `cargo xtask demo`: the main job on a real guest, told as it happens.

use std::{
    io::Write,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use system_tests::{cli::Cli, console::count, http::Machine, linux, server::Server, wait};

/// Snapshots that go into the store.
const SNAPSHOTS: u32 = 10;

fn main() -> Result<()> {
    let server = linux::server()?;
    let client = &server.client;
    println!(
        "\nfermata holds a virtual machine, and lets it go on later as if nothing had happened.\n"
    );

    say("A server runs that makes machines on request, each in a process of its own.");
    let begun = Instant::now();
    let machine = linux::boot(&server, "counter")?;
    say(&format!(
        "POST /create: process {} boots Debian's own cloud kernel with 2 vCPUs and 256 MiB.",
        machine.pid
    ));
    let console = server.console(machine)?;
    console.first("user space", |line| {
        line.contains("fermata-guest: ready").then_some(())
    })?;
    took("Its user space is up", begun.elapsed());
    show_count(&server, machine, 3)?;
    let before = linux::verify(&console)?;
    say(
        "The guest says what it has: a process with a secret, a file in memory, a file on its disk.",
    );
    println!(
        "    process {}   memory {}   disk {}   CPUs at work {}",
        before.process, before.memory, before.disk, before.cpus
    );

    say("POST /snapshot with resume: true. The counter does not stop for it.");
    let (state, memory) = (server.path("vm.state"), server.path("vm.memory"));
    let begun = Instant::now();
    client.snapshot(machine, &state, &memory, true)?;
    took("Both files are complete and durable", begun.elapsed());
    show_count(&server, machine, 3)?;

    say("POST /snapshot with resume: false. The machine is saved and its process ends.");
    let begun = Instant::now();
    client.snapshot(machine, &state, &memory, false)?;
    took("Both files are complete and durable", begun.elapsed());
    wait::until("the process to end", || client.vm(machine.pid).ok()?.ended)?;
    let cut = console.last(count).unwrap_or(0);
    println!("    The last number that it counted is {cut}. Now there is no machine any more.");

    say("POST /create with resume: true. A fresh process takes up the two files.");
    let begun = Instant::now();
    let restored = client.restore(&state, &memory)?;
    let console = server.console(restored)?;
    let first = linux::counts_past(&console, 0)?;
    took(
        &format!("Process {} counts {first}", restored.pid),
        begun.elapsed(),
    );
    ensure!(
        (cut + 1..=cut + 2).contains(&first),
        "the count went from {cut} to {first}"
    );
    show_count(&server, restored, 3)?;
    let after = linux::verify(&console)?;
    println!(
        "    process {}   memory {}   disk {}   CPUs at work {}",
        after.process, after.memory, after.disk, after.cpus
    );
    linux::nothing_lost(&before, &after)?;
    println!("\nThe same process, the same files, both CPUs: the guest has noticed nothing.\n");
    in_a_store(&server, restored)
}

/// Ten snapshots by name, what they cost, and the last of them gone on with.
fn in_a_store(server: &Server, machine: Machine) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let cli = Cli::new(directory.path(), &server.run_directory());
    cli.run(&["store", "init"])?;
    let pid = machine.pid.to_string();
    say("fermata snapshot <vm> <name>, ten times while it counts. Nothing is stored twice.");
    for number in 1..=SNAPSHOTS {
        let name = format!("demo-{number}");
        let mut arguments = vec!["snapshot", &pid, &name, "--json"];
        if number == SNAPSHOTS {
            arguments.push("--halt");
        }
        let report = cli.json(&arguments)?;
        println!(
            "    {name}: {} MiB in use, {} KiB new in the store, {:.0} ms",
            report["written_bytes"].as_u64().unwrap_or(0) >> 20,
            report["stored"]["new_bytes"].as_u64().unwrap_or(0) >> 10,
            report["total_us"].as_f64().unwrap_or(0.0) / 1000.0
        );
        if number < SNAPSHOTS {
            show_count(server, machine, 1)?;
        }
    }
    for line in cli.run(&["store", "stat"])?.lines() {
        println!("    {line}");
    }
    let console = server.console(machine)?;
    let cut = console.last(count).unwrap_or(0);

    let name = format!("demo-{SNAPSHOTS}");
    say(&format!("fermata restore {name}."));
    let begun = Instant::now();
    let restored = cli.json(&["restore", &name, "--json"])?;
    let restored = Machine {
        pid: u32::try_from(restored["pid"].as_u64().unwrap_or(0))?,
        port: u16::try_from(restored["port"].as_u64().unwrap_or(0))?,
    };
    let console = server.console(restored)?;
    let first = linux::counts_past(&console, 0)?;
    took(
        &format!(
            "It was cut at {cut}, and process {} counts {first}",
            restored.pid
        ),
        begun.elapsed(),
    );
    ensure!(
        (cut + 1..=cut + 2).contains(&first),
        "the count went from {cut} to {first}"
    );
    Ok(())
}

fn say(text: &str) {
    println!("* {text}");
    let _ = std::io::stdout().flush();
}

fn took(what: &str, time: Duration) {
    println!("    {what} after {:.0} ms.", time.as_secs_f64() * 1000.0);
}

/// Shows the next `lines` counts as they come.
fn show_count(server: &Server, machine: Machine, lines: u32) -> Result<()> {
    let console = server.console(machine)?;
    let mut shown = console.last(count).unwrap_or(0);
    for _ in 0..lines {
        shown = linux::counts_past(&console, shown)?;
        println!("    guest: count {shown}");
    }
    Ok(())
}
