//! Disks that come from a store while their machine runs.
//!
//! A guest that reads what is not here yet waits for it, as for a slow disk; what cannot be had is an error of its disk for it, and is tried again.
//! One thread brings what nobody waits for. A disk that was written to stands on what is to come, so a machine that ends has that come first.

use std::{
    num::NonZero,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use branch_disk::Rebuild;
use control::Metric;
use devices::virtio::block::SharedDisk;

use crate::{
    disks::{AttachedDisk, lock},
    error::Error,
};

/// The priority of who brings what nobody waits for, as that of who does so for memory.
const NICE: i32 = 5;

/// After which times it is tried again to bring what could not be had.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(30);
/// How often it is tried when the machine has ended.
const LAST_TRIES: u32 = 3;

/// The disks of a machine that come, or came, from a store.
#[derive(Clone)]
pub(crate) struct ArrivingDisks(Arc<[Arriving]>);

struct Arriving {
    /// Which of the machine's disks.
    number: usize,
    rebuild: Arc<Rebuild>,
}

impl ArrivingDisks {
    /// Those of `disks` that come.
    pub(crate) fn of(disks: &[AttachedDisk]) -> Self {
        let arriving = |(number, attached): (usize, &AttachedDisk)| {
            let rebuild = Arc::clone(attached.comes.as_ref()?);
            Some(Arriving { number, rebuild })
        };
        Self(disks.iter().enumerate().filter_map(arriving).collect())
    }

    /// Whether all of them are here.
    pub(crate) fn are_here(&self) -> bool {
        self.0.iter().all(|arriving| arriving.rebuild.is_finished())
    }

    /// Bytes that have come.
    pub(crate) fn come(&self) -> u64 {
        let come = self.0.iter().map(|arriving| arriving.rebuild.progress().0);
        come.sum()
    }

    /// How much of each has come, and how many are not here, if there are any.
    pub(crate) fn metrics(&self) -> Vec<Metric> {
        if self.0.is_empty() {
            return Vec::new();
        }
        let missing = self.0.iter().filter(|disk| !disk.rebuild.is_finished());
        let missing = Metric {
            name: control::DISKS_TO_COME.to_owned(),
            label: None,
            value: missing.count() as u64,
        };
        let of_disk = |arriving: &Arriving| {
            let (come, total) = arriving.rebuild.progress();
            let label = arriving.number.to_string();
            [
                (control::DISK_BYTES_COME, come),
                (control::DISK_BYTES_TO_COME, total),
            ]
            .map(|(name, value)| Metric {
                name: name.to_owned(),
                label: Some(("disk".to_owned(), label.clone())),
                value,
            })
        };
        let of_disks = self.0.iter().flat_map(of_disk);
        of_disks.chain([missing]).collect()
    }

    /// Has all of them be here as soon as can be, as long as that is `wanted`.
    pub(crate) fn finish(&self, wanted: Wanted<'_>) -> Result<(), Error> {
        for arriving in &*self.0 {
            finish(&arriving.rebuild, wanted)?;
        }
        Ok(())
    }

    /// One try to have all be here; whether they are, or it is not wanted any more.
    fn try_all(&self, wanted: Wanted<'_>) -> bool {
        let mut all = true;
        for Arriving { number, rebuild } in &*self.0 {
            if rebuild.is_finished() {
                continue;
            }
            match rebuild.finish(wanted) {
                Ok(()) => tracing::info!(
                    disk = number,
                    path = %rebuild.path().display(),
                    bytes = rebuild.progress().1,
                    "all of the disk has come"
                ),
                Err(_) if !wanted() => return true,
                Err(error) => {
                    tracing::warn!(
                        disk = number,
                        "not all of the disk can be had now: {}",
                        error.with_cause()
                    );
                    all = false;
                }
            }
        }
        all
    }
}

/// Says whether it still makes sense.
pub(crate) type Wanted<'a> = &'a (dyn Fn() -> bool + Sync);

/// Has a layer come with all CPUs.
pub(crate) fn finish(rebuild: &Rebuild, wanted: Wanted<'_>) -> Result<(), Error> {
    thread::scope(|scope| {
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        for _ in 1..cores {
            // Those that the host does not give, the others do the work of. What this one finds, they find.
            let help = || drop(rebuild.finish(wanted));
            let _ = thread::Builder::new().spawn_scoped(scope, help);
        }
        rebuild.finish(wanted)
    })
    // What one could not have, another may have had.
    .or_else(|error| match rebuild.is_finished() {
        true => Ok(()),
        false => Err(error.into()),
    })
}

/// Who has a machine's disks come. To be dropped when nobody writes to them any more.
pub(crate) struct Bringing {
    arriving: ArrivingDisks,
    /// With each of those, the disk. No other thread here has them: with the last who has one, it is closed.
    disks: Vec<(Arc<Rebuild>, SharedDisk)>,
    end: Arc<End>,
    /// Whether anybody has learnt of the machine. Nobody needs what others wrote to their disks.
    is_known: bool,
}

/// Whether the machine has ended.
#[derive(Default)]
struct End {
    ended: AtomicBool,
    pause: Mutex<()>,
    told: Condvar,
}

impl Bringing {
    /// Of those of `disks` that come.
    pub(crate) fn new(arriving: ArrivingDisks, disks: &[AttachedDisk]) -> Self {
        let with_disk = |attached: &AttachedDisk| {
            let rebuild = Arc::clone(attached.comes.as_ref()?);
            Some((rebuild, Arc::clone(attached.branch.as_ref()?)))
        };
        Self {
            arriving,
            disks: disks.iter().filter_map(with_disk).collect(),
            end: Arc::default(),
            is_known: false,
        }
    }

    /// Begins to bring what nobody waits for, too; once.
    pub(crate) fn bring_the_rest(&self) -> Result<(), Error> {
        if self.arriving.are_here() {
            return Ok(());
        }
        let (disks, end) = (self.arriving.clone(), Arc::clone(&self.end));
        let bring = move || {
            // It is this thread's alone. Nobody is refused to be nicer.
            let _ = rustix::process::setpriority_process(None, NICE);
            let mut pause = FIRST_PAUSE;
            while !disks.try_all(&|| !end.has_come()) {
                end.wait(pause);
                pause = LAST_PAUSE.min(pause * 2);
            }
        };
        let thread = thread::Builder::new().name("disks".to_owned());
        thread.spawn(bring).map(drop).map_err(Error::Thread)
    }

    /// Says whether the machine goes on.
    pub(crate) fn wanted(&self) -> impl Fn() -> bool + Send + Sync + 'static {
        let end = Arc::clone(&self.end);
        move || !end.has_come()
    }

    /// Somebody has learnt of the machine.
    pub(crate) fn is_known(&mut self) {
        self.is_known = true;
    }
}

