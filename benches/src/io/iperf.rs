//! iperf3 between a guest and its host: <https://software.es.net/iperf/>.

use std::{net::IpAddr, process::Command};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::worker::Worker;
use crate::Bench;

/// Bytes of TCP over the guest's network device for so many `seconds`, one connection; MB/s.
pub(super) fn run(worker: &Worker, bench: Bench, seconds: u32) -> Result<f64> {
    let output = Command::new("iperf3")
        .args(arguments(worker.address(), bench, seconds)?)
        .output()
        .context("cannot run iperf3; apt-get install iperf3")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "iperf3 failed: {said}");
    figure(&said)
}

fn arguments(guest: IpAddr, bench: Bench, seconds: u32) -> Result<Vec<String>> {
    let words = format!("--client {guest} --time {seconds} --omit 1 --json");
    let mut words: Vec<String> = words.split(' ').map(str::to_owned).collect();
    match bench {
        Bench::TcpToGuest => {}
        // The server, which is in the guest, sends.
        Bench::TcpFromGuest => words.push("--reverse".into()),
        other => bail!("{other} is not of the network"),
    }
    Ok(words)
}

/// What has arrived, whoever sent it.
fn figure(json: &str) -> Result<f64> {
    let report: Value = serde_json::from_str(json).context("iperf3's report is not JSON")?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.context("iperf3's report has no rate")? / 8e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arrived_counts() {
        let report = r#"{"end": {"sum_sent": {"bits_per_second": 9e9},
            "sum_received": {"bits_per_second": 8e8}}}"#;
        assert_eq!(figure(report).unwrap(), 100.0);
        assert!(figure(r#"{"error": "no"}"#).is_err());
    }

    #[test]
    fn the_guest_sends_if_it_is_to() {
        let guest = [10, 0, 0, 2].into();
        let has = |bench| {
            let arguments = arguments(guest, bench, 1).unwrap();
            arguments.contains(&"--reverse".to_owned())
        };
        assert!(has(Bench::TcpFromGuest) && !has(Bench::TcpToGuest));
        assert!(arguments(guest, Bench::Boot, 1).is_err());
    }
}
