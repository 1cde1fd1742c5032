//! `fermata balloon`.

use std::{path::PathBuf, process::ExitCode};

use api_types::Balloon;
use control::{BalloonChange, Registry};

use crate::{machine, output};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    vm: machine::Name,
    /// Memory that is to be in the balloon, in MiB: the guest does without. It may take its time, or not find so much.
    #[arg(long, value_name = "MIB")]
    target: Option<u64>,
    /// Asks the guest for statistics every so many seconds; 0 for on demand only.
    #[arg(long, value_name = "SECONDS")]
    statistics_interval: Option<u32>,
    /// Prints JSON, as `GET /vms/<pid>/balloon` does.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn balloon(args: &Args, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let record = args.vm.find(&Registry::open(run_dir)?)?;
    let change = BalloonChange {
        target_mib: args.target,
        statistics_interval_s: args.statistics_interval,
    };
    let status = machine::connect(&record).await?.balloon(change).await?;
    let balloon = api_server::balloon_of(status);
    if args.json {
        output::print_json(&balloon)?;
    } else {
        output::print(&output::table(["WHAT", "VALUE"], &rows(&balloon)))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn rows(balloon: &Balloon) -> Vec<[String; 2]> {
    let interval = match balloon.statistics_interval_s {
        0 => "on demand".to_owned(),
        seconds => format!("every {seconds} s"),
    };
    let mut rows = vec![
        ["target".to_owned(), output::bytes(balloon.target_mib << 20)],
        [
            "in the balloon".to_owned(),
            output::bytes(balloon.actual_bytes),
        ],
        [
            "driver".to_owned(),
            if balloon.driver { "at work" } else { "none" }.to_owned(),
        ],
        ["statistics".to_owned(), interval],
    ];
    if let Some(statistics) = &balloon.statistics {
        let age = format!("{:.1} s ago", statistics.age_ms as f64 / 1000.0);
        rows.push(["told".to_owned(), age]);
        rows.extend(statistics.values.iter().map(
            |(name, value)| match name.strip_suffix("_bytes") {
                Some(what) => [what.replace('_', " "), output::bytes(*value)],
                None => [name.replace('_', " "), value.to_string()],
            },
        ));
    }
    rows
}

#[cfg(test)]
mod tests {
    use api_types::BalloonStatistics;

    use super::*;

    #[test]
    fn a_balloon_is_shown_with_what_the_guest_has_told() {
        let values = [("free_bytes", 3 << 20), ("major_faults", 5)];
        let balloon = Balloon {
            driver: true,
            target_mib: 64,
            actual_bytes: 4096,
            statistics_interval_s: 0,
            statistics: Some(BalloonStatistics {
                age_ms: 250,
                values: values.map(|(name, value)| (name.to_owned(), value)).into(),
            }),
        };
        let rows = rows(&balloon);
        let row = |what: &str, value: &str| [what.to_owned(), value.to_owned()];
        assert_eq!(
            rows[..2],
            [row("target", "64 MiB"), row("in the balloon", "4 KiB")]
        );
        assert_eq!(rows[5..], [row("free", "3 MiB"), row("major faults", "5")]);
    }
}
