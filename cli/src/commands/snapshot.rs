//! `fermata snapshot`.

use std::{path::PathBuf, process::ExitCode};

use control::{AfterSnapshot, Registry, SnapshotRequest};

use crate::{machine, output};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    vm: machine::Name,
    /// Where the state file goes. A file that is there is replaced when the new one is whole.
    #[arg(value_parser = machine::absolute())]
    state: PathBuf,
    /// Where the memory file goes.
    #[arg(value_parser = machine::absolute())]
    memory: PathBuf,
    /// Ends the machine once it is saved.
    #[arg(long)]
    halt: bool,
    /// Prints what was saved and how long it took as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn snapshot(args: Args, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let record = args.vm.find(&Registry::open(run_dir)?)?;
    let request = SnapshotRequest {
        state: args.state,
        memory: args.memory,
        then: if args.halt {
            AfterSnapshot::Halt
        } else {
            AfterSnapshot::Resume
        },
    };
    let report = machine::connect(&record).await?.snapshot(request).await?;
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(&format!(
            "snapshot {}: {} of {} written in {:.1} ms; the guest stood still for {:.1} ms\n",
            report.id,
            output::bytes(report.written_bytes),
            output::bytes(report.memory_bytes),
            report.total_us as f64 / 1000.0,
            report.downtime_us as f64 / 1000.0,
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
