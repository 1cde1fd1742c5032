//! Runs: a machine that is reset each time that its guest says that it is done, until it says that something came of it.
//!
//! What is under way is a state of the controller, which between two runs waits for what comes as it does at any other time.

use std::{
    num::NonZeroU32,
    time::{Duration, Instant},
};

use control::{ResetReport, RunsEnd, RunsReport, RunsRequest};

use crate::{controller::Reply, error::Error};

/// How often it is looked whether who asked still waits, where a run takes long.
const INTERVAL: Duration = Duration::from_millis(500);

/// Runs that are under way.
pub(crate) struct Runs {
    pub(crate) request: RunsRequest,
    pub(crate) reply: Reply<RunsReport>,
    /// The run that the guest is in.
    pub(crate) number: NonZeroU32,
    done: u32,
    begun: Instant,
    /// When the run began.
    since: Instant,
    dirty_pages: u64,
    reset_us: u64,
}

/// What comes after a run whose result was zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// The run of this number.
    Run(NonZeroU32),
    /// None: it was the last.
    Over,
}

/// Whether there are numbers for all runs.
pub(crate) fn check(request: &RunsRequest) -> Result<(), Error> {
    let last = request.first.checked_add(request.runs.get() - 1);
    last.map(drop).ok_or(Error::RunNumber)
}

impl Runs {
    /// Of which the first is to begin. For the request there was a [`check`].
    pub(crate) fn new(request: RunsRequest, reply: Reply<RunsReport>) -> Self {
        let now = Instant::now();
        Self {
            number: request.first,
            request,
            reply,
            done: 0,
            begun: now,
            since: now,
            dirty_pages: 0,
            reset_us: 0,
        }
    }

    /// What comes if the run that the guest is in is one of result zero.
    pub(crate) fn next(&self) -> Next {
        match self.number.checked_add(1) {
            Some(number) if self.done < self.request.runs.get() - 1 => Next::Run(number),
            _ => Next::Over,
        }
    }

    /// Counts the run that the guest was in, once the machine was reset as `report` says.
    pub(crate) fn count(&mut self, report: ResetReport) {
        self.done += 1;
        self.dirty_pages += report.dirty_pages;
        self.reset_us += report.total_us;
    }

    /// The guest has been let go, in the run `number`.
    pub(crate) fn begin(&mut self, number: NonZeroU32) {
        self.number = number;
        self.since = Instant::now();
    }

    /// How long nothing need be looked at.
    pub(crate) fn patience(&self) -> Duration {
        let left = self
            .limit()
            .map(|limit| limit.saturating_sub(self.since.elapsed()));
        left.map_or(INTERVAL, |left| left.min(INTERVAL))
    }

    /// Whether to end them now, and how that is called: the run takes too long, or nobody waits for them any more.
    pub(crate) fn look(&self) -> Option<RunsEnd> {
        if self.reply.is_closed() {
            return Some(RunsEnd::Interrupted);
        }
        let limit = self.limit()?;
        (self.since.elapsed() >= limit).then_some(RunsEnd::Limit)
    }

    fn limit(&self) -> Option<Duration> {
        let limit = self.request.run_limit_ms?;
        Some(Duration::from_millis(limit.get()))
    }

    /// What is said of them when they end so, the run that was the last with this result.
    pub(crate) fn report(&self, ended: RunsEnd, result: Option<u32>) -> RunsReport {
        RunsReport {
            done: self.done,
            ended,
            last: self.number,
            result,
            dirty_pages: self.dirty_pages,
            reset_us: self.reset_us,
            total_us: self.begun.elapsed().as_micros() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use control::{Failure, GuestClock};
    use tokio::sync::oneshot::{self, Receiver};

    use super::*;

    type Answer = Receiver<Result<RunsReport, Failure>>;

    fn request(runs: u32, first: u32) -> RunsRequest {
        RunsRequest {
            runs: NonZeroU32::new(runs).unwrap(),
            first: NonZeroU32::new(first).unwrap(),
            run_limit_ms: None,
            clock: GuestClock::StandStill,
        }
    }

    fn runs(runs: u32, first: u32) -> (Runs, Answer) {
        let (reply, answer) = oneshot::channel();
        (Runs::new(request(runs, first), reply), answer)
    }

    const UNDONE: ResetReport = ResetReport {
        dirty_pages: 64,
        total_us: 100,
    };

    #[test]
    fn so_many_runs_follow_each_other_and_no_more() {
        let (mut runs, _answer) = runs(3, 7);
        for number in [8, 9] {
            let number = NonZeroU32::new(number).unwrap();
            assert_eq!(runs.next(), Next::Run(number));
            runs.count(UNDONE);
            runs.begin(number);
        }
        assert_eq!(runs.next(), Next::Over);
        runs.count(UNDONE);
        let report = runs.report(RunsEnd::AllDone, Some(0));
        assert_eq!((report.done, report.last.get()), (3, 9));
        assert_eq!((report.dirty_pages, report.reset_us), (192, 300));
    }

    #[test]
    fn runs_whose_numbers_would_wrap_are_refused() {
        assert!(matches!(
            check(&request(2, u32::MAX)),
            Err(Error::RunNumber)
        ));
        check(&request(1, u32::MAX)).unwrap();
        assert_eq!(runs(1, u32::MAX).0.next(), Next::Over);
    }

    #[test]
    fn they_end_at_the_limit_and_when_nobody_waits() {
        let (mut runs, answer) = runs(2, 1);
        assert_eq!((runs.look(), runs.patience()), (None, INTERVAL));
        runs.request.run_limit_ms = std::num::NonZeroU64::new(60_000);
        assert_eq!((runs.look(), runs.patience()), (None, INTERVAL));
        runs.since = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
        assert_eq!(
            (runs.look(), runs.patience()),
            (Some(RunsEnd::Limit), Duration::ZERO)
        );
        drop(answer);
        assert_eq!(runs.look(), Some(RunsEnd::Interrupted));
    }
}
