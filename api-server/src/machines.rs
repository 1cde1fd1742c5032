//! What the routes do.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use api_types::{
    Balloon, BalloonChange, CreateAnswer, CreateRequest, DeleteAnswer, DiskChange, DiskStatus,
    ErrorCode, GuestClock, Health, Metric, Reset, Runs, RunsRequest, Sent, Vm, VmState,
};
use control::{
    Client, ClientError, Confinement, Console, DiskConfig, LaunchSpec, Log, Origin, Prepare,
    Record, Registry, Secret, Shape, SnapshotReport, SnapshotRequest, Spawned, Stopped, spawn,
};
use futures::future::join_all;
use tokio::task::{JoinError, spawn_blocking};
use tracing::{Span, info, instrument, warn};

use crate::{
    ServerConfig, SetupError,
    children::{Children, why},
    describe::{
        balloon_of, console, describe, disk_of, origin, reset_of, runs_of, sent_of, status_of, text,
    },
    error::ApiError,
    forks::Forks,
    plan,
    tree::Tree,
};

/// How long after the loss of its connection a VMM is given to be reaped, so that the error can say how
/// it ended.
const REAP_BOUND: Duration = Duration::from_secs(2);

/// The machines of this host and user, and how to get more.
#[derive(Debug)]
pub(crate) struct Machines {
    pub(crate) config: Arc<ServerConfig>,
    pub(crate) tree: Arc<Tree>,
    pub(crate) registry: Registry,
    children: Children,
    pub(crate) forks: Forks,
    /// What those will be known by that are being launched. Held while the living are counted, so that the limit holds.
    launching: Mutex<Vec<Secret>>,
}

impl Machines {
    pub(crate) fn new(config: ServerConfig, tree: Tree) -> Result<Self, SetupError> {
        Ok(Self {
            forks: Forks::new(&config)?,
            registry: Registry::open(&config.run_dir)?,
            config: Arc::new(config),
            tree: Arc::new(tree),
            children: Children::default(),
            launching: Mutex::default(),
        })
    }

    /// Boots or restores a machine; returns once it runs.
    #[instrument(skip_all, fields(pid))]
    pub(crate) async fn create(&self, request: CreateRequest) -> Result<CreateAnswer, ApiError> {
        let (config, tree) = (self.config.clone(), self.tree.clone());
        // Paths may lie on slow file systems.
        let plan = spawn_blocking(move || plan::create(&config, &tree, &request))
            .await
            .map_err(broken)??;
        let admitted = self.admit(1)?;
        self.launch(plan, admitted.secrets[0].clone()).await
    }

