//! `fermata ps`.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use api_server::{describe, status_of};
use api_types::Vm;
use control::Registry;
use futures::future::join_all;

use crate::{machine, output};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Prints JSON, as `GET /vms` does.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn ps(args: &Args, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let registry = Registry::open(run_dir)?;
    let records = registry.list()?;
    let statuses = join_all(records.iter().map(status_of)).await;
    let vms: Vec<Vm> = records
        .iter()
        .zip(statuses)
        .map(|(record, status)| describe(&registry, record, status))
        .collect();
    if args.json {
        output::print_json(&vms)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows: Vec<_> = records
        .iter()
        .zip(&vms)
        .map(|(record, vm)| {
            [
                vm.pid.to_string(),
                vm.port.to_string(),
                format!("{:?}", vm.state).to_lowercase(),
                record.vcpus.to_string(),
                output::bytes(record.memory_mib << 20),
                vm.uptime_ms.map(uptime).unwrap_or_default(),
                machine::origin(&record.origin),
            ]
        })
        .collect();
    let heading = [
        "PID", "PORT", "STATE", "VCPUS", "MEMORY", "UPTIME", "ORIGIN",
    ];
    output::print(&output::table(heading, &rows))?;
    for vm in &vms {
        if let Some(lost) = &vm.lost_memory {
            output::print(&format!("machine {}: {lost}\n", vm.pid))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn uptime(milliseconds: u64) -> String {
    let seconds = Duration::from_millis(milliseconds).as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours}:{minutes:02}:{:02}", seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uptime_counts_hours() {
        assert_eq!(uptime(59_999), "0:00:59");
        assert_eq!(uptime(100 * 3_600_000 + 61_000), "100:01:01");
    }
}
