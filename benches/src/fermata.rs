//! fermata, driven through the control channel.

use std::{
    num::NonZeroU32,
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use control::{
    AfterSnapshot, Client, CpuModel, Destination, GuestClock, HotImage, LaunchSpec, Log,
    MachineConfig, MemoryCopy, Origin, Pool, Prepare, Registry, ResetReport, RunsReport,
    RunsRequest, Secret, SnapshotReport, SnapshotRequest, Source, Spawned, StoreLocation,
    UseWorkingSet,
};
use testbed::environment;
use tokio::runtime::Runtime;

use crate::{Files, LinuxGuest, Machine, Monitor, Saved, System, VCPUS};

/// An emulated machine is some fifty times slower than hardware.
const START_DEADLINE: Duration = Duration::from_secs(120);

/// How long to wait between two looks at a figure.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// The VMM program and what its processes share.
#[derive(Debug)]
pub struct Fermata {
    program: PathBuf,
    registry: PathBuf,
    runtime: Rc<Runtime>,
}

/// A VMM process. Dropped, it is killed.
#[derive(Debug)]
pub struct FermataMachine {
    runtime: Rc<Runtime>,
    process: Spawned,
    secret: Secret,
}

impl Fermata {
    /// The program that the environment names, else the one built beside this one; its processes
    /// register themselves under `scratch`.
    ///
    /// # Errors
    ///
    /// When there is none, or no thread can be started.
    pub fn new(scratch: &Path) -> Result<Self> {
        let program = match std::env::var_os(environment::VMM_BIN) {
            // Its processes start elsewhere.
            Some(path) => std::path::absolute(path),
            None => std::env::current_exe().map(|path| path.with_file_name("fermata-vmm")),
        };
        let program = program.context("cannot tell where fermata-vmm is")?;
        anyhow::ensure!(
            program.exists(),
            "{} is not there; build it with cargo build --release -p vmm",
            program.display()
        );
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start a runtime")?;
        Ok(Self {
            program,
            registry: scratch.join("run"),
            runtime: Rc::new(runtime),
        })
    }

    /// Starts a process that makes the machine of `origin` and lets it run.
    ///
    /// # Errors
    ///
    /// When it does not start, with what the VMM said.
    pub fn start(&self, origin: Origin, console: &Path) -> Result<FermataMachine> {
        self.launch(self.spec(origin, console)?)
    }

    /// Starts a process in which the snapshot at `source` runs, and its memory comes when it is touched.
    ///
    /// # Errors
    ///
    /// As of [`Fermata::start`].
    pub fn restore_on_demand(
        &self,
        source: Source,
        console: &Path,
        working_set: UseWorkingSet,
    ) -> Result<FermataMachine> {
        self.launch(LaunchSpec {
            on_demand: true,
            working_set,
            ..self.spec(Origin::Restore(source), console)?
        })
    }

    /// The same, in a process of `pool`, if there is one prepared; without a working set.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn restore_prepared(
        &self,
        pool: &Pool,
        source: Source,
        console: &Path,
    ) -> Result<FermataMachine> {
        let spec = LaunchSpec {
            on_demand: true,
            working_set: UseWorkingSet::Ignore,
            ..self.spec(Origin::Restore(source), console)?
        };
        let starting = pool.spawn(&spec, START_DEADLINE);
        Ok(self.machine(self.runtime.block_on(starting)?, &spec))
    }

    /// Starts a process as `spec` says.
    pub(crate) fn launch(&self, spec: LaunchSpec) -> Result<FermataMachine> {
        let starting = control::spawn(&self.program, &spec, Log::File, START_DEADLINE);
        Ok(self.machine(self.runtime.block_on(starting)?, &spec))
    }

    /// Makes a hot image of `machine`, which goes on, and tells how long it stood still.
    ///
    /// # Errors
    ///
    /// When it is not made.
    pub fn image(&self, machine: &FermataMachine) -> Result<(HotImage, Duration)> {
        let record = Registry::open(&self.registry)?.find_pid(machine.process.pid)?;
        let record = record.context("the machine is not registered")?;
        let making = HotImage::of_machine(&record, GuestClock::StandStill);
        let (image, report) = self.runtime.block_on(making)?;
        Ok((image, Duration::from_micros(report.downtime_us)))
    }

    /// A pool for forks, in which nothing is prepared yet.
    ///
    /// # Errors
    ///
    /// When the run directory cannot be used.
    pub fn pool(&self, most: usize) -> Result<Pool> {
        Ok(Pool::new(&self.program, &self.registry, most)?)
    }

    /// Prepares as many processes as `pool` takes for `wanted`.
    pub fn fill(&self, pool: &Pool, wanted: Prepare) {
        self.runtime.block_on(pool.fill(wanted));
    }

    /// Has `count` machines begin on `image`, in processes of `pool`, with their consoles in `scratch`.
    ///
    /// # Errors
    ///
    /// When one does not.
    pub fn fork(
        &self,
        pool: &Pool,
        image: &HotImage,
        count: u32,
        scratch: &Path,
    ) -> Result<Vec<FermataMachine>> {
        let specs = (0..count).map(|number| {
            let console = scratch.join(format!("fork{number}.console"));
            self.spec(Origin::Fork(image.parent().clone()), &console)
        });
        let specs = specs.collect::<Result<Vec<_>>>()?;
        let forking = pool.fork(image, specs.clone(), START_DEADLINE);
        let forks = self.runtime.block_on(forking)?.into_iter();
        Ok(forks
            .zip(&specs)
            .map(|(process, spec)| self.machine(process, spec))
            .collect())
    }

    fn machine(&self, process: Spawned, spec: &LaunchSpec) -> FermataMachine {
        FermataMachine {
            runtime: Rc::clone(&self.runtime),
            process,
            secret: spec.secret.clone(),
        }
    }

    /// By which a process makes the machine of `origin`, if nothing else is said.
    pub(crate) fn spec(&self, origin: Origin, console: &Path) -> Result<LaunchSpec> {
        Ok(LaunchSpec {
            secret: Secret::random().context("the kernel has no random numbers")?,
            origin,
            console: control::Console::File(console.to_owned()),
            registry: self.registry.clone(),
            hugepages: false,
            on_demand: false,
            working_set: control::UseWorkingSet::default(),
            paused: false,
            clock: GuestClock::StandStill,
            confinement: None,
            net_changes: Vec::new(),
            disk_directory: None,
            vsock_change: control::VsockChange::default(),
        })
    }
}

