//! The thread that owns the machine: one queue of events in, one thing done at a time.

use std::sync::{
    Arc,
    atomic::AtomicBool,
    mpsc::{Receiver, RecvTimeoutError, Sender},
};

use control::{
    AfterSnapshot, Exit, Failure, GuestClock, ResetReport, SnapshotReport, SnapshotRequest,
};
use devices::GuestRequest;
use snapshot::Lost;
use tokio::sync::oneshot;

use crate::{
    error::Error,
    lifecycle::{self, Lifecycle},
    machine::Machine,
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
    /// The disk of this number is to have so many bytes.
    ResizeDisk(u32, u64, Reply<()>),
    /// It is to be what it was when it was made.
    Reset(GuestClock, Reply<ResetReport>),
    Stop(Reply<()>),
}

/// Everything that can happen to a machine from outside its controller.
#[derive(Debug)]
pub(crate) enum Event {
    Client(Request),
    Guest(GuestRequest),
    Vcpu(u32, VcpuEnd),
    /// Somebody in the machine waits for memory that cannot be had.
    Lost(Lost),
    /// All of the memory has come that the snapshot of this round waited for, or cannot.
    Arrived(u64, Result<(), Lost>),
}

/// The machine's owner.
pub(crate) struct Controller {
    pub(crate) machine: Machine,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) events: Receiver<Event>,
    /// The other end of `events`.
    pub(crate) teller: Sender<Event>,
    /// A snapshot that is to be taken as soon as all memory is there.
    pub(crate) waiting: Option<Waiting>,
    /// How many have waited so.
    pub(crate) rounds: u64,
    /// Set once the guest has ended itself, also while that waits in the queue.
    pub(crate) ending: Arc<AtomicBool>,
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
                Err(RecvTimeoutError::Timeout) => self.look_whether_to_wait(),
                // Nobody is left who could ask for anything; the guest alone goes on.
                Err(RecvTimeoutError::Disconnected) => break Exit::Failed,
            }
        };
        // Requests that came too late are dropped with their replies, which says so to the clients.
        exit
    }

    fn next_event(&self) -> Result<Event, RecvTimeoutError> {
        match &self.waiting {
            None => Ok(self.events.recv()?),
            Some(_) => self.events.recv_timeout(waiting::INTERVAL),
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Client(Request::Pause(reply)) => self.pause(reply),
            Event::Client(Request::Resume(clock, reply)) => self.resume(clock, reply),
            Event::Client(Request::Snapshot(request, reply)) => {
                if self.machine.counters().is_memory_missing() {
                    self.wait_for_memory(request, reply);
                } else {
                    self.snapshot(&request, reply);
                }
            }
            Event::Arrived(round, came) => self.arrived(round, came),
            Event::Lost(lost) => self.stall(&lost),
            Event::Client(Request::ResizeDisk(index, bytes, reply)) => {
                let resized = self.machine.counters().devices.resize_disk(index, bytes);
                match &resized {
                    Ok(()) => tracing::info!(disk = index, bytes, "a disk has grown"),
                    Err(error) => {
                        tracing::warn!(disk = index, bytes, %error, "a disk has not grown")
                    }
                }
                answer(reply, resized.map_err(Failure::from));
            }
            Event::Client(Request::Reset(clock, reply)) => self.reset(clock, reply),
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
        answer(reply, paused.map_err(|error| self.pause_failed(error)));
    }

    fn resume(&mut self, clock: GuestClock, reply: Reply<()>) {
        let retried = self.machine.retry().map_err(Error::from);
        let resumed = retried.and_then(|()| self.machine.run(clock));
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
        let answered = reset.map_err(|error| match self.machine.is_lost() {
            true => self.lost(error),
            false => {
                tracing::warn!("the machine is not reset: {error}");
                error.into()
            }
        });
        answer(reply, answered);
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

    fn wait_for_memory(&mut self, request: SnapshotRequest, reply: Reply<SnapshotReport>) {
        self.rounds += 1;
        let counters = self.machine.counters();
        match waiting::bring_all(self.rounds, counters, &self.teller) {
            Ok(()) => {
                let come = counters.come();
                self.waiting = Some(Waiting::new(self.rounds, request, reply, come));
            }
            Err(error) => self.snapshot_failed(error, self.machine.is_running(), reply),
        }
    }

    fn arrived(&mut self, round: u64, came: Result<(), Lost>) {
        let Some(waiting) = self.waiting.take_if(|waiting| waiting.round == round) else {
            return;
        };
        let Waiting { request, reply, .. } = waiting;
        match came {
            Ok(()) => self.snapshot(&request, reply),
            Err(lost) => self.snapshot_failed(lost.into(), self.machine.is_running(), reply),
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
        tracing::warn!("the snapshot failed: {error}");
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
