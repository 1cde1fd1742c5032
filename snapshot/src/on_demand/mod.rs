//! Memory that comes from a store while its machine runs.
//!
//! What a machine touched first the last time comes first (`first`). Some threads bring the pages that somebody waits for; others, at a low priority, read everything else. Both verify
//! what they read as any load does. None of them touches guest memory, and the locks that they take are not held by
//! anybody who does: else a page could wait for itself. What they share with others is the store's own caches, which
//! belong to this store, opened for this restore; a plan; and the mark that a page is settled (`memory`).

mod bringing;
mod first;
mod lost;
mod plan;

use std::{
    collections::BTreeSet,
    fmt,
    ops::Range,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use dedup::ImageReader;
use memory::{Arrivals, Layout};

pub(crate) use first::First;
pub use first::UseWorkingSet;
pub use lost::Lost;

use crate::{Error, Progress};
use bringing::{AGAIN, Bringing, Patience, Work, cores, start};
use lost::Cause;
use plan::Plan;

/// Threads that bring pages somebody waits for: one decodes some 50,000 frames a second.
const MAX_SERVERS: usize = 4;

/// The priority of who reads what nobody waits for yet: the vCPUs go first. It is not the lowest, for who brings a page that
/// somebody waits for may have to wait for one of these, who opens a pack, to get a CPU.
const NICE: i32 = 5;

/// How often who waits for everything looks whether that is still wanted.
const LOOK: Duration = Duration::from_millis(500);

/// Told when somebody waits for a page that cannot be had.
pub type OnLoss = Box<dyn Fn(&Lost) + Send + Sync>;

/// What is to come.
pub(crate) struct ToCome {
    pub(crate) image: Arc<ImageReader>,
    /// Bytes of it that are not zero.
    pub(crate) data_bytes: u64,
    pub(crate) first: First,
}

/// The coming of a machine's memory.
pub struct OnDemand {
    /// There until everything has come.
    bringing: Weak<Bringing>,
    state: Arc<State>,
}

/// How far it is, for who looks at it later.
#[derive(Default)]
struct State {
    progress: Progress,
    waited_for: AtomicU64,
    working_set_pages: AtomicU64,
    working_set_bytes: AtomicU64,
    recorded_pages: AtomicU64,
    lost: Mutex<Option<Lost>>,
}

impl OnDemand {
    /// Begins to bring what somebody waits for, and the working set, if one is kept.
    pub(crate) fn begin(
        name: &str,
        to_come: ToCome,
        layout: Layout,
        arrivals: Arrivals,
        on_loss: OnLoss,
    ) -> Result<Self, Error> {
        let ToCome {
            image,
            data_bytes,
            first,
        } = to_come;
        let state = Arc::new(State::default());
        if let First::Bring(set) = &first {
            let pages = set.pages().len() as u64;
            state.working_set_pages.store(pages, Ordering::Relaxed);
        }
        state.progress.begin(data_bytes);
        let bringing = Arc::new(Bringing {
            name: name.to_owned(),
            work: Mutex::new(Work {
                plan: Plan::new(image.parts()),
                owed: BTreeSet::new(),
                first_is_done: matches!(first, First::Nothing),
                is_hurried: false,
                again: AGAIN[0],
                all_read: false,
                complete: false,
                stopped: false,
            }),
            image,
            reading: RwLock::new(()),
            layout,
            arrivals,
            changed: Condvar::new(),
            state: Arc::clone(&state),
            first,
            on_loss,
            begun: Instant::now(),
        });
        let on_demand = Self {
            bringing: Arc::downgrade(&bringing),
            state,
        };
        start("faults", &bringing, Bringing::serve)?;
        for _ in 1..cores().min(MAX_SERVERS) {
            // Those that the host does not give, the first does the work of.
            if start("faults", &bringing, Bringing::serve).is_err() {
                break;
            }
        }
        if bringing.work().plan.is_done() {
            // It is all zero.
            bringing.complete();
        } else if let First::Bring(_) = bringing.first {
            start("working-set", &bringing, Bringing::bring_working_set)?;
        }
        Ok(on_demand)
    }

    /// Begins to bring what nobody waits for, too; once. Who wants to run soon does so first. If the working set is to be
    /// recorded, its time begins now, if the machine `runs`; it is not if the machine does not.
    ///
    /// # Errors
    ///
    /// [`Error::Thread`] when there is no thread for it.
    pub fn bring_the_rest(&self, runs: bool) -> Result<(), Error> {
        let Some(bringing) = self.bringing.upgrade() else {
            return Ok(());
        };
        if let First::Record(_) = bringing.first {
            bringing.work().is_hurried |= !runs;
            if let Err(error) = start("recorder", &bringing, Bringing::record) {
                tracing::warn!("what the machine touches first is not recorded: {error}");
                bringing.work().first_is_done = true;
            }
        }
        let load = |bringing: &Bringing| {
            // It is this thread's alone. A host that refuses has everything come sooner.
            let _ = rustix::process::setpriority_process(None, NICE);
            bringing.read_parts(Patience::UntilComplete);
        };
        start("loader", &bringing, load)?;
        for _ in 1..cores() {
            // Those that the host does not give, the others do the work of.
            if start("loader", &bringing, load).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Who has everything come as soon as can be. It does not keep the coming of memory from ending with the machine.
    #[must_use]
    pub fn finisher(&self) -> Finisher {
        Finisher {
            bringing: self.bringing.clone(),
            state: Arc::clone(&self.state),
        }
    }

    /// Tries again to bring what could not be had, if anything.
    ///
    /// # Errors
    ///
    /// [`Lost`] names a page that somebody waits for and that still cannot be had.
    pub fn retry(&self) -> Result<(), Lost> {
        self.bringing
            .upgrade()
            .map_or(Ok(()), |bringing| bringing.retry())
    }

    /// Has the pages at the guest-physical addresses `gpas` come now. Who is to touch them and must not wait for long asks for
    /// this first.
    ///
    /// # Errors
    ///
    /// [`Lost`] names one that cannot be had.
    pub fn need(&self, gpas: Range<u64>) -> Result<(), Lost> {
        self.bringing
            .upgrade()
            .map_or(Ok(()), |bringing| bringing.need(gpas))
    }

    /// Whether everything has come.
    pub fn is_complete(&self) -> bool {
        self.bringing
            .upgrade()
            .is_none_or(|bringing| bringing.work().complete)
    }

    /// A page that cannot be had, until it can.
    pub fn lost(&self) -> Option<Lost> {
        self.state.lost().clone()
    }

    /// Bytes that have come, of those there are to come.
    pub fn progress(&self) -> &Progress {
        &self.state.progress
    }

    /// How often somebody waited for a page.
    pub fn waited_for(&self) -> u64 {
        self.state.waited_for.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for OnDemand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnDemand")
            .field("progress", self.progress())
            .field("lost", &self.lost())
            .finish_non_exhaustive()
    }
}

/// Who has all of a machine's memory come.
pub struct Finisher {
    bringing: Weak<Bringing>,
    state: Arc<State>,
}

impl Finisher {
    /// Has everything come as soon as can be, and waits for that, for as long as it is `wanted`.
    ///
    /// # Errors
    ///
    /// [`Lost`] names a page that cannot be had, or any if it is not wanted any more.
    pub fn finish(&self, wanted: &(dyn Fn() -> bool + Sync)) -> Result<(), Lost> {
        let Some(bringing) = self.bringing.upgrade() else {
            return Ok(());
        };
        bringing.retry()?;
        bringing.work().is_hurried = true;
        bringing.changed.notify_all();
        thread::scope(|scope| {
            for _ in 1..cores() {
                let read = || bringing.read_parts(Patience::WhileThereAreParts(wanted));
                // Those that the host does not give, the others do the work of.
                let _ = thread::Builder::new().spawn_scoped(scope, read);
            }
            bringing.read_parts(Patience::WhileThereAreParts(wanted));
        });
        let mut work = bringing.work();
        while !work.complete {
            if work.stopped || !wanted() {
                return Err(bringing.lost(0, &Cause::Stopped));
            }
            if work.plan.is_at_rest() && !work.plan.is_done() {
                drop(work);
                let lost = self.state.lost().clone();
                return Err(lost.unwrap_or_else(|| bringing.lost(0, &Cause::Panic)));
            }
            (work, _) = bringing.wait_for(work, LOOK);
        }
        Ok(())
    }
}

impl Drop for OnDemand {
    fn drop(&mut self) {
        let Some(bringing) = self.bringing.upgrade() else {
            return;
        };
        bringing.work().stopped = true;
        bringing.changed.notify_all();
        bringing.arrivals.stop();
    }
}

impl State {
    fn lost(&self) -> MutexGuard<'_, Option<Lost>> {
        // It is put in and taken out whole.
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