impl Monitor for Fermata {
    type Machine = FermataMachine;
    const SYSTEM: System = System::Fermata;

    fn boot(&self, guest: &LinuxGuest, console: &Path) -> Result<FermataMachine> {
        let config = MachineConfig {
            cpu: CpuModel::Host,
            vcpus: VCPUS,
            memory_mib: guest.mem_mib,
            kernel: guest.kernel.clone(),
            initrd: Some(guest.initrd.clone()),
            cmdline: guest.cmdline.clone(),
            disks: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            balloon: None,
            console_device: control::ConsoleDevice::default(),
        };
        self.start(Origin::Boot(config), console)
    }

    fn restore(&self, _: &LinuxGuest, files: &Files, console: &Path) -> Result<FermataMachine> {
        let Files { state, memory } = files.clone();
        self.start(Origin::Restore(Source::files(state, memory)), console)
    }
}

impl FermataMachine {
    /// Holds the guest and lets it go on; returns the round trip of the first.
    ///
    /// # Errors
    ///
    /// When it cannot be held.
    pub fn pause(&mut self) -> Result<Duration> {
        self.runtime.block_on(async {
            let client = self.connect().await?;
            let begun = Instant::now();
            client.pause().await?;
            let took = begun.elapsed();
            client.resume(GuestClock::StandStill).await?;
            Ok(took)
        })
    }

    /// Holds the guest, calls `then`, sleeps for `time`, and lets the guest go on, its clocks from where they stood.
    ///
    /// # Errors
    ///
    /// When it cannot be held, or `then` fails.
    pub fn hold_for(&mut self, time: Duration, then: impl FnOnce() -> Result<()>) -> Result<()> {
        self.runtime.block_on(async {
            let client = self.connect().await?;
            client.pause().await?;
            then()?;
            tokio::time::sleep(time).await;
            client.resume(GuestClock::StandStill).await?;
            Ok(())
        })
    }

    /// Takes a snapshot, after which the guest goes on or its process ends.
    ///
    /// # Errors
    ///
    /// When it is not taken.
    pub fn snapshot_then(&mut self, files: &Files, then: AfterSnapshot) -> Result<Saved> {
        self.save(Destination::files(&files.state, &files.memory), then)
    }

