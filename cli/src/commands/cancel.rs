//! `fermata cancel`.

use std::{path::PathBuf, process::ExitCode};

use control::Registry;

use crate::{machine, output};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    vm: machine::Name,
}

pub(crate) async fn cancel(args: &Args, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let record = args.vm.find(&Registry::open(run_dir)?)?;
    machine::connect(&record).await?.cancel_snapshot().await?;
    let pid = record.process.pid;
    output::print(&format!("the snapshot of machine {pid} is cancelled\n"))?;
    Ok(ExitCode::SUCCESS)
}
