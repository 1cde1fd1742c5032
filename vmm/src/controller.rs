//! The thread that owns the machine: one queue of events in, one thing done at a time.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
    mpsc::{Receiver, RecvTimeoutError, Sender},
};

use control::{
    AfterSnapshot, DiskChange, DiskStatus, Exit, Failure, GuestClock, ResetReport, RunsEnd,
    RunsReport, RunsRequest, SnapshotReport, SnapshotRequest,
};
use devices::GuestRequest;
use snapshot::Lost;
use tokio::sync::oneshot;

use crate::{
    error::Error,
    lifecycle::{self, Lifecycle},
    machine::Machine,
    runs::{Next, Runs},
    save,
    vcpu::VcpuEnd,
    waiting::{self, Waiting},
};

/// Where the answer to a request goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Failure>>;

/// What a client wants. Each has been admitted by the [`Lifecycle`] before it is queued.
#[derive(Debug)]
pub(crate) enum Request {
    Pause(Reply<()>),
    Resume(GuestClock, Reply<()>),
    Snapshot(SnapshotRequest, Reply<SnapshotReport>),
    /// The disk of this number is to be another than it was.
    ChangeDisk(u32, DiskChange, Reply<DiskStatus>),
    /// It is to be what it was when it was made.
    Reset(GuestClock, Reply<ResetReport>),
    /// It is to be that and run, over and over.
    Runs(RunsRequest, Reply<RunsReport>),
    Stop(Reply<()>),
}

/// Everything that can happen to a machine from outside its controller.
#[derive(Debug)]
pub(crate) enum Event {
    Client(Request),
    Guest(GuestRequest),
    Vcpu(u32, VcpuEnd),
    /// A vCPU has come back because a run is done.
    Parked,
    /// Somebody in the machine waits for memory that cannot be had.
    Lost(Lost),
    /// All has come that the snapshot of this round waited for, or cannot.
    Arrived(u64, Result<(), Error>),
}

/// The machine's owner.
pub(crate) struct Controller {
    pub(crate) machine: Machine,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) events: Receiver<Event>,
    /// The other end of `events`.
    pub(crate) teller: Sender<Event>,
    /// A snapshot that is to be taken as soon as all memory and disks are there.
    pub(crate) waiting: Option<Waiting>,
    /// How many have waited so.
    pub(crate) rounds: u64,
    /// Runs of the guest that are under way.
    pub(crate) runs: Option<Runs>,
    /// Set once the guest has ended itself, also while that waits in the queue.
    pub(crate) ending: Arc<AtomicBool>,
    /// Set while [`Event::Parked`] waits in the queue.
    pub(crate) parked: Arc<AtomicBool>,
}

impl Controller {
    /// Does what is asked until the machine ends; returns how it did.
    pub(crate) fn run(mut self) -> Exit {
        // Requests wait in the queue meanwhile, and the guest runs.
        if let Err(error) = self.machine.settle() {
            tracing::warn!(
                "a guest that uses the interval timer may see ticks in a burst: {error}"
            );
        }
        let exit = loop {
            if let Some(exit) = self.lifecycle.ended() {
                break exit;
            }
            match self.next_event() {
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => {
                    self.look_whether_to_wait();
                    self.look_at_runs();
                }
                // Nobody is left who could ask for anything; the guest alone goes on.
                Err(RecvTimeoutError::Disconnected) => break Exit::Failed,
            }
        };
        // Requests that came too late are dropped with their replies, which says so to the clients; before the machine, whose end may take a
        // while.
        let Self {
            machine,
            events,
            waiting,
            runs,
            ..
        } = self;
        drop((events, waiting, runs));
        drop(machine);
        exit
    }

    fn next_event(&self) -> Result<Event, RecvTimeoutError> {
        let waiting = self.waiting.as_ref().map(|_| waiting::INTERVAL);
        let runs = self.runs.as_ref().map(Runs::patience);
        match waiting.into_iter().chain(runs).min() {
            None => Ok(self.events.recv()?),
            Some(patience) => self.events.recv_timeout(patience),
        }
    }