    /// Counts `count` more launches, if there may be as many.
    pub(crate) fn admit(&self, count: usize) -> Result<Admitted<'_>, ApiError> {
        let mut launching = lock(&self.launching);
        let most = self.config.limits.vms;
        let mut living = self.registry.list()?;
        // One is written down before it is known here that it runs.
        living.retain(|record| !launching.contains(&record.secret));
        let now = living.len() + launching.len();
        if now + count > most {
            return Err(ApiError::new(
                ErrorCode::TooManyVms,
                format!("there are {now} VMs and may be {most}; end some with DELETE /vms/<pid>"),
            ));
        }
        let secrets = (0..count).map(|_| Secret::random());
        let secrets = secrets.collect::<io::Result<Vec<_>>>().map_err(host)?;
        launching.extend_from_slice(&secrets);
        Ok(Admitted {
            launching: &self.launching,
            secrets,
        })
    }

    /// What a state file may ask for: disks in the tree or the operator's own, and no more than a
    /// request could.
    pub(crate) fn confinement(&self) -> Confinement {
        let (defaults, limits) = (&self.config.defaults, &self.config.limits);
        let resolved = |disk: &DiskConfig| disk.path.canonicalize().ok();
        let mut disks: Vec<_> = defaults.disks.iter().filter_map(resolved).collect();
        disks.push(self.tree.resolved().to_owned());
        Confinement {
            disks,
            vcpus: limits.vcpus,
            memory_mib: limits.memory_mib,
        }
    }

    async fn launch(&self, plan: plan::Plan, secret: Secret) -> Result<CreateAnswer, ApiError> {
        let spec = LaunchSpec {
            hugepages: plan.hugepages,
            on_demand: plan.on_demand,
            working_set: plan.working_set,
            clock: plan.clock,
            net_changes: plan.net_changes,
            disk_directory: plan.disk_directory,
            ..self.spec(plan.origin, secret)?
        };
        let program = &self.config.vmm_binary;
        let limits = &self.config.limits;
        let bound = match spec.origin {
            Origin::Boot(_) => limits.launch,
            Origin::Restore(_) | Origin::Fork(_) => limits.restore,
        };
        let vmm = if spec.on_demand {
            let vmm = self.forks.pool.spawn(&spec, bound).await;
            if vmm.is_err() {
                self.make_up();
            }
            vmm?
        } else {
            spawn(program, &spec, Log::File, bound).await?
        };
        Span::current().record("pid", vmm.pid);
        for note in &plan.notes {
            warn!(note, "a request asked for more than there is");
        }
        let answer = self.adopt(&spec, vmm, plan.notes);
        info!(port = answer.port, "a VM runs");
        if spec.on_demand {
            self.prepare_another(answer.pid);
        }
        Ok(answer)
    }

    /// Has processes be prepared for machines as large as this one.
    fn prepare_another(&self, pid: u32) {
        // It may have ended by now.
        let Ok(Some(record)) = self.registry.find_pid(pid) else {
            return;
        };
        let shape = Shape {
            vcpus: record.vcpus,
            memory_mib: record.memory_mib,
        };
        let pool = Arc::clone(&self.forks.pool);
        tokio::spawn(async move { pool.fill(Prepare::Shape(shape)).await });
    }

    /// What every VMM is told that this server starts.
    pub(crate) fn spec(&self, origin: Origin, secret: Secret) -> Result<LaunchSpec, ApiError> {
        Ok(LaunchSpec {
            secret,
            origin,
            console: Console::File(self.registry.new_console().map_err(host)?),
            registry: self.registry.dir().to_owned(),
            hugepages: false,
            on_demand: false,
            working_set: control::UseWorkingSet::default(),
            paused: false,
            clock: control::GuestClock::default(),
            confinement: Some(self.confinement()),
            net_changes: Vec::new(),
            vsock_change: control::VsockChange::default(),
            disk_directory: None,
        })
    }

    /// Takes over a VMM that was told `spec` and runs; `notes` say what it was not told.
    pub(crate) fn adopt(
        &self,
        spec: &LaunchSpec,
        vmm: Spawned,
        notes: Vec<String>,
    ) -> CreateAnswer {
        let (pid, port) = (vmm.pid, vmm.port);
        let record = self.registry.find_pid(pid).unwrap_or_default();
        let vm = Vm {
            pid,
            port,
            state: VmState::Running,
            vcpus: record.as_ref().map(|record| record.vcpus),
            memory_mib: record.as_ref().map(|record| record.memory_mib),
            uptime_ms: None,
            release: None,
            lost_memory: None,
            disks: None,
            origin: origin(&spec.origin),
            console: console(&spec.console),
            log: text(&self.registry.log_of(pid)),
            notes,
            ended: None,
        };
        self.children.adopt(vm, vmm.child);
        CreateAnswer { pid, port }
    }

    /// Saves a machine; returns once both files are durable.
    #[instrument(skip_all, fields(port = request.rpc_port, pid))]
    pub(crate) async fn snapshot(
        &self,
        request: api_types::SnapshotRequest,
    ) -> Result<(), ApiError> {
        let port = request.rpc_port;
        let (config, tree) = (self.config.clone(), self.tree.clone());
        let plan = spawn_blocking(move || plan::snapshot(&config, &tree, &request))
            .await
            .map_err(broken)??;
        let record = self.registry.find_port(port)?.ok_or_else(|| {
            ApiError::new(
                ErrorCode::NotFound,
                format!("no VM has port {port}; GET /vms lists them"),
            )
        })?;
        Span::current().record("pid", record.process.pid);
        self.save(&record, plan).await.map(drop)
    }

    /// Saves a machine on another host; returns once it is durable there.
    #[instrument(skip_all, fields(pid, peer = request.peer))]
    pub(crate) async fn send(
        &self,
        pid: u32,
        request: api_types::SendRequest,
    ) -> Result<Sent, ApiError> {
        let plan = plan::send(&self.config, &request)?;
        let record = self.record(pid)?;
        let sent = sent_of(self.save(&record, plan).await?);
        sent.ok_or_else(|| {
            let message = "the VMM does not say what became of the snapshot; use one release";
            ApiError::new(ErrorCode::Internal, message)
        })
    }

    async fn save(
        &self,
        record: &Record,
        plan: SnapshotRequest,
    ) -> Result<SnapshotReport, ApiError> {
        let then = plan.then;
        // It owns its client, which the VMM waits for.
        let saving = async {
            match self.connect(record).await?.snapshot(plan).await {
                Err(ClientError::Lost(_)) => Err(self.lost(record.process.pid).await),
                answer => Ok(answer?),
            }
        };
        let report = control::saved(record, then, saving).await?;
        info!(?report, "a snapshot was taken");
        Ok(report)
    }

    /// The error for a VMM that went away while it saved its machine.
    async fn lost(&self, pid: u32) -> ApiError {
        let how = match self.children.ended_within(pid, REAP_BOUND).await {
            Some(Vm {
                ended: Some(ended), ..
            }) => why(&ended),
            _ => "its VMM went away".to_owned(),
        };
        let log = self.registry.log_of(pid);
        ApiError::new(
            ErrorCode::VmmLost,
            format!(
                "VM {pid} was lost before its snapshot was complete: {how}; nothing was confirmed \
                 as saved, and {} may say more",
                log.display()
            ),
        )
    }

    /// The machines that live.
    pub(crate) async fn list(&self) -> Result<Vec<Vm>, ApiError> {
        let records = self.registry.list()?;
        Ok(join_all(records.iter().map(|record| self.living(record))).await)
    }

    /// One machine, also when it has ended not long ago.
    pub(crate) async fn get(&self, pid: u32) -> Result<Vm, ApiError> {
        if let Some(record) = self.registry.find_pid(pid)? {
            return Ok(self.living(&record).await);
        }
        let ended = if self.children.lives(pid) {
            // It has just left the registry and is on its way to be reaped.
            self.children.ended_within(pid, REAP_BOUND).await
        } else {
            self.children.ended(pid)
        };
        ended.ok_or_else(|| unknown(pid))
    }

    async fn living(&self, record: &Record) -> Vm {
        let status = status_of(record).await;
        Vm {
            notes: self.children.notes(record.process.pid),
            ..describe(&self.registry, record, status)
        }
    }

    /// Cancels the snapshot that is being taken of a machine.
    #[instrument(skip(self))]
    pub(crate) async fn cancel_snapshot(&self, pid: u32) -> Result<Vm, ApiError> {
        let record = self.record(pid)?;
        self.connect(&record).await?.cancel_snapshot().await?;
        Ok(self.living(&record).await)
    }

    /// Holds a machine.
    #[instrument(skip(self))]
    pub(crate) async fn pause(&self, pid: u32) -> Result<Vm, ApiError> {
        let record = self.record(pid)?;
        self.connect(&record).await?.pause().await?;
        Ok(self.living(&record).await)
    }

    /// Lets a machine go on that is held.
    #[instrument(skip(self))]
    pub(crate) async fn resume(&self, pid: u32, clock: GuestClock) -> Result<Vm, ApiError> {
        let record = self.record(pid)?;
        let clock = plan::guest_clock(clock);
        self.connect(&record).await?.resume(clock).await?;
        Ok(self.living(&record).await)
    }

    /// Has a machine be what it was when it was made.
    #[instrument(skip(self))]
    pub(crate) async fn reset(&self, pid: u32, clock: GuestClock) -> Result<Reset, ApiError> {
        let record = self.record(pid)?;
        let clock = plan::guest_clock(clock);
        let report = self.connect(&record).await?.reset(clock).await?;
        Ok(reset_of(report))
    }

    /// Has a machine run from where it was made, over and over.
    #[instrument(skip(self))]
    pub(crate) async fn runs(&self, pid: u32, request: RunsRequest) -> Result<Runs, ApiError> {
        let request = plan::runs(request)?;
        let record = self.record(pid)?;
        let report = self.connect(&record).await?.runs(request).await?;
        Ok(runs_of(report))
    }

    /// Changes a disk of a machine, and says what it is then.
    #[instrument(skip(self))]
    pub(crate) async fn change_disk(
        &self,
        pid: u32,
        disk: u32,
        change: DiskChange,
    ) -> Result<DiskStatus, ApiError> {
        let client = self.connect(&self.record(pid)?).await?;
        let change = plan::disk_change(change);
        Ok(disk_of(client.change_disk(disk, change).await?))
    }

    /// Ends a machine; returns once its process is gone.
    #[instrument(skip(self))]
    pub(crate) async fn delete(&self, pid: u32) -> Result<DeleteAnswer, ApiError> {
        let record = self.record(pid)?;
        let stopped = control::stop(&record, self.config.limits.stop)
            .await
            .map_err(|e| ApiError::new(ErrorCode::Internal, e.to_string()))?;
        info!(?stopped, "a VM was ended");
        Ok(DeleteAnswer {
            pid,
            killed: stopped == Stopped::Killed,
        })
    }

    /// The counters of a machine.
    pub(crate) async fn metrics(&self, pid: u32) -> Result<Vec<Metric>, ApiError> {
        let client = self.connect(&self.record(pid)?).await?;
        let metrics = client.metrics().await?.into_iter();
        Ok(metrics
            .map(|metric| Metric {
                name: metric.name,
                labels: metric.label.into_iter().collect(),
                value: metric.value,
            })
            .collect())
    }

    /// Changes a machine's balloon, if anything is to change, and says how it stands with it.
    #[instrument(skip(self))]
    pub(crate) async fn balloon(
        &self,
        pid: u32,
        change: BalloonChange,
    ) -> Result<Balloon, ApiError> {
        let client = self.connect(&self.record(pid)?).await?;
        let BalloonChange {
            target_mib,
            statistics_interval_s,
        } = change;
        let change = control::BalloonChange {
            target_mib,
            statistics_interval_s,
        };
        Ok(balloon_of(client.balloon(change).await?))
    }

    /// Whether the server can do its work.
    pub(crate) fn health(&self) -> Result<Health, ApiError> {
        if let Some(store) = &self.config.store
            && let Err(error) = std::fs::File::open(store.directory.join("config"))
        {
            let directory = store.directory.display();
            return Err(ApiError::new(
                ErrorCode::Internal,
                format!("the store {directory} cannot be read: {error}; bring it back"),
            ));
        }
        Ok(Health {
            release: env!("CARGO_PKG_VERSION").to_owned(),
            vms: self.registry.list()?.len(),
        })
    }

    /// The record of a machine that lives.
    pub(crate) fn record(&self, pid: u32) -> Result<Record, ApiError> {
        if let Some(record) = self.registry.find_pid(pid)? {
            return Ok(record);
        }
        Err(gone(pid, self.children.ended(pid)))
    }

    /// A client of a machine, or what has become of that.
    async fn connect(&self, record: &Record) -> Result<Client, ApiError> {
        let pid = record.process.pid;
        match Client::connect(record.port, &record.secret).await {
            // It was just about to end, still written down and not listening any more.
            Err(ClientError::Connect { .. }) if ends(record).await => {
                let ended = match self.children.lives(pid) {
                    true => self.children.ended_within(pid, REAP_BOUND).await,
                    false => self.children.ended(pid),
                };
                Err(gone(pid, ended))
            }
            connected => Ok(connected?),
        }
    }
}

