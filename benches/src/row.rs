//! Results: one row for each benchmark, system and size.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::Serialize;

/// What is measured; `docs/benchmarks.md` defines each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
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
    /// From the start of the VMM's process to the first thing that the restored guest does.
    RestoreFirst,
    /// From the start of the VMM's process until all of the restored guest's memory is there.
    RestoreAll,
    /// From the start of the VMM's process until the restored guest has touched all pages that it needs.
    RestoreTouched,
    /// As [`Bench::RestoreFirst`], of a machine whose disk is not here.
    DiskFirst,
    /// From the start of the VMM's process until all of the restored machine's disk is here.
    DiskAll,
    /// What the guest's clock goes forward while it is held, in microseconds.
    ClockStep,
    /// What the images take in a store, in MiB.
    Size,
    /// Saving all images, in MB/s.
    Save,
    /// Saving them once more, unchanged, in MB/s.
    SaveAgain,
    /// Loading all images, checked, in MB/s.
    Load,
    /// Loading one image, in seconds.
    LoadOne,
    /// Reading a page anywhere in an image: the median, in microseconds.
    ReadAt,
    /// The 99th percentile of that.
    ReadAtP99,
    /// Saving all images from memory, as a guest's is saved, in MB/s.
    SaveMemory,
    /// Saving them once more, unchanged.
    SaveMemoryAgain,
    /// Loading all images into memory, checked.
    LoadMemory,
    /// What the slowest primitive of a save allows, in MB/s.
    SaveBound,
    /// What the slowest primitive of a second save allows.
    SaveAgainBound,
    /// What the slowest primitive of a load allows.
    LoadBound,
    /// What the slowest primitive of a load into memory allows.
    LoadMemoryBound,
    /// What four snapshots of a small guest take, in MiB.
    FourSize,
    /// Saving them, in seconds.
    FourSave,
    /// What 150 snapshots of a course take, in MiB.
    CourseSize,
    /// Saving them, in seconds.
    CourseSave,
    /// Reading a disk of a guest's from one end to the other, in MB/s.
    SeqRead,
    /// Writing it so.
    SeqWrite,
    /// Reading 4 KiB anywhere on it.
    RandRead,
    /// Writing them.
    RandWrite,
    /// One TCP connection from the host to a guest, in MB/s.
    TcpToGuest,
    /// One from a guest to the host.
    TcpFromGuest,
    /// Reading 4 KiB anywhere on a disk that branches, in MB/s.
    ChainRandRead,
    /// Reading it from one end to the other.
    ChainSeqRead,
    /// How long the guest stands still for a snapshot that it goes on beside.
    CowStop,
    /// The 99th percentile of that.
    CowStopP99,
    /// From the request for such a snapshot until it is durable.
    CowTotal,
    /// What such a snapshot saves of a guest's memory, in MiB.
    CowSaved,
    /// What of the guest's memory is other than in the snapshot before, in pages, in MiB.
    CowChanged,
    /// How much the first is of the second, in percent.
    CowSavedShare,
    /// How fast a guest writes beside one snapshot after the other, of how fast it does without, in percent.
    CowShare,
    /// How long the guest stands still for a snapshot whose memory was copied before.
    PrecopyStop,
    /// From the request for such a snapshot until it is durable.
    PrecopyTotal,
    /// From the request for one fork to the first byte that its guest prints, a few dozen instructions after its first.
    Fork,
    /// The 99th percentile of that.
    ForkP99,
    /// From the request for one fork until who asked is told that its guest runs.
    ForkTold,
    /// The 99th percentile of that.
    ForkToldP99,
    /// From the request for a hundred until who asked is told that all run.
    Fork100,
    /// The same of five hundred.
    Fork500,
    /// Memory that each of them has of its own, in KiB.
    ForkPrivate,
    /// How often in a second a machine is reset and its guest has written to pages again.
    ResetRate,
    /// From when the VMM turns to a reset until the guest runs again, in microseconds.
    Reset,
    /// The 99th percentile of that.
    ResetP99,
    /// What an idle VMM takes beside its guest's memory, in MiB.
    Pss,
}

