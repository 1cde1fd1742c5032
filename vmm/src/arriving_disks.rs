//! Disks that come from a store while their machine runs.
//!
//! A guest that reads what is not here yet waits for it, as for a slow disk; what cannot be had is an error of its disk for it, and is tried again.
//! One thread brings what nobody waits for. A disk that was written to stands on what is to come, so a machine that ends has that come first.

use std::{
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

/// The disks of a machine that come, or came, from a store.
#[derive(Clone, Default)]
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

    /// How much of each has come.
    pub(crate) fn metrics(&self) -> Vec<Metric> {
        let of_disk = |arriving: &Arriving| {
            let (come, total) = arriving.rebuild.progress();
            let label = arriving.number.to_string();
            [
                ("fermata_disk_arrived_bytes", come),
                ("fermata_disk_arriving_total_bytes", total),
            ]
            .map(|(name, value)| Metric {
                name: name.to_owned(),
                label: Some(("disk".to_owned(), label.clone())),
                value,
            })
        };
        self.0.iter().flat_map(of_disk).collect()
    }

    /// Has all of them be here, as long as that is `wanted`.
    pub(crate) fn finish(&self, wanted: &dyn Fn() -> bool) -> Result<(), Error> {
        for arriving in &*self.0 {
            arriving.rebuild.finish(wanted)?;
        }
        Ok(())
    }

    /// One try to have all be here; whether they are, or it is not wanted any more.
    fn try_all(&self, wanted: &dyn Fn() -> bool) -> bool {
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
                    tracing::warn!(disk = number, "not all of the disk can be had now: {error}");
                    all = false;
                }
            }
        }
        all
    }
}

/// Who has them come.
pub(crate) struct Bringer {
    arriving: ArrivingDisks,
    /// Those disks. No other thread here has them: with the last who has one, it is closed.
    disks: Vec<SharedDisk>,
    end: Arc<End>,
}

/// Whether the machine has ended.
#[derive(Default)]
struct End {
    ended: AtomicBool,
    pause: Mutex<()>,
    told: Condvar,
}

impl Bringer {
    /// Of those of `disks` that come.
    pub(crate) fn new(arriving: ArrivingDisks, disks: &[AttachedDisk]) -> Self {
        let coming = disks.iter().filter(|disk| disk.comes.is_some());
        Self {
            arriving,
            disks: coming.filter_map(|disk| disk.branch.clone()).collect(),
            end: Arc::default(),
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
    pub(crate) fn wanted(&self) -> impl Fn() -> bool + Send + 'static {
        let end = Arc::clone(&self.end);
        move || !end.has_come()
    }
}

impl Drop for Bringer {
    /// What was written to a disk is of no use without what that stands on.
    fn drop(&mut self) {
        self.end.tell();
        for (Arriving { number, rebuild }, disk) in self.arriving.0.iter().zip(&self.disks) {
            if rebuild.is_finished() {
                continue;
            }
            let (touched, head) = {
                let disk = lock(disk);
                (disk.is_touched(), disk.path().to_owned())
            };
            if !touched {
                rebuild.give_up();
                continue;
            }
            tracing::info!(
                disk = number,
                "the machine ends when all of its disk has come"
            );
            if let Err(error) = rebuild.finish(&|| true) {
                tracing::error!(
                    disk = number,
                    head = %head.display(),
                    missing = %rebuild.path().display(),
                    "what was written to the disk stands on a layer that is not here; restore the snapshot again with this directory for its disks, and it will be: {error}"
                );
                rebuild.give_up();
            }
        }
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
