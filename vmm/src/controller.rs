//! The thread that owns the machine: one queue of events in, one thing done at a time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Receiver,
    },
    time::Instant,
};

use control::{
    AfterSnapshot, Exit, Failure, GuestClock, SnapshotReport, SnapshotRequest, StoredReport,
};
use devices::GuestRequest;
use snapshot::Saved;
use tokio::sync::oneshot;

use crate::{
    disks,
    error::Error,
    lifecycle::{self, Lifecycle},
    machine::Machine,
    place,
    vcpu::VcpuEnd,
};

/// Where the answer to a request goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Failure>>;

/// What a client wants. Each has been admitted by the [`Lifecycle`] before it is queued.
#[derive(Debug)]
pub(crate) enum Request {
    Pause(Reply<()>),
    Resume(GuestClock, Reply<()>),
    Snapshot(SnapshotRequest, Reply<SnapshotReport>),
    Stop(Reply<()>),
}

/// Everything that can happen to a machine from outside its controller.
#[derive(Debug)]
pub(crate) enum Event {
    Client(Request),
    Guest(GuestRequest),
    Vcpu(u32, VcpuEnd),
}

/// The machine's owner.
pub(crate) struct Controller {
    pub(crate) machine: Machine,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) events: Receiver<Event>,
    /// Set once the guest has ended itself, also while that waits in the queue.
    pub(crate) ending: Arc<AtomicBool>,
}

impl Controller {
    /// Does what is asked until the machine ends; returns how it did.
    pub(crate) fn run(mut self) -> Exit {
        let exit = loop {
            if let Some(exit) = self.lifecycle.ended() {
                break exit;
            }
            match self.events.recv() {
                Ok(event) => self.handle(event),
                // Nobody is left who could ask for anything; the guest alone goes on.
                Err(_) => break Exit::Failed,
            }
        };
        // Requests that came too late are dropped with their replies, which says so to the clients.
        exit
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Client(Request::Pause(reply)) => {
                let paused = self.machine.hold().map(|held| held.keep());
                answer(reply, paused.map_err(|error| self.pause_failed(error)));
            }
            Event::Client(Request::Resume(clock, reply)) => {
                let running = self.machine.run(clock);
                answer(reply, running.map_err(|error| self.lost(error)));
            }
            Event::Client(Request::Snapshot(request, reply)) => self.snapshot(&request, reply),
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

    fn pause_failed(&self, error: Error) -> Failure {
        if !self.machine.is_running() {
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
        match take_snapshot(&mut self.machine, &self.ending, request) {
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
                self.apply(lifecycle::Event::Saved(request.then));
                answer(reply, Ok(report));
            }
            Err(error) => {
                counts.machine.failed_snapshots.add(1);
                tracing::warn!("the snapshot failed: {error}");
                let running = self.machine.is_running();
                if ran && !running {
                    answer(reply, Err(self.lost(error)));
                    return;
                }
                self.apply(lifecycle::Event::SaveFailed { running });
                answer(reply, Err(error.into()));
            }
        }
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

/// Saves `machine`. It stands still while its state and memory are copied, and goes on, if it is to,
/// while they are made durable: the disks first, so that no snapshot is there without them. When this
/// fails, a machine that ran runs on.
fn take_snapshot(
    machine: &mut Machine,
    ending: &AtomicBool,
    request: &SnapshotRequest,
) -> Result<SnapshotReport, Error> {
    let begun = Instant::now();
    let counters = Arc::clone(machine.counters());
    let parent = machine.stored_as.clone();
    counters.saving.begin(0);
    // Before the machine is held: a store that cannot be opened costs the guest nothing.
    let destination = place::OpenDestination::new(&request.to)?;
    let next_heads = disks::prepare(machine.disks())?;
    let mut held = machine.hold()?;
    // A guest that has switched itself off waits for its end, which is behind this in the queue.
    if ending.load(Ordering::SeqCst) {
        return Err(Error::GuestEnds);
    }
    let images = disks::writable_images(held.disks());
    let cuts = next_heads.cut(held.disks())?;
    let state = held.save(&cuts)?;
    let id = state.header.id.to_string();
    let unpublished = snapshot::write(
        destination.with_parent(parent.as_deref()),
        &state,
        held.memory(),
        &counters.saving,
    )?;
    let written = unpublished.written;
    let state_bytes = unpublished.state_bytes;
    let publish = || {
        disks::sync(&images)?;
        cuts.finish()?;
        Ok::<_, Error>(unpublished.publish()?)
    };
    let (downtime, saved) = match request.then {
        AfterSnapshot::Resume(clock) => {
            let downtime = held.stood_still();
            let gone_on = held.let_go(clock);
            // Also of a machine that cannot go on: then this is all that is left of it.
            let saved = publish()?;
            gone_on?;
            (downtime, saved)
        }
        AfterSnapshot::Halt => {
            let saved = publish()?;
            let downtime = held.stood_still();
            held.keep();
            (downtime, saved)
        }
    };
    let stored = saved.map(stored_report);
    if let Some(stored) = &stored {
        machine.stored_as = Some(stored.id.clone());
    }
    Ok(SnapshotReport {
        id,
        state_bytes,
        memory_bytes: written.memory_bytes,
        written_bytes: written.data_bytes,
        downtime_us: downtime.as_micros() as u64,
        total_us: begun.elapsed().as_micros() as u64,
        stored,
    })
}

fn stored_report(saved: Saved) -> StoredReport {
    StoredReport {
        id: saved.id.to_string(),
        new_bytes: saved.pack_bytes + saved.snapshot_bytes,
        name: saved.name,
    }
}

fn answer<T>(reply: Reply<T>, result: Result<T, Failure>) {
    // A client that has gone away does not care.
    let _ = reply.send(result);
}