    fn handle(&mut self, event: Event) {
        match &event {
            Event::Parked | Event::Arrived(..) => {}
            Event::Client(_) | Event::Lost(_) => self.end_runs(RunsEnd::Interrupted),
            Event::Guest(_) | Event::Vcpu(..) => self.end_runs(RunsEnd::Ended),
        }
        match event {
            Event::Client(Request::Pause(reply)) => self.pause(reply),
            Event::Client(Request::Resume(clock, reply)) => self.resume(clock, reply),
            Event::Client(Request::Snapshot(request, reply)) => {
                if self.machine.counters().is_any_missing() {
                    self.wait_for_all(request, reply);
                } else {
                    self.snapshot(&request, reply);
                }
            }
            Event::Arrived(round, came) => self.arrived(round, came),
            Event::Lost(lost) => self.stall(&lost),
            Event::Client(Request::ChangeDisk(index, change, reply)) => {
                let counters = self.machine.counters();
                // A request of the guest's may wait for memory that does not come, and the disk's new size for that request. A layer does
                // not end above one that is not here.
                let changed = match change.bytes {
                    Some(_) if counters.is_any_missing() => Err(Error::GrowsLater),
                    _ => counters.devices.change_disk(index, change),
                };
                match &changed {
                    Ok(now) => tracing::info!(disk = index, ?now, "a disk has changed"),
                    Err(error) => {
                        tracing::warn!(
                            disk = index,
                            ?change,
                            error = error.with_causes(),
                            "a disk has not changed"
                        )
                    }
                }
                answer(reply, changed.map_err(Failure::from));
            }
            Event::Client(Request::Reset(clock, reply)) => self.reset(clock, reply),
            Event::Client(Request::Runs(request, reply)) => self.begin_runs(request, reply),
            Event::Parked => self.parked(),
            Event::Client(Request::Stop(reply)) => {
                self.end(Exit::Stopped);
                answer(reply, Ok(()));
            }
            Event::Guest(GuestRequest::PowerOff) => self.end(Exit::PowerOff),
            Event::Guest(GuestRequest::Reset) => self.end(Exit::Reboot),
            Event::Vcpu(id, VcpuEnd::TripleFault) => {
                tracing::warn!(vcpu = id, "the guest had a triple fault");
                self.end(Exit::TripleFault);
            }
            Event::Vcpu(id, VcpuEnd::Failed(error)) => {
                tracing::error!(vcpu = id, "the guest cannot go on: {error}");
                self.end(Exit::Failed);
            }
            Event::Vcpu(id, VcpuEnd::Panicked) => {
                tracing::error!(vcpu = id, "a vCPU's thread panicked; please report this");
                self.end(Exit::Failed);
            }
        }
    }

    fn pause(&mut self, reply: Reply<()>) {
        // As far as it stands still, it does already.
        if self.machine.is_stalled() {
            answer(reply, Ok(()));
            return;
        }
        let paused = self.machine.hold().map(|held| held.keep());
        if paused.is_ok() {
            self.confirm(lifecycle::Event::Pause);
        }
        answer(reply, paused.map_err(|error| self.pause_failed(error)));
    }

    fn resume(&mut self, clock: GuestClock, reply: Reply<()>) {
        let retried = self.machine.retry().map_err(Error::from);
        let resumed = retried.and_then(|()| self.machine.run(clock));
        if resumed.is_ok() {
            self.confirm(lifecycle::Event::Resume);
        }
        let answered = resumed.map_err(|error| match error {
            Error::Lost(_) => {
                if !self.machine.is_running() {
                    self.apply(lifecycle::Event::Stalled);
                }
                error.into()
            }
            error if self.machine.is_stalled() => {
                self.apply(lifecycle::Event::Stalled);
                error.into()
            }
            error => self.lost(error),
        });
        answer(reply, answered);
    }

    fn reset(&mut self, clock: GuestClock, reply: Reply<ResetReport>) {
        let reset = self.machine.reset(clock, &self.ending);
        let answered = reset.map_err(|error| self.reset_failed(error));
        answer(reply, answered);
    }

    fn reset_failed(&self, error: Error) -> Failure {
        if self.machine.is_lost() {
            return self.lost(error);
        }
        tracing::warn!("the machine is not reset: {}", error.with_causes());
        error.into()
    }

    fn begin_runs(&mut self, request: RunsRequest, reply: Reply<RunsReport>) {
        let (first, clock) = (request.first, request.clock);
        let mut runs = Runs::new(request, reply);
        match self.machine.reset_to_run(first, clock, &self.ending) {
            Ok(_) => {
                runs.begin(first);
                self.confirm(lifecycle::Event::Resume);
                self.runs = Some(runs);
            }
            Err(error) => {
                if !self.machine.is_running() {
                    // It was admitted as one that would.
                    self.apply(lifecycle::Event::Stalled);
                }
                answer(runs.reply, Err(self.reset_failed(error)));
            }
        }
    }