/// Whose time was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum System {
    /// fermata.
    Fermata,
    /// Debian's QEMU.
    Qemu,
    /// restic.
    Restic,
    /// borg.
    Borg,
    /// casync.
    Casync,
    /// rustic.
    Rustic,
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
    /// The unit of the three figures.
    pub unit: &'static str,
    /// How often it was measured.
    pub n: usize,
    /// The least.
    pub min: f64,
    /// The median: of an even number, the mean of the middle two.
    pub median: f64,
    /// The most.
    pub max: f64,
    /// How the system was set, where it was measured at several settings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setting: Option<String>,
}

impl Row {
    /// The row of `figures`, in the unit of `bench`; `None` without any.
    pub fn of(bench: Bench, system: System, mem_mib: u64, figures: &[f64]) -> Option<Self> {
        let mut figures = figures.to_vec();
        figures.sort_unstable_by(f64::total_cmp);
        Some(Self {
            bench,
            system,
            mem_mib,
            unit: bench.unit(),
            n: figures.len(),
            min: *figures.first()?,
            median: median(&figures)?,
            max: *figures.last()?,
            setting: None,
        })
    }

    /// The same, measured at this setting.
    #[must_use]
    pub fn at(self, setting: &str) -> Self {
        Self {
            setting: Some(setting.to_owned()),
            ..self
        }
    }

    /// Whether its median is better than that of another row of the same benchmark.
    pub fn is_better_than(&self, other: &Self) -> bool {
        if matches!(self.unit, "MB/s" | "1/s") {
            self.median > other.median
        } else {
            self.median < other.median
        }
    }
}

impl Bench {
    /// The unit of its figures.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Boot
            | Self::Pause
            | Self::Snapshot
            | Self::Downtime
            | Self::Restore
            | Self::CowStop
            | Self::CowStopP99
            | Self::RestoreFirst
            | Self::RestoreAll
            | Self::RestoreTouched
            | Self::DiskFirst
            | Self::DiskAll
            | Self::Fork
            | Self::ForkP99
            | Self::ForkTold
            | Self::ForkToldP99
            | Self::Fork500
            | Self::Fork100
            | Self::CowTotal
            | Self::PrecopyStop
            | Self::PrecopyTotal => "ms",
            Self::CowShare | Self::CowSavedShare => "%",
            Self::ForkPrivate => "KiB",
            Self::Size
            | Self::FourSize
            | Self::CourseSize
            | Self::Pss
            | Self::CowSaved
            | Self::CowChanged => "MiB",
            Self::LoadOne | Self::FourSave | Self::CourseSave => "s",
            Self::ReadAt | Self::ReadAtP99 | Self::ClockStep | Self::Reset | Self::ResetP99 => "µs",
            Self::ResetRate => "1/s",
            Self::Save
            | Self::SaveAgain
            | Self::Load
            | Self::SaveMemory
            | Self::SaveMemoryAgain
            | Self::LoadMemory
            | Self::SaveBound
            | Self::SaveAgainBound
            | Self::LoadBound
            | Self::LoadMemoryBound
            | Self::SeqRead
            | Self::SeqWrite
            | Self::RandRead
            | Self::RandWrite
            | Self::TcpToGuest
            | Self::TcpFromGuest
            | Self::ChainRandRead
            | Self::ChainSeqRead => "MB/s",
        }
    }
}

