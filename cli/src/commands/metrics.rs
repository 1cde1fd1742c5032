//! `fermata metrics`.

use std::{path::PathBuf, process::ExitCode};

use control::{Metric, Registry};

use crate::{machine, output};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    vm: machine::Name,
    /// Prints JSON, as `GET /vms/<pid>/metrics` does.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn metrics(args: &Args, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let record = args.vm.find(&Registry::open(run_dir)?)?;
    let metrics = machine::connect(&record).await?.metrics().await?;
    if args.json {
        let answer = metrics.into_iter().map(|metric| api_types::Metric {
            name: metric.name,
            labels: metric.label.into_iter().collect(),
            value: metric.value,
        });
        output::print_json(&answer.collect::<Vec<_>>())?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows: Vec<_> = metrics
        .iter()
        .map(|metric| [named(metric), metric.value.to_string()])
        .collect();
    output::print(&output::table(["METRIC", "VALUE"], &rows))?;
    Ok(ExitCode::SUCCESS)
}

/// A name with its label, as Prometheus writes it.
fn named(Metric { name, label, .. }: &Metric) -> String {
    match label {
        Some((key, value)) => format!("{name}{{{key}=\"{value}\"}}"),
        None => name.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_in_braces() {
        let mut metric = Metric {
            name: "fermata_vcpu_exits_total".to_owned(),
            label: Some(("reason".to_owned(), "port".to_owned())),
            value: 7,
        };
        assert_eq!(named(&metric), "fermata_vcpu_exits_total{reason=\"port\"}");
        metric.label = None;
        assert_eq!(named(&metric), "fermata_vcpu_exits_total");
    }
}