    /// The same, wherever the snapshot goes. The guest stands still until its memory is written.
    ///
    /// # Errors
    ///
    /// When it is not taken.
    pub fn save(&mut self, to: Destination, then: AfterSnapshot) -> Result<Saved> {
        let request = SnapshotRequest {
            copy: Some(MemoryCopy::StopAndCopy),
            ..SnapshotRequest::new(to, then)
        };
        self.runtime.block_on(async {
            let client = self.connect().await?;
            let begun = Instant::now();
            let report = client.snapshot(request).await?;
            Ok(Saved {
                total: begun.elapsed(),
                downtime: Duration::from_micros(report.downtime_us),
            })
        })
    }

    /// Saves it into `store` as `name`, and the guest goes on.
    ///
    /// # Errors
    ///
    /// When it is not saved.
    pub fn store(&mut self, store: &Path, name: &str) -> Result<SnapshotReport> {
        self.live(in_store(store, name), None)
    }

    /// Saves it, by `copy` if that is said, and the guest goes on.
    ///
    /// # Errors
    ///
    /// When it is not saved.
    pub fn live(&mut self, to: Destination, copy: Option<MemoryCopy>) -> Result<SnapshotReport> {
        let then = AfterSnapshot::Resume(GuestClock::StandStill);
        let request = SnapshotRequest {
            copy,
            ..SnapshotRequest::new(to, then)
        };
        self.runtime
            .block_on(async { Ok(self.connect().await?.snapshot(request).await?) })
    }

    /// Gives what resets the machine, each time after `ready`, by one connection.
    ///
    /// # Errors
    ///
    /// When it does not answer; then, when it is not reset or not ready.
    pub fn resets(
        &self,
        mut ready: impl FnMut() -> Result<()>,
    ) -> Result<impl FnMut() -> Result<ResetReport>> {
        let client = self.runtime.block_on(self.connect())?;
        Ok(move || {
            ready()?;
            let reset = client.reset(GuestClock::StandStill);
            Ok(self.runtime.block_on(reset)?)
        })
    }

    /// Lets the guest go on.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub fn resume(&self) -> Result<()> {
        self.runtime.block_on(async {
            let client = self.connect().await?;
            Ok(client.resume(GuestClock::StandStill).await?)
        })
    }

    /// Has the machine run from where it was forked, so many times.
    ///
    /// # Errors
    ///
    /// When it does not answer.
    pub fn runs(&self, runs: NonZeroU32) -> Result<RunsReport> {
        let request = RunsRequest {
            runs,
            first: NonZeroU32::MIN,
            run_limit_ms: None,
            clock: GuestClock::StandStill,
        };
        self.runtime
            .block_on(async { Ok(self.connect().await?.runs(request).await?) })
    }

    /// Waits until all of its memory has come.
    ///
    /// # Errors
    ///
    /// When it cannot be asked.
    pub fn wait_for_memory(&self) -> Result<()> {
        self.wait_for("fermata_arrived_bytes", "fermata_arriving_total_bytes")
    }

    /// Waits until all of its disk has come, of which it has one that comes.
    ///
    /// # Errors
    ///
    /// When it cannot be asked.
    pub fn wait_for_disk(&self) -> Result<()> {
        self.wait_for(
            "fermata_disk_arrived_bytes",
            "fermata_disk_arriving_total_bytes",
        )
    }

    /// Waits until one number that it tells is as large as another.
    fn wait_for(&self, part: &str, whole: &str) -> Result<()> {
        self.runtime.block_on(async {
            let client = self.connect().await?;
            loop {
                let metrics = client.metrics().await?;
                let gauge = |name: &str| {
                    let found = metrics.iter().find(|metric| metric.name == name);
                    found.map(|metric| metric.value)
                };
                if gauge(part) == gauge(whole) {
                    return Ok(());
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        })
    }

    async fn connect(&self) -> Result<Client> {
        Ok(Client::connect(self.process.port, &self.secret).await?)
    }
}

/// As `name` in the store in this directory.
pub(crate) fn in_store(directory: &Path, name: &str) -> Destination {
    Destination::Stored {
        store: at(directory),
        name: name.to_owned(),
    }
}

/// The store in this directory.
pub(crate) fn at(directory: &Path) -> StoreLocation {
    StoreLocation {
        directory: directory.to_owned(),
        key_file: None,
    }
}

impl Machine for FermataMachine {
    fn snapshot(&mut self, files: &Files) -> Result<Saved> {
        self.snapshot_then(files, AfterSnapshot::Resume(GuestClock::StandStill))
    }

    fn pid(&self) -> u32 {
        self.process.pid
    }
}

impl Drop for FermataMachine {
    fn drop(&mut self) {
        // It fails only when the process has ended already.
        let _ = self.runtime.block_on(self.process.child.kill());
    }
}
