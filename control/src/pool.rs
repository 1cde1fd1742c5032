//! VMM processes that are started before they are needed, each with a machine that has its size and no content yet: what a fork, or a
//! machine that is restored on demand, then waits for is only its own.

use std::{
    mem,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tracing::warn;

use crate::{
    HotImage, LaunchSpec, Log, Registry, RegistryError, Shape, SpawnError, Spawned,
    spawn::{fork_in, open_pruned},
    started::Started,
};

/// How long a process may take until it is prepared.
const PREPARE_BOUND: Duration = Duration::from_secs(60);

/// Where VMMs for forks and for restores on demand come from: processes that are prepared, as long as there are any, and else new ones. Prepared processes
/// end with this, also if whose it is is killed.
#[derive(Debug)]
pub struct Pool {
    program: PathBuf,
    registry: Registry,
    /// How many are kept.
    most: usize,
    ready: Mutex<Ready>,
}

/// The processes that are prepared, all for one shape: that of what was last forked, or restored on demand.
#[derive(Debug, Default)]
struct Ready {
    shape: Option<Shape>,
    processes: Vec<Started>,
    /// How many are on their way.
    coming: usize,
}

impl Pool {
    /// Of processes of `program` that have their logs in the run directory `registry`. At most `most` are prepared.
    ///
    /// # Errors
    ///
    /// When the directory cannot be used.
    pub fn new(
        program: impl Into<PathBuf>,
        registry: impl Into<PathBuf>,
        most: usize,
    ) -> Result<Self, RegistryError> {
        Ok(Self {
            program: program.into(),
            registry: Registry::open(registry)?,
            most,
            ready: Mutex::default(),
        })
    }

    /// Starts a VMM for each of `specs` on `image`, as [`fork`](crate::fork()) does.
    ///
    /// # Errors
    ///
    /// The first [`SpawnError`].
    pub async fn fork(
        &self,
        image: &HotImage,
        specs: Vec<LaunchSpec>,
        deadline: Duration,
    ) -> Result<Vec<Spawned>, SpawnError> {
        let start = || match self.take(Some(image.shape())) {
            Some(prepared) => Ok(prepared),
            None => Started::new(&self.program, &self.registry, Log::File),
        };
        fork_in(start, image, specs, deadline).await
    }

    /// Starts a VMM for `spec`, as [`spawn`](crate::spawn()) does. What is prepared in it is of use to a machine of that size which is
    /// restored on demand; others begin in it all the same.
    ///
    /// # Errors
    ///
    /// [`SpawnError`].
    pub async fn spawn(
        &self,
        spec: &LaunchSpec,
        deadline: Duration,
    ) -> Result<Spawned, SpawnError> {
        let started = match self.take(None) {
            Some(prepared) => prepared,
            None => Started::new(&self.program, &self.registry, Log::File)?,
        };
        started.run(spec.clone(), None, deadline).await
    }

    /// Prepares processes for machines of `shape` until there are as many as are kept. Those of another shape end. It is for after a fork or a
    /// restore, when nobody waits: it also clears the run directory of old logs.
    pub async fn fill(&self, shape: Shape) {
        if let Err(error) = open_pruned(self.registry.dir()) {
            warn!(%error, "old logs are not removed");
        }
        while self.reserve(shape) {
            let prepared = self.prepare(shape).await;
            let mut ready = self.ready();
            ready.coming -= 1;
            match prepared {
                // Another shape may be wanted by now.
                Ok(process) if ready.shape == Some(shape) => ready.processes.push(process),
                Ok(_) => return,
                Err(error) => {
                    warn!(%error, "no VMM can be prepared; forks start their own");
                    return;
                }
            }
        }
    }

    /// Whether there is to be one more of `shape`, which is counted as coming then.
    fn reserve(&self, shape: Shape) -> bool {
        let mut ready = self.ready();
        if ready.shape != Some(shape) {
            ready.shape = Some(shape);
            // Who waits for an errand that does not come ends.
            drop(mem::take(&mut ready.processes));
        }
        let more = ready.processes.len() + ready.coming < self.most;
        ready.coming += usize::from(more);
        more
    }

    async fn prepare(&self, shape: Shape) -> Result<Started, SpawnError> {
        let started = Started::new(&self.program, &self.registry, Log::File)?;
        started.prepare(shape, PREPARE_BOUND).await
    }

    /// One that is prepared, for `shape` if that is given, and has not ended while it waited.
    fn take(&self, shape: Option<Shape>) -> Option<Started> {
        let mut ready = self.ready();
        if shape.is_some() && ready.shape != shape {
            return None;
        }
        while let Some(mut started) = ready.processes.pop() {
            if started.lives() {
                return Some(started);
            }
            warn!("a prepared VMM had ended; its log says why");
        }
        None
    }

    fn ready(&self) -> MutexGuard<'_, Ready> {
        // It is whole whenever it is not locked.
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
