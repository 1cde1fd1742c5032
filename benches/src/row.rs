//! Results: one row for each benchmark, system and size.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::Serialize;

/// What is measured; `docs/benchmarks.md` defines each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bench {
    /// From the start of the VMM's process to the guest's user space.
    Boot,
    /// The round trip of a request to hold the machine.
    Pause,
    /// From the request for a snapshot to its files being durable.
    Snapshot,
    /// How long the guest did not run for a snapshot.
    Downtime,
    /// From the start of the VMM's process to the restored guest's first output.
    Restore,
}

/// Whose time was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum System {
    /// fermata.
    Fermata,
    /// Debian's QEMU.
    Qemu,
}

/// One line of a result file. Every benchmark of the project writes this form.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// What was measured.
    pub bench: Bench,
    /// Whose time was taken.
    pub system: System,
    /// Guest memory in MiB.
    pub mem_mib: u64,
    /// The unit of the three figures: milliseconds.
    pub unit: &'static str,
    /// How often it was measured.
    pub n: usize,
    /// The least.
    pub min: f64,
    /// The median: of an even number, the mean of the middle two.
    pub median: f64,
    /// The most.
    pub max: f64,
}

impl fmt::Display for Bench {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Boot => "boot",
            Self::Pause => "pause",
            Self::Snapshot => "snapshot",
            Self::Downtime => "downtime",
            Self::Restore => "restore",
        })
    }
}

/// What was measured so far.
#[derive(Clone, Debug, Default)]
pub struct Samples(BTreeMap<(u64, Bench, System), Vec<Duration>>);

impl Samples {
    /// Adds one measurement.
    pub fn add(&mut self, mem_mib: u64, bench: Bench, system: System, time: Duration) {
        let samples = self.0.entry((mem_mib, bench, system)).or_default();
        samples.push(time);
    }

    /// The rows, by size, then benchmark, then system.
    pub fn rows(&self) -> Vec<Row> {
        let rows = self.0.iter();
        rows.filter_map(|(&(mem_mib, bench, system), times)| {
            let times = sorted_ms(times);
            Some(Row {
                bench,
                system,
                mem_mib,
                unit: "ms",
                n: times.len(),
                min: *times.first()?,
                median: median(&times)?,
                max: *times.last()?,
            })
        })
        .collect()
    }
}

/// Milliseconds, to the microsecond: what is behind that is noise.
fn sorted_ms(times: &[Duration]) -> Vec<f64> {
    let mut micros: Vec<_> = times.iter().map(Duration::as_micros).collect();
    micros.sort_unstable();
    micros
        .into_iter()
        .map(|micros| micros as f64 / 1000.0)
        .collect()
}

fn median(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    let lower = *sorted.get(middle.checked_sub(1)?)?;
    Some(f64::midpoint(lower, upper))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_the_middle_two() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[7.0]), Some(7.0));
        assert_eq!(median(&[1.0, 2.0, 90.0]), Some(2.0));
        assert_eq!(median(&[1.0, 2.0, 4.0, 90.0]), Some(3.0));
    }

    #[test]
    fn a_row_has_the_form_that_the_project_agreed_on() {
        let mut samples = Samples::default();
        for micros in [3_000, 1_500, 20_000_123] {
            let time = Duration::from_micros(micros);
            samples.add(256, Bench::Downtime, System::Qemu, time);
        }
        let expected = json!([{
            "bench": "downtime", "system": "qemu", "mem_mib": 256, "unit": "ms",
            "n": 3, "min": 1.5, "median": 3.0, "max": 20000.123,
        }]);
        assert_eq!(serde_json::to_value(samples.rows()).unwrap(), expected);
    }

    #[test]
    fn rows_come_by_size_then_bench_then_system() {
        let mut samples = Samples::default();
        for (mem_mib, bench, system) in [
            (512, Bench::Boot, System::Fermata),
            (256, Bench::Restore, System::Fermata),
            (256, Bench::Boot, System::Qemu),
            (256, Bench::Boot, System::Fermata),
        ] {
            samples.add(mem_mib, bench, system, Duration::ZERO);
        }
        let order: Vec<_> = samples.rows();
        let order: Vec<_> = order
            .iter()
            .map(|row| (row.mem_mib, row.bench, row.system))
            .collect();
        assert!(order.is_sorted());
        assert_eq!(order.len(), 4);
    }
}
