//! `fermata reset`.

use std::{path::PathBuf, process::ExitCode};

use api_types::Reset;
use control::Registry;

use crate::{machine, output};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    vm: machine::Name,
    #[command(flatten)]
    clock: machine::Clock,
    /// Prints JSON, as `POST /vms/<pid>/reset` does.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn reset(args: &Args, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let record = args.vm.find(&Registry::open(run_dir)?)?;
    let clock = args.clock.chosen();
    let client = machine::connect(&record).await?;
    let reset = api_server::reset_of(client.reset(clock).await?);
    if args.json {
        output::print_json(&reset)?;
    } else {
        let Reset {
            dirty_pages,
            total_us,
        } = reset;
        let pid = record.process.pid;
        output::print(&format!(
            "machine {pid} is what it was: {dirty_pages} pages were undone, in {total_us} µs\n"
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