impl fmt::Display for Bench {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Boot => "boot",
            Self::Pause => "pause",
            Self::Snapshot => "snapshot",
            Self::Downtime => "downtime",
            Self::Restore => "restore",
            Self::RestoreFirst => "restore-first",
            Self::RestoreAll => "restore-all",
            Self::RestoreTouched => "restore-touched",
            Self::DiskFirst => "disk-first",
            Self::DiskAll => "disk-all",
            Self::ClockStep => "clock-step",
            Self::Size => "size",
            Self::Save => "save",
            Self::SaveAgain => "save-again",
            Self::Load => "load",
            Self::LoadOne => "load-one",
            Self::ReadAt => "read-at",
            Self::ReadAtP99 => "read-at-p99",
            Self::SaveMemory => "save-memory",
            Self::SaveMemoryAgain => "save-memory-again",
            Self::LoadMemory => "load-memory",
            Self::SaveBound => "save-bound",
            Self::SaveAgainBound => "save-again-bound",
            Self::LoadBound => "load-bound",
            Self::LoadMemoryBound => "load-memory-bound",
            Self::FourSize => "four-size",
            Self::FourSave => "four-save",
            Self::CourseSize => "course-size",
            Self::CourseSave => "course-save",
            Self::SeqRead => "seq-read",
            Self::SeqWrite => "seq-write",
            Self::RandRead => "rand-read",
            Self::RandWrite => "rand-write",
            Self::TcpToGuest => "tcp-to-guest",
            Self::TcpFromGuest => "tcp-from-guest",
            Self::ChainRandRead => "chain-rand-read",
            Self::ChainSeqRead => "chain-seq-read",
            Self::CowStop => "cow-stop",
            Self::CowStopP99 => "cow-stop-p99",
            Self::CowTotal => "cow-total",
            Self::CowSaved => "cow-saved",
            Self::CowChanged => "cow-changed",
            Self::CowSavedShare => "cow-saved-share",
            Self::CowShare => "cow-share",
            Self::PrecopyStop => "precopy-stop",
            Self::PrecopyTotal => "precopy-total",
            Self::Fork => "fork",
            Self::ForkP99 => "fork-p99",
            Self::ForkTold => "fork-told",
            Self::ForkToldP99 => "fork-told-p99",
            Self::Fork500 => "fork-500",
            Self::Fork100 => "fork-100",
            Self::ForkPrivate => "fork-private",
            Self::ResetRate => "reset-rate",
            Self::Reset => "reset",
            Self::ResetP99 => "reset-p99",
            Self::Pss => "pss",
        })
    }
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Fermata => "fermata",
            Self::Qemu => "qemu",
            Self::Restic => "restic",
            Self::Borg => "borg",
            Self::Casync => "casync",
            Self::Rustic => "rustic",
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
            Row::of(bench, system, mem_mib, &in_ms(times))
        })
        .collect()
    }
}

/// Figures so far, each in the unit of its benchmark, of systems at several settings; `""` is none.
#[derive(Clone, Debug, Default)]
pub struct Figures(BTreeMap<(Bench, System, &'static str), Vec<f64>>);

impl Figures {
    /// Adds one.
    pub fn add(&mut self, bench: Bench, system: System, setting: &'static str, figure: f64) {
        let figures = self.0.entry((bench, system, setting)).or_default();
        figures.push(figure);
    }

    /// The rows, by benchmark, then system, then setting, of guests with `mem_mib`.
    pub fn rows(&self, mem_mib: u64) -> Vec<Row> {
        let rows = self.0.iter();
        rows.filter_map(|(&(bench, system, setting), figures)| {
            let row = Row::of(bench, system, mem_mib, figures)?;
            Some(if setting.is_empty() {
                row
            } else {
                row.at(setting)
            })
        })
        .collect()
    }
}

/// Milliseconds, to the microsecond: what is behind that is noise.
fn in_ms(times: &[Duration]) -> Vec<f64> {
    let micros = times.iter().map(Duration::as_micros);
    micros.map(|micros| micros as f64 / 1000.0).collect()
}

/// The least of `figures` that so much of them does not exceed.
pub(crate) fn percentile(figures: &[f64], part: f64) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() as f64 * part).ceil() as usize;
    sorted
        .get(at.saturating_sub(1))
        .copied()
        .unwrap_or(f64::NAN)
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
    fn figures_of_one_setting_are_one_row() {
        let mut figures = Figures::default();
        for figure in [5.0, 1.0, 3.0] {
            figures.add(Bench::SeqRead, System::Fermata, "raw", figure);
        }
        figures.add(Bench::SeqRead, System::Qemu, "", 7.0);
        let rows = figures.rows(512);
        assert_eq!((rows[0].n, rows[0].median, rows[0].unit), (3, 3.0, "MB/s"));
        let settings: Vec<_> = rows.iter().map(|row| row.setting.as_deref()).collect();
        assert_eq!(settings, [Some("raw"), None]);
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
