//! Developer's commands: `cargo xtask help` lists them.

#![forbid(unsafe_code)]

mod bench;
mod build;
mod demo;
mod ground;
mod test;
mod tools;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

#[derive(Parser)]
#[command(about = "Tests, demo and benchmarks of fermata, with all the set-up that they need")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run every test: without KVM, on any KVM, and on Linux guests, nested where there is need
    Test {
        /// Instead, of the tests on Linux guests those whose names contain one of these
        names: Vec<String>,
    },
    /// Show the main job on a real guest: boot, snapshot, restore in a fresh process
    Demo,
    /// Measure, and write the results as JSON
    Bench {
        /// What to measure
        what: Bench,
        /// File for the rows
        #[arg(long)]
        json: PathBuf,
        /// Directory for drawings, of which `store` makes two
        #[arg(long)]
        figures: Option<PathBuf>,
    },
    /// Boot the emulated machine and run a command in it
    L1 {
        /// The command and its arguments
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<String>,
    },
    /// Build what the guests boot and print the paths
    Guest,
}

#[derive(Clone, Copy, ValueEnum)]
enum Bench {
    /// Linux guests: fermata beside QEMU
    Vm,
    /// Disks and networks of Linux guests, boot time and memory: fermata beside QEMU
    Io,
    /// Bare-metal guests on this machine's own /dev/kvm
    Native,
    /// Snapshots that guests do not feel, forks, and restores on demand, on this machine's own /dev/kvm
    Instant,
    /// The store beside restic, borg, casync and rustic, on memories and disks of guests
    Store,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Test { names } if names.is_empty() => test::run(),
        Command::Test { names } => test::run_on_linux_guests(&names),
        Command::Demo => demo::run(),
        Command::Bench {
            what: Bench::Vm,
            json,
            ..
        } => bench::vm(&json),
        Command::Bench {
            what: Bench::Io,
            json,
            ..
        } => bench::io(&json),
        Command::Bench {
            what: Bench::Native,
            json,
            ..
        } => bench::native(&json),
        Command::Bench {
            what: Bench::Instant,
            json,
            ..
        } => bench::instant(&json),
        Command::Bench {
            what: Bench::Store,
            json,
            figures,
        } => bench::store(&json, figures.as_deref()),
        Command::L1 { command } => tools::l1(&command),
        Command::Guest => tools::guest(),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