/// Whether the process of a machine has ended, or does so while it is looked.
async fn ends(record: &Record) -> bool {
    match record.process.open() {
        Ok(None) => true,
        Ok(Some(process)) => process.ended_within(REAP_BOUND).await.unwrap_or_default(),
        Err(_) => false,
    }
}

/// Launches that count against the limit until this is dropped.
pub(crate) struct Admitted<'a> {
    launching: &'a Mutex<Vec<Secret>>,
    /// Of each its own.
    pub(crate) secrets: Vec<Secret>,
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        lock(self.launching).retain(|secret| !self.secrets.contains(secret));
    }
}

fn lock(launching: &Mutex<Vec<Secret>>) -> MutexGuard<'_, Vec<Secret>> {
    // Nothing panics while it is half-way through a change.
    launching.lock().unwrap_or_else(PoisonError::into_inner)
}

fn host(error: io::Error) -> ApiError {
    ApiError::new(ErrorCode::Internal, error.to_string())
}

/// The error for a machine that is not there, with how it ended if that is known.
fn gone(pid: u32, vm: Option<Vm>) -> ApiError {
    match vm.and_then(|vm| vm.ended) {
        Some(ended) => ApiError::new(
            ErrorCode::NotFound,
            format!("VM {pid} has ended: {}", why(&ended)),
        ),
        None => unknown(pid),
    }
}

