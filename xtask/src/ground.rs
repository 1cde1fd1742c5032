//! What demo, benchmarks and level-3 tests stand on: packages, guest, programs, a directory for results.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use testbed::guest;
use testbed::job::{Job, Output};
use testbed::kvm::{self, Level};
use testbed::l1::{self, Breakdown};
use testbed::session::Session;
use testbed::{cache, environment, setup};

use crate::build::{self, Programs};

/// How many emulated machines may break down under one job, and one more.
const MACHINES: u32 = 3;

/// What an emulated machine takes besides its memory, and others meanwhile.
const BESIDE_MIB: u32 = 1024;

/// Everything set up, nothing booted yet.
pub(crate) struct Ground {
    level: Level,
    programs: Programs,
    /// What every job is told.
    environment: Vec<(&'static str, PathBuf)>,
    /// Same path inside and outside of a session; kept afterwards, emptied before the next.
    pub(crate) share: PathBuf,
    /// Held while the share is used.
    _lock: File,
}

impl Ground {
    /// Installs packages, builds the guest, the product and the workspace's programs `others`, and says where guests will run.
    pub(crate) fn prepare(others: &[&str]) -> Result<Self> {
        let choice = kvm::pick()?;
        setup::ensure()?;
        let guest = guest::build()?;
        println!("Building fermata");
        let programs = build::release_programs(others)?;
        let lock = lock()?;
        let share = empty_share()?;
        println!("{}", choice.reason);
        Ok(Self {
            level: choice.level,
            environment: vec![
                (environment::BIN, programs.path("fermata")?.to_owned()),
                (
                    environment::VMM_BIN,
                    programs.path("fermata-vmm")?.to_owned(),
                ),
                (environment::GUEST_KERNEL, guest.kernel),
                (environment::GUEST_INITRD, guest.initrd),
                (environment::GUEST_DISK, guest.disk),
                (environment::GUEST_GENERIC_KERNEL, guest.generic_kernel),
                (environment::GUEST_GENERIC_INITRD, guest.generic_initrd),
                (environment::SHARE, share.clone()),
            ],
            programs,
            share,
            _lock: lock,
        })
    }

    /// Tells jobs from now on that the variable `name` is `path`.
    pub(crate) fn tell(&mut self, name: &'static str, path: PathBuf) {
        self.environment.push((name, path));
    }

    /// Runs `job` on a machine of its own with a real KVM: see [`Machine::run`].
    pub(crate) fn run(&self, job: Job) -> Result<Output> {
        self.machine().run(job)
    }

    /// A machine for one job after the other, not booted yet.
    pub(crate) fn machine(&self) -> Machine<'_> {
        Machine {
            ground: self,
            session: None,
            broken_down: 0,
        }
    }

    fn open(&self) -> Result<Session> {
        let session = Session::open(self.level, &self.share)?;
        if let Some(time) = session.boot_time() {
            println!(
                "The emulated machine is up after {:.1} s",
                time.as_secs_f64()
            );
        }
        Ok(session)
    }

    /// Whether jobs run on emulated machines.
    pub(crate) fn is_emulated(&self) -> bool {
        self.level == Level::Nested
    }

    /// The path of one of the workspace's programs.
    pub(crate) fn program(&self, name: &str) -> Result<&Path> {
        self.programs.path(name)
    }

    /// Tells `job` where everything is.
    fn equip(&self, job: Job) -> Job {
        let job = job.directory(cache::workspace());
        self.environment
            .iter()
            .fold(job, |job, (name, path)| job.env(*name, path))
    }

    /// How many machines are worth having at a time: an emulated one has one CPU and must have its memory, and this one is only there
    /// once.
    pub(crate) fn machines_at_once(&self) -> usize {
        match self.level {
            Level::Nested => {
                let cpus = std::thread::available_parallelism().map_or(1, usize::from);
                let each = l1::Options::new(&self.share).memory_mib + BESIDE_MIB;
                let fit = available_mib().unwrap_or(0) / u64::from(each);
                cpus.min(fit as usize).max(1)
            }
            Level::Native => 1,
        }
    }

    /// How many level-3 tests may run side by side on a machine: a guest has two CPUs, and an emulated one needs them.
    pub(crate) fn test_threads(&self) -> usize {
        match self.level {
            Level::Nested => 1,
            Level::Native => {
                std::thread::available_parallelism().map_or(1, |cpus| cpus.get().div_ceil(2))
            }
        }
    }
}

/// A machine with a real KVM, an emulated one or this one, that is booted when there is a job for it. It belongs to the
/// thread that it is used by: an emulated one ends with it.
pub(crate) struct Machine<'g> {
    pub(crate) ground: &'g Ground,
    session: Option<Session>,
    /// How many machines have broken down so far.
    pub(crate) broken_down: u32,
}

impl Machine<'_> {
    /// Runs `job`, on the machine that the last one has left.
    ///
    /// QEMU's emulation of SVM has races: now and then the kernel of the emulated machine crashes, or its CPU
    /// waits for ever. A job cannot do that from user space, so such an end says nothing about
    /// the job, and it runs again on a fresh machine. A machine that breaks down each time is an error: then it
    /// is no accident.
    pub(crate) fn run(&mut self, job: Job) -> Result<Output> {
        let job = self.ground.equip(job);
        let mut number = 1;
        loop {
            match self.run_once(&job) {
                Err(error) if error.is::<Breakdown>() => {
                    self.session = None;
                    self.broken_down += 1;
                    if number == MACHINES {
                        return Err(error);
                    }
                    number += 1;
                    println!(
                        "{error}\nThat machine broke down; number {number} of {MACHINES} takes over"
                    );
                }
                outcome => return outcome,
            }
        }
    }

    fn run_once(&mut self, job: &Job) -> Result<Output> {
        let session = match &mut self.session {
            Some(session) => session,
            none => none.insert(self.ground.open()?),
        };
        session.run(job)
    }

    /// Has the next job run on a fresh machine.
    pub(crate) fn replace(&mut self) {
        // What was to be done there is done, and the share is not part of the machine.
        if let Some(Err(error)) = self.session.take().map(Session::close) {
            println!("{error:#}");
        }
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        self.replace();
    }
}

/// Memory that programs can have before others lose theirs, as the kernel estimates it: `MemAvailable` of proc_meminfo(5).
fn available_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib >> 10)
}

/// Waits until nobody else uses the share.
fn lock() -> Result<File> {
    let path = cache::directory()?.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        println!("Waiting for another `cargo xtask` that uses the test bed");
    }
    file.lock()
        .with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

fn empty_share() -> Result<PathBuf> {
    let share = cache::directory()?.join("share");
    if share.exists() {
        std::fs::remove_dir_all(&share)
            .with_context(|| format!("cannot empty {}", share.display()))?;
    }
    std::fs::create_dir(&share).with_context(|| format!("cannot make {}", share.display()))?;
    Ok(share)
}