    /// A vCPU has come back because a run is done: has the next begin, or ends them.
    fn parked(&mut self) {
        // Before anything is looked at: whoever parks from here on tells of it.
        self.parked.store(false, Ordering::SeqCst);
        let result = self.machine.counters().devices.run.result();
        match (self.runs.take(), result) {
            (Some(runs), Some(0)) if !runs.reply.is_closed() => self.next_run(runs),
            (Some(runs), Some(0)) => self.hold_runs(runs, RunsEnd::Interrupted),
            (Some(runs), Some(_)) => self.hold_runs(runs, RunsEnd::Result),
            // Of the run before, whose vCPUs have all been told what to do.
            (Some(runs), None) => self.runs = Some(runs),
            // They had ended before it came back.
            (None, _) => self.let_go_on(),
        }
    }

    /// Has the guest, whose run is done and has come to nothing, begin the next, or be held if that was the last.
    fn next_run(&mut self, mut runs: Runs) {
        let next = runs.next();
        let reset = match next {
            Next::Run(number) => {
                let clock = runs.request.clock;
                self.machine.reset_to_run(number, clock, &self.ending)
            }
            Next::Over => self.machine.reset_to_hold(&self.ending),
        };
        match (reset, next) {
            (Ok(report), Next::Run(number)) => {
                runs.count(report);
                runs.begin(number);
                self.runs = Some(runs);
            }
            (Ok(report), Next::Over) => {
                runs.count(report);
                self.runs_over(runs, RunsEnd::AllDone);
            }
            // Which is behind this in the queue.
            (Err(Error::GuestEnds), _) => self.runs = Some(runs),
            (Err(error), _) => {
                let failure = self.reset_failed(error);
                self.machine.counters().devices.run.end();
                answer(runs.reply, Err(failure));
                if !self.machine.is_lost() {
                    self.let_go_on();
                }
            }
        }
    }

    /// Has no vCPU wait for runs that have ended.
    fn let_go_on(&mut self) {
        if let Err(error) = self.machine.unpark() {
            self.lost(error);
        }
    }

    fn look_at_runs(&mut self) {
        let ended = self.runs.as_ref().and_then(Runs::look);
        if let Some((ended, runs)) = ended.and_then(|ended| Some((ended, self.runs.take()?))) {
            self.hold_runs(runs, ended);
        }
    }

    /// Ends runs that are under way, and holds the machine where it is.
    fn hold_runs(&mut self, runs: Runs, ended: RunsEnd) {
        match self.machine.hold().map(|held| held.keep()) {
            Ok(()) => self.runs_over(runs, ended),
            Err(error) => {
                self.machine.counters().devices.run.end();
                answer(runs.reply, Err(self.pause_failed(error)));
            }
        }
    }

    /// Tells of runs that have ended with a machine that is held.
    fn runs_over(&mut self, runs: Runs, ended: RunsEnd) {
        // Before it is told: who asked may ask next what the machine does.
        self.apply(lifecycle::Event::Stalled);
        self.runs = Some(runs);
        self.end_runs(ended);
    }

    /// Ends runs that are under way, if any are, and leaves the machine as it is.
    fn end_runs(&mut self, ended: RunsEnd) {
        let Some(runs) = self.runs.take() else {
            return;
        };
        let run = &self.machine.counters().devices.run;
        let report = runs.report(ended, run.result());
        // What the guest says from here on is not heard.
        run.end();
        tracing::info!(
            ?ended,
            done = report.done,
            last = report.last,
            "runs have ended"
        );
        answer(runs.reply, Ok(report));
    }

    /// Holds the machine, in which somebody waits for a page that cannot be had.
    fn stall(&mut self, lost: &Lost) {
        // It has been had since.
        if self.machine.counters().lost().is_none() {
            return;
        }
        tracing::error!("the machine stands still: {lost}");
        self.machine.stall();
        self.apply(lifecycle::Event::Stalled);
    }

