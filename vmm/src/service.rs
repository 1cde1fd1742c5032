//! The control service: admits requests and hands them to the controller.

use std::{
    sync::{Arc, mpsc::Sender},
    time::Instant,
};

use control::{
    BalloonChange, BalloonStatus, DiskChange, DiskStatus, Failure, FailureKind, GuestClock,
    MachineState, Metric, ResetReport, RunsReport, RunsRequest, SnapshotReport, SnapshotRequest,
    Status, Vmm,
};
use tarpc::context::Context;
use tokio::sync::oneshot;

use crate::{
    balloons,
    controller::{Event, Reply, Request},
    error::Error,
    lifecycle::{self, Lifecycle, Refused},
    machine::Counters,
    metrics::{arriving_metrics, saving_metrics},
    runs,
};

/// What every connection's requests are answered from.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) events: Sender<Event>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u64,
    pub(crate) begun: Instant,
}

impl Service {
    /// Has the controller carry out a request that has been admitted.
    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        let sent = self.events.send(Event::Client(request(reply)));
        match (sent, answer.await) {
            (Ok(()), Ok(result)) => result,
            // The controller has ended, and drops what it has not got to.
            _ => Err(Refused::Ended.into()),
        }
    }

    fn admit(&self, event: lifecycle::Event) -> Result<(), Failure> {
        self.lifecycle.apply(event)?;
        Ok(())
    }
}

impl Vmm for Service {
    async fn status(self, _: Context) -> Status {
        Status {
            pid: std::process::id(),
            release: crate::RELEASE.to_owned(),
            state: self.lifecycle.state(),
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            uptime_ms: self.begun.elapsed().as_millis() as u64,
            disks: self.counters.devices.disks(),
            lost_memory: self.counters.lost().map(|lost| lost.to_string()),
        }
    }

    async fn pause(self, _: Context) -> Result<(), Failure> {
        self.admit(lifecycle::Event::Pause)?;
        self.ask(Request::Pause).await
    }

    async fn resume(self, _: Context, clock: GuestClock) -> Result<(), Failure> {
        self.admit(lifecycle::Event::Resume)?;
        self.ask(|reply| Request::Resume(clock, reply)).await
    }

    async fn reset(self, _: Context, clock: GuestClock) -> Result<ResetReport, Failure> {
        self.admit(lifecycle::Event::Change)?;
        self.ask(|reply| Request::Reset(clock, reply)).await
    }

    async fn runs(self, _: Context, request: RunsRequest) -> Result<RunsReport, Failure> {
        // First, for what is refused changes nothing.
        runs::check(&request)?;
        // Whether it runs now or not.
        self.admit(lifecycle::Event::Resume)?;
        self.ask(|reply| Request::Runs(request, reply)).await
    }

    async fn snapshot(
        self,
        _: Context,
        request: SnapshotRequest,
    ) -> Result<SnapshotReport, Failure> {
        if !request.to.is_absolute() {
            return Err(Failure {
                kind: FailureKind::BadRequest,
                message: "the paths of a snapshot must be absolute".to_owned(),
            });
        }
        self.admit(lifecycle::Event::Save)?;
        // Before anybody can cancel this one: nothing else is asked for on this thread before something is awaited.
        self.counters.saving.restart(request.bytes_per_second);
        self.ask(|reply| Request::Snapshot(request, reply)).await
    }

    async fn cancel_snapshot(self, _: Context) -> Result<(), Failure> {
        if self.lifecycle.state() != MachineState::Saving {
            return Err(Refused::NoSnapshot.into());
        }
        match self.counters.saving.cancel() {
            true => Ok(()),
            false => Err(Refused::Completing.into()),
        }
    }

    async fn change_disk(
        self,
        _: Context,
        disk: u32,
        change: DiskChange,
    ) -> Result<DiskStatus, Failure> {
        if change == DiskChange::default() {
            return Err(Error::NothingToChange.into());
        }
        self.admit(lifecycle::Event::Change)?;
        self.ask(|reply| Request::ChangeDisk(disk, change, reply))
            .await
    }

    async fn stop(self, _: Context) -> Result<(), Failure> {
        // It is not to wait for a snapshot, but for one that is about to be complete.
        let _ = self.counters.saving.cancel();
        self.ask(Request::Stop).await
    }

    async fn balloon(self, _: Context, change: BalloonChange) -> Result<BalloonStatus, Failure> {
        let control = self.counters.devices.balloon.clone();
        let control = control.ok_or(Error::NoBalloon)?;
        balloons::change(&control, change, self.memory_mib)?;
        let runs = self.lifecycle.state() == MachineState::Running;
        // The guest may take its time, and others may ask for something else meanwhile.
        tokio::task::spawn_blocking(move || balloons::status(&control, runs))
            .await
            .map_err(|_| Refused::Ended.into())
    }

    async fn metrics(self, _: Context) -> Vec<Metric> {
        let Counters {
            exits,
            machine,
            devices,
            saving,
            arriving,
            arriving_disks,
        } = &*self.counters;
        let mut metrics = exits.metrics();
        metrics.extend(machine.metrics());
        metrics.extend(saving_metrics(saving.progress()));
        metrics.extend(arriving.iter().flat_map(arriving_metrics));
        metrics.extend(arriving_disks.metrics());
        metrics.extend(devices.metrics());
        metrics
    }
}
