//! `fermata pause` and `fermata resume`.

use std::{path::PathBuf, process::ExitCode};

use control::Registry;

use crate::{machine, output};

#[derive(clap::Args)]
pub(crate) struct PauseArgs {
    #[command(flatten)]
    vm: machine::Name,
}

#[derive(clap::Args)]
pub(crate) struct ResumeArgs {
    #[command(flatten)]
    vm: machine::Name,
    #[command(flatten)]
    clock: machine::Clock,
}

pub(crate) async fn pause(args: &PauseArgs, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let record = args.vm.find(&Registry::open(run_dir)?)?;
    machine::connect(&record).await?.pause().await?;
    let pid = record.process.pid;
    output::print(&format!(
        "machine {pid} stands still; `fermata resume {pid}` lets it go on\n"
    ))?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn resume(args: &ResumeArgs, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let record = args.vm.find(&Registry::open(run_dir)?)?;
    let clock = args.clock.chosen();
    machine::connect(&record).await?.resume(clock).await?;
    output::print(&format!("machine {} goes on\n", record.process.pid))?;
    Ok(ExitCode::SUCCESS)
}