fn unknown(pid: u32) -> ApiError {
    ApiError::new(
        ErrorCode::NotFound,
        format!("no VM has process id {pid}; GET /vms lists them"),
    )
}

/// A task of ours panicked, or the runtime is shutting down.
pub(crate) fn broken(error: JoinError) -> ApiError {
    ApiError::new(ErrorCode::Internal, error.to_string())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use control::{ProcessId, Source};

    use super::*;

    #[test]
    fn a_machine_that_is_written_down_before_its_launch_is_over_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("tree");
        fs::create_dir(&root).unwrap();
        let mut config = ServerConfig {
            run_dir: dir.path().join("run"),
            ..ServerConfig::new(&root, "/no/such/vmm")
        };
        config.limits.vms = 2;
        let machines = Machines::new(config, Tree::open(&root).unwrap()).unwrap();
        let admitted = machines.admit(1).unwrap();
        let record = Record {
            process: ProcessId::current().unwrap(),
            port: 1,
            secret: admitted.secrets[0].clone(),
            origin: Origin::Restore(Source::files("/s", "/m")),
            console: Console::Terminal,
            vcpus: 1,
            memory_mib: 64,
        };
        let _written = machines.registry.register(&record).unwrap();
        let another = machines.admit(1).unwrap();
        assert!(machines.admit(1).is_err());
        drop((admitted, another));
        // It lives on.
        assert!(machines.admit(2).is_err());
        machines.admit(1).unwrap();
    }
}
