//! `fermata reset`.

use std::{
    num::{NonZeroU32, NonZeroU64},
    path::PathBuf,
    process::ExitCode,
};

use api_types::{Reset, Runs, RunsEnd};
use control::{Registry, RunsRequest};

use crate::{machine, output};

/// The exit code when runs end otherwise than all done.
const NOT_ALL_DONE: u8 = 2;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    vm: machine::Name,
    #[command(flatten)]
    clock: machine::Clock,
    /// Has it run so many times, and be reset each time that its guest says by the run port that it is done with result 0. The exit
    /// code is 2 when they end otherwise than all done.
    #[arg(long, value_name = "N")]
    runs: Option<NonZeroU32>,
    /// The number of the first run, which the guest reads from the run port.
    #[arg(long, value_name = "NUMBER", default_value = "1", requires = "runs")]
    first: NonZeroU32,
    /// The most milliseconds that a run may take.
    #[arg(long, value_name = "MS", requires = "runs")]
    run_limit: Option<NonZeroU64>,
    /// Prints JSON, as `POST /vms/<pid>/reset` does, or `POST /vms/<pid>/runs`.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn reset(args: &Args, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let record = args.vm.find(&Registry::open(run_dir)?)?;
    let clock = args.clock.chosen();
    let client = machine::connect(&record).await?;
    let pid = record.process.pid;
    if let Some(runs) = args.runs {
        let request = RunsRequest {
            runs,
            first: args.first,
            run_limit_ms: args.run_limit,
            clock,
        };
        let runs = api_server::runs_of(client.runs(request).await?);
        if args.json {
            output::print_json(&runs)?;
        } else {
            output::print(&said(pid, &runs))?;
        }
        return Ok(match runs.ended {
            RunsEnd::AllDone => ExitCode::SUCCESS,
            _ => ExitCode::from(NOT_ALL_DONE),
        });
    }
    let reset = api_server::reset_of(client.reset(clock).await?);
    if args.json {
        output::print_json(&reset)?;
    } else {
        let Reset {
            dirty_pages,
            total_us,
        } = reset;
        output::print(&format!(
            "machine {pid} is what it was: {dirty_pages} pages were undone, in {total_us} µs\n"
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The sentence that says how runs have ended.
fn said(pid: u32, runs: &Runs) -> String {
    let Runs {
        done,
        ended,
        last,
        result,
        dirty_pages,
        reset_us,
        total_us,
    } = runs;
    let how = match (ended, result) {
        (RunsEnd::AllDone, _) => format!("machine {pid} is what it was, and held"),
        (RunsEnd::Result, Some(result)) => {
            format!("run {last} had result {result}; machine {pid} is held there")
        }
        (RunsEnd::Result, None) => format!("run {last} had a result; machine {pid} is held there"),
        (RunsEnd::Limit, _) => format!("run {last} took too long; machine {pid} is held there"),
        (RunsEnd::Interrupted, Some(result)) if *result != 0 => format!(
            "run {last} had result {result} as it was interrupted by another request for machine {pid}"
        ),
        (RunsEnd::Interrupted, _) => {
            format!("run {last} was interrupted by another request for machine {pid}")
        }
        (RunsEnd::Ended, _) => format!("in run {last}, machine {pid} ended"),
    };
    format!(
        "{how}: {done} runs were done with result 0, in {total_us} µs; {dirty_pages} pages were undone, in {reset_us} µs\n"
    )
}
