//! `cargo xtask demo`: the main job on a real guest, told as it happens.

use std::{
    io::Write,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use system_tests::{console::count, http::Machine, linux, server::Server, wait};

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
