//! `fermata restore`.

use std::{path::PathBuf, process::ExitCode};

use api_types::CreateAnswer;
use control::{Console, Log, Origin, Registry, spawn};

use crate::{foreground, machine, output, program};

#[derive(clap::Args)]
#[command(after_help = format!("With --foreground: {}", foreground::EXIT_CODES))]
pub(crate) struct Args {
    /// The state file.
    #[arg(value_parser = machine::absolute())]
    state: PathBuf,
    /// The memory file.
    #[arg(value_parser = machine::absolute())]
    memory: PathBuf,
    /// Has the machine's console on this terminal, and its exit code for one's own.
    #[arg(long)]
    foreground: bool,
    /// Prints the new machine's process id and port as JSON.
    #[arg(long, conflicts_with = "foreground")]
    json: bool,
}

pub(crate) async fn restore(args: Args, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let registry = Registry::open(run_dir)?;
    let origin = Origin::Restore {
        state: args.state,
        memory: args.memory,
    };
    if args.foreground {
        return foreground::run(&registry, origin).await;
    }
    let console = registry.new_console()?;
    let spec = machine::launch_spec(&registry, origin, Console::File(console.clone()))?;
    let vmm = spawn(&program::find()?, &spec, Log::File, machine::LAUNCH).await?;
    let (pid, port) = (vmm.pid, vmm.port);
    if args.json {
        output::print_json(&CreateAnswer { pid, port })?;
    } else {
        output::print(&format!(
            "machine {pid} runs, with its control service on port {port} and its console in {}\n",
            console.display()
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
