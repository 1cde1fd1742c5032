//! `fermata`: virtual machines that are held, stored, and let go on.

#![forbid(unsafe_code)]

mod balloon;
mod commands;
mod console;
mod cpu;
mod disk;
mod doctor;
mod foreground;
mod machine;
mod machine_file;
mod net;
mod output;
mod peer_key;
mod program;
mod progress;
mod size;
mod store;
mod terminal;
mod text_file;
mod vsock;

use std::{io::IsTerminal, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use control::{LOG_VARIABLE, Registry, allow_many_files};
use tracing_subscriber::EnvFilter;

use commands::{
    balloon as balloon_commands, cancel, disk as disk_commands, fork, inspect, metrics, pause, ps,
    receive, reset, restore, run, serve, snapshot, stop, store as store_commands,
};

/// Runs virtual machines, saves them, and lets them go on: later, elsewhere, or many times over.
#[derive(Parser)]
#[command(name = "fermata", version)]
struct Cli {
    /// Where the machines that run are written down [default: $FERMATA_RUN_DIR, or a directory of this
    /// user's].
    #[arg(long, global = true, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves the REST interface.
    Serve(serve::Args),
    /// Boots a kernel, with its console on this terminal.
    Run(run::Args),
    /// Lists the machines that run.
    Ps(ps::Args),
    /// Shows what a machine counts.
    Metrics(metrics::Args),
    /// Holds a machine: its guest stands still until it is let go on.
    Pause(pause::PauseArgs),
    /// Lets a machine go on that is held.
    Resume(pause::ResumeArgs),
    /// Saves a machine into a store, or into two files.
    Snapshot(snapshot::Args),
    /// Ends the snapshot that is being taken of a machine; nothing of it is kept.
    Cancel(cancel::Args),
    /// Receives snapshots that other hosts send (`fermata snapshot --to`).
    Receive(receive::Args),
    /// Lets a saved machine go on.
    Restore(restore::Args),
    /// Has a machine be what it was when it was forked or restored: undoes what it has done since.
    Reset(reset::Args),
    /// Has one machine go on as many, from one instant: one that runs, or a saved one.
    Fork(fork::Args),
    /// Looks into a store of snapshots, and keeps it in order.
    Store(store_commands::Args),
    /// Makes and looks into disks that branch.
    Disk(disk_commands::Args),
    /// Shows a machine's balloon and what its guest tells of its memory, and has it give memory back.
    Balloon(balloon_commands::Args),
    /// Ends a machine without asking its guest.
    Stop(stop::Args),
    /// Shows what is in a state file.
    Inspect(inspect::Args),
    /// Says what this host can and cannot do, and what to do about it.
    Doctor(doctor::Args),
}

fn main() -> ExitCode {
    let Cli { run_dir, command } = Cli::parse();
    start_log(&command);
    if matches!(
        command,
        Command::Serve(_) | Command::Fork(_) | Command::Receive(_) | Command::Disk(_)
    ) {
        allow_many_files();
    }
    let run_dir = run_dir.unwrap_or_else(Registry::default_dir);
    match dispatch(run_dir, command) {
        Ok(code) => code,
        Err(error) => {
            output::say(&format!("fermata: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn dispatch(run_dir: PathBuf, command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Serve(args) => wait(serve::serve(args, run_dir)),
        Command::Run(args) => wait(run::run(args, run_dir)),
        Command::Ps(args) => wait(ps::ps(&args, run_dir)),
        Command::Metrics(args) => wait(metrics::metrics(&args, run_dir)),
        Command::Pause(args) => wait(pause::pause(&args, run_dir)),
        Command::Resume(args) => wait(pause::resume(&args, run_dir)),
        Command::Snapshot(args) => wait(snapshot::snapshot(args, run_dir)),
        Command::Cancel(args) => wait(cancel::cancel(&args, run_dir)),
        Command::Receive(args) => receive::receive(&args),
        Command::Restore(args) => wait(restore::restore(args, run_dir)),
        Command::Reset(args) => wait(reset::reset(&args, run_dir)),
        Command::Fork(args) => wait(fork::fork(args, run_dir)),
        Command::Store(args) => store_commands::run(&args),
        Command::Disk(args) => wait(disk_commands::run(&args, run_dir)),
        Command::Balloon(args) => wait(balloon_commands::balloon(&args, run_dir)),
        Command::Stop(args) => wait(stop::stop(&args, run_dir)),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Doctor(args) => doctor::doctor(&args, &run_dir),
    }
}

fn wait(command: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(command)
}

/// Messages go to standard error: for a server what it does, for a command only what is wrong.
fn start_log(command: &Command) {
    let default = match command {
        Command::Serve(_) | Command::Receive(_) => "info,tarpc=warn,rocket=off",
        _ => "warn,tarpc=error",
    };
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        // Of messages that cannot be written it would complain there, too, and panic.
        .log_internal_errors(false)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}