impl Drop for Bringing {
    /// What was written to a disk is of no use without what that stands on.
    fn drop(&mut self) {
        self.end.tell();
        let (mut needed, mut rest) = (Vec::new(), Vec::new());
        for (rebuild, disk) in &self.disks {
            let mut disk = lock(disk);
            if rebuild.is_finished() {
                continue;
            }
            if !disk.is_touched() {
                rest.push(rebuild);
                continue;
            }
            if !self.is_known {
                disk.abandon();
                rest.push(rebuild);
                continue;
            }
            // First, for whoever has it end may not wait for the rest.
            if let Err(error) = disk.flush() {
                tracing::warn!(path = %disk.path().display(), "what was not flushed may be lost: {}", error.with_cause());
            }
            needed.push((rebuild, disk.path().to_owned()));
        }
        rest.into_iter().for_each(|rebuild| rebuild.give_up());
        for (rebuild, head) in needed {
            let path = rebuild.path().display();
            tracing::info!(%path, "the machine ends when all of its disk has come");
            if let Err(error) = finish_in_the_end(rebuild) {
                rebuild.give_up();
                tracing::error!(
                    "{} stands on {path}, which is not here; restore the same snapshot with the same directory for its disks, and it will be: {}",
                    head.display(),
                    error.with_causes()
                );
            }
        }
    }
}

/// Has a layer come without which something is of no use, as long as anything comes, and tries a few times more.
fn finish_in_the_end(rebuild: &Rebuild) -> Result<(), Error> {
    let mut tries = LAST_TRIES;
    let mut come = rebuild.progress().0;
    loop {
        let Err(error) = finish(rebuild, &|| true) else {
            return Ok(());
        };
        let now = rebuild.progress().0;
        tries = match now > come {
            true => LAST_TRIES,
            false => tries - 1,
        };
        come = now;
        if tries == 0 {
            return Err(error);
        }
        thread::sleep(FIRST_PAUSE);
    }
}

impl End {
    fn has_come(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    fn tell(&self) {
        self.ended.store(true, Ordering::Release);
        // Whoever has looked waits by now.
        drop(self.pause.lock());
        self.told.notify_all();
    }

    fn wait(&self, time: Duration) {
        let pause = self.pause.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self
            .told
            .wait_timeout_while(pause, time, |()| !self.has_come());
    }
}
