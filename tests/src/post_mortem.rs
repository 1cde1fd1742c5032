//! What a machine is at that does not do what it should, for a test's last words.

use std::{
    fs,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use api_types::Metric;

use crate::cli::Cli;

/// Between two looks, of which the second says what has moved.
const BETWEEN: Duration = Duration::from_secs(5);

/// How long a machine may do next to nothing before it counts as one that stands still: longer than a guest sleeps that waits for one
/// of its devices.
const STILL: Duration = Duration::from_secs(120);

/// Notices that a machine stands still: that its process uses less than a tenth of a CPU for two minutes.
#[derive(Debug)]
pub struct Standstill {
    since: Instant,
    used: Duration,
}

impl Standstill {
    /// Counts from now on, for a process that has used no time yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            since: Instant::now(),
            used: Duration::ZERO,
        }
    }

    /// Whether a machine whose process has `used` so much of a CPU's time by `now` has done next to nothing for as long as that.
    pub fn seen(&mut self, now: Instant, used: Duration) -> bool {
        let passed = now.duration_since(self.since);
        if passed < STILL {
            return false;
        }
        let worked = used.saturating_sub(self.used);
        *self = Self { since: now, used };
        worked < passed / 10
    }
}

impl Default for Standstill {
    fn default() -> Self {
        Self::new()
    }
}

/// How much of a CPU's time process `pid` has used.
///
/// # Errors
///
/// When it is gone.
pub fn used(pid: u64) -> Result<Duration> {
    Ok(stat(&format!("/proc/{pid}/stat"))?.used)
}

/// What the threads of machine `pid` do, and what it counts, in lines; what could not be found out is said there, too.
#[must_use]
pub fn describe(cli: &Cli, pid: u64) -> String {
    let threads = threads(pid).unwrap_or_default();
    let metrics = metrics(cli, pid).unwrap_or_default();
    sleep(BETWEEN);
    let now = match self::threads(pid) {
        Ok(now) => now.iter().map(|now| now.since(&threads)).collect(),
        Err(error) => format!("{error:#}\n"),
    };
    let counted = match self::metrics(cli, pid) {
        Ok(counted) => counted.iter().map(|now| moved(now, &metrics)).collect(),
        Err(error) => format!("{error:#}\n"),
    };
    format!("in {BETWEEN:?}, by threads and counters:\n{now}{counted}")
}

/// What proc_pid_stat(5) has of a process or a thread.
struct Stat {
    /// With which name a thread is told from others: its id.
    id: String,
    name: String,
    state: String,
    used: Duration,
}

impl Stat {
    fn since(&self, before: &[Self]) -> String {
        let before = before.iter().find(|before| before.id == self.id);
        let before = before.map_or(Duration::ZERO, |before| before.used);
        let Self {
            name, state, used, ..
        } = self;
        format!(
            "{name}: {state}, {:?} of CPU\n",
            used.saturating_sub(before)
        )
    }
}

fn stat(path: &str) -> Result<Stat> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    parse(&text).with_context(|| format!("cannot understand {path}"))
}

/// The fields behind the name, which may have blanks and parentheses, are single words: the state, then ten others, then the ticks of
/// a clock for which it was in user space and in the kernel.
fn parse(text: &str) -> Option<Stat> {
    let (id, rest) = text.split_once(" (")?;
    let (name, rest) = rest.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    let ticks = |at: usize| fields.get(at)?.parse::<u64>().ok();
    let used = ticks(11)?.checked_add(ticks(12)?)?;
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Some(Stat {
        id: id.to_owned(),
        name: name.to_owned(),
        state: (*fields.first()?).to_owned(),
        used: Duration::from_millis(used.checked_mul(1000)? / per_second),
    })
}

fn threads(pid: u64) -> Result<Vec<Stat>> {
    let directory = format!("/proc/{pid}/task");
    let entries = fs::read_dir(&directory).with_context(|| format!("cannot list {directory}"))?;
    entries
        .map(|entry| stat(&entry?.path().join("stat").to_string_lossy()))
        .collect()
}

fn metrics(cli: &Cli, pid: u64) -> Result<Vec<Metric>> {
    let printed = cli.json(&["metrics", &pid.to_string(), "--json"])?;
    Ok(serde_json::from_value(printed)?)
}

/// A line for a counter; none for one that has nothing to tell.
fn moved(now: &Metric, before: &[Metric]) -> String {
    let same = |before: &&Metric| (&before.name, &before.labels) == (&now.name, &now.labels);
    let before = before.iter().find(same).map_or(0, |before| before.value);
    let label = now.labels.values().next().map_or("", String::as_str);
    match (before, now.value) {
        (0, 0) => String::new(),
        (before, value) if before == value => format!("{} {label}: {value}\n", now.name),
        (before, value) => format!("{} {label}: {before} to {value}\n", now.name),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test that cannot go on should stop

    use super::*;

    #[test]
    fn a_name_may_have_parentheses() {
        let text = "17 (a) (b) S 1 2 3 4 5 6 7 8 9 10 30 20 0 0 20 0 1 0 100\n";
        let stat = parse(text).unwrap();
        assert_eq!((stat.name.as_str(), stat.state.as_str()), ("a) (b", "S"));
        let per_second = rustix::param::clock_ticks_per_second();
        assert_eq!(stat.used, Duration::from_millis(50_000 / per_second));
        assert!(parse("17 (a) S 1 2").is_none());
    }

    #[test]
    fn our_own_threads_are_found_and_our_time() {
        let pid = std::process::id().into();
        assert!(!threads(pid).unwrap().is_empty());
        used(pid).unwrap();
    }

    #[test]
    fn a_machine_that_does_next_to_nothing_for_long_stands_still() {
        let mut standstill = Standstill::new();
        let begun = standstill.since;
        let seconds = |count: f64| Duration::from_secs_f64(count);
        assert!(!standstill.seen(begun + seconds(119.0), seconds(0.0)));
        assert!(!standstill.seen(begun + seconds(120.0), seconds(12.0)));
        assert!(!standstill.seen(begun + seconds(239.0), seconds(12.0)));
        assert!(standstill.seen(begun + seconds(240.0), seconds(23.9)));
    }
}
