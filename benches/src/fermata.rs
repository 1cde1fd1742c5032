//! fermata, driven through the control channel.

use std::{
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use control::{
    AfterSnapshot, Client, CpuModel, Destination, GuestClock, LaunchSpec, Log, MachineConfig,
    Origin, Secret, SnapshotRequest, Source, Spawned,
};
use testbed::environment;
use tokio::runtime::Runtime;

use crate::{Files, LinuxGuest, Machine, Monitor, Saved, System, VCPUS};

/// An emulated machine is some fifty times slower than hardware.
const START_DEADLINE: Duration = Duration::from_secs(120);

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
        let secret = Secret::random().context("the kernel has no random numbers")?;
        let spec = LaunchSpec {
            secret: secret.clone(),
            origin,
            console: control::Console::File(console.to_owned()),
            registry: self.registry.clone(),
            paused: false,
            clock: GuestClock::StandStill,
            confinement: None,
            net_changes: Vec::new(),
            vsock_change: control::VsockChange::default(),
        };
        let starting = control::spawn(&self.program, &spec, Log::File, START_DEADLINE);
        Ok(FermataMachine {
            process: self.runtime.block_on(starting)?,
            runtime: Rc::clone(&self.runtime),
            secret,
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

    /// Takes a snapshot, after which the guest goes on or its process ends.
    ///
    /// # Errors
    ///
    /// When it is not taken.
    pub fn snapshot_then(&mut self, files: &Files, then: AfterSnapshot) -> Result<Saved> {
        let request = SnapshotRequest {
            to: Destination::files(&files.state, &files.memory),
            then,
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

    async fn connect(&self) -> Result<Client> {
        Ok(Client::connect(self.process.port, &self.secret).await?)
    }
}

impl Machine for FermataMachine {
    fn snapshot(&mut self, files: &Files) -> Result<Saved> {
        self.snapshot_then(files, AfterSnapshot::Resume(GuestClock::StandStill))
    }
}

impl Drop for FermataMachine {
    fn drop(&mut self) {
        // It fails only when the process has ended already.
        let _ = self.runtime.block_on(self.process.child.kill());
    }
}