    fn wait_for_all(&mut self, request: SnapshotRequest, reply: Reply<SnapshotReport>) {
        self.rounds += 1;
        let counters = self.machine.counters();
        let machine = self.machine.wanted();
        let waits = Arc::new(());
        let waited_for = Arc::downgrade(&waits);
        let wanted = move || machine() && waited_for.strong_count() > 0;
        match waiting::bring_all(self.rounds, counters, wanted, &self.teller) {
            Ok(()) => {
                let come = counters.come();
                self.waiting = Some(Waiting::new(self.rounds, request, reply, waits, come));
            }
            Err(error) => self.snapshot_failed(error, self.machine.is_running(), reply),
        }
    }

    fn arrived(&mut self, round: u64, came: Result<(), Error>) {
        let Some(waiting) = self.waiting.take_if(|waiting| waiting.round == round) else {
            return;
        };
        let Waiting { request, reply, .. } = waiting;
        match came {
            Ok(()) => self.snapshot(&request, reply),
            Err(error) => self.snapshot_failed(error, self.machine.is_running(), reply),
        }
    }

    fn look_whether_to_wait(&mut self) {
        let Some(mut waiting) = self.waiting.take() else {
            return;
        };
        let counters = self.machine.counters();
        let looked = match counters.saving.is_cancelled() {
            true => Err(Error::Cancelled),
            false => waiting.look(counters.come()),
        };
        match looked {
            Ok(()) => self.waiting = Some(waiting),
            Err(error) => {
                self.snapshot_failed(error, self.machine.is_running(), waiting.reply);
            }
        }
    }

    fn pause_failed(&self, error: Error) -> Failure {
        if self.machine.is_lost() || !self.machine.is_running() {
            return self.lost(error);
        }
        tracing::error!("the machine cannot be paused and runs on: {error}");
        self.apply(lifecycle::Event::PauseFailed);
        error.into()
    }

    /// A machine that does not go on when it should is in no known state.
    fn lost(&self, error: Error) -> Failure {
        tracing::error!("the machine cannot go on: {error}");
        self.end(Exit::Failed);
        error.into()
    }

    #[tracing::instrument(skip_all, fields(to = ?request.to))]
    fn snapshot(&mut self, request: &SnapshotRequest, reply: Reply<SnapshotReport>) {
        let counts = Arc::clone(self.machine.counters());
        let ran = self.machine.is_running();
        match save::take_snapshot(&mut self.machine, &self.ending, request) {
            Ok(report) => {
                counts.machine.snapshots.add(1);
                counts.machine.last_downtime_us.set(report.downtime_us);
                tracing::info!(
                    id = report.id,
                    downtime_us = report.downtime_us,
                    total_us = report.total_us,
                    written_bytes = report.written_bytes,
                    "the snapshot is complete"
                );
                self.apply(match request.then {
                    AfterSnapshot::Halt => lifecycle::Event::End(Exit::Halted),
                    AfterSnapshot::Resume(_) | AfterSnapshot::AsBefore(_) => {
                        let running = self.machine.is_running();
                        lifecycle::Event::Saved { running }
                    }
                });
                answer(reply, Ok(report));
            }
            Err(error) => self.snapshot_failed(error, ran, reply),
        }
    }

    fn snapshot_failed(&self, error: Error, ran: bool, reply: Reply<SnapshotReport>) {
        let counters = self.machine.counters();
        counters.machine.failed_snapshots.add(1);
        // Then that is why, whatever it looked like from within.
        let error = match (counters.saving.is_cancelled(), counters.saving.is_late()) {
            (true, _) => Error::Cancelled,
            (false, true) => Error::StandsTooLong,
            (false, false) => error,
        };
        tracing::warn!("the snapshot failed: {}", error.with_causes());
        let running = self.machine.is_running();
        if self.machine.is_lost() || (ran && !running) {
            answer(reply, Err(self.lost(error)));
            return;
        }
        self.apply(lifecycle::Event::SaveFailed { running });
        answer(reply, Err(error.into()));
    }

    fn end(&self, exit: Exit) {
        self.apply(lifecycle::Event::End(exit));
    }

    /// Has happen once more what was admitted: the machine may have been held by itself since, when its runs were over. While it is
    /// being saved, that says what it does.
    fn confirm(&self, event: lifecycle::Event) {
        let _ = self.lifecycle.apply(event);
    }

    fn apply(&self, event: lifecycle::Event) {
        if let Err(refused) = self.lifecycle.apply(event) {
            tracing::error!("the machine's state is not what it should be: {refused}");
        }
    }
}

fn answer<T>(reply: Reply<T>, result: Result<T, Failure>) {
    // A client that has gone away does not care.
    let _ = reply.send(result);
}
