//! `fermata stop`.

use std::{path::PathBuf, process::ExitCode};

use control::{Registry, Stopped};

use crate::{machine, output};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    vm: machine::Name,
}

pub(crate) async fn stop(args: &Args, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let record = args.vm.find(&Registry::open(run_dir)?)?;
    let pid = record.process.pid;
    let how = match control::stop(&record, machine::STOP).await? {
        Stopped::OnRequest => "has stopped",
        Stopped::Killed => "did not stop and was killed",
    };
    output::print(&format!("machine {pid} {how}\n"))?;
    Ok(ExitCode::SUCCESS)
}
