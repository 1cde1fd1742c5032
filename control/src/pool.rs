//! VMM processes that are started before they are needed, each with a machine that has its size and no content yet, or that of an image: what
//! a fork, or a machine that is restored on demand, then waits for is only its own.

use std::{
    mem,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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

/// What processes are prepared for.
#[derive(Clone, Debug)]
pub enum Prepare {
    /// Any machine of this size.
    Shape(Shape),
    /// Forks of this image, which is kept for them.
    Image(Arc<HotImage>),
}

impl Prepare {
    fn shape(&self) -> Shape {
        match self {
            Self::Shape(shape) => *shape,
            Self::Image(image) => image.shape(),
        }
    }

    fn image(&self) -> Option<&HotImage> {
        match self {
            Self::Shape(_) => None,
            Self::Image(image) => Some(image),
        }
    }

    /// Whether it is of use to forks of `image`.
    fn is_for(&self, image: &HotImage) -> bool {
        match self {
            Self::Shape(shape) => *shape == image.shape(),
            Self::Image(prepared) => std::ptr::eq(&raw const **prepared, image),
        }
    }
}

impl PartialEq for Prepare {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Shape(one), Self::Shape(other)) => one == other,
            (Self::Image(one), Self::Image(other)) => Arc::ptr_eq(one, other),
            (Self::Shape(_), Self::Image(_)) | (Self::Image(_), Self::Shape(_)) => false,
        }
    }
}

/// The processes that are prepared, all for one thing: for what was last forked, or restored on demand.
#[derive(Debug, Default)]
struct Ready {
    prepared: Option<Prepare>,
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
        let start = || match self.take(|prepared| prepared.is_for(image)) {
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
        let started = match self.take(|prepared| prepared.image().is_none()) {
            Some(prepared) => prepared,
            None => Started::new(&self.program, &self.registry, Log::File)?,
        };
        started.run(spec.clone(), None, deadline).await
    }

    /// Prepares processes for `wanted` until there are as many as are kept. Those for anything else end. It is for after a fork or a
    /// restore, when nobody waits: it also clears the run directory of old logs.
    pub async fn fill(&self, wanted: Prepare) {
        self.clear();
        while self.reserve(&wanted) {
            let prepared = self.prepare(&wanted).await;
            let mut ready = self.ready();
            // Something else may be wanted by now, of which none of these was counted.
            if ready.prepared.as_ref() != Some(&wanted) {
                return;
            }
            ready.coming = ready.coming.saturating_sub(1);
            match prepared {
                Ok(process) => ready.processes.push(process),
                Err(error) => {
                    warn!(%error, "no VMM can be prepared; forks start their own");
                    return;
                }
            }
        }
    }

    /// Prepares as many again as were, for the same. It is for after a fork or a restore that failed: it also clears the run directory of
    /// what that left.
    pub async fn refill(&self) {
        let prepared = self.ready().prepared.clone();
        match prepared {
            Some(wanted) => self.fill(wanted).await,
            None => self.clear(),
        }
    }

    fn clear(&self) {
        if let Err(error) = open_pruned(self.registry.dir()) {
            warn!(%error, "old logs are not removed");
        }
    }

    /// Whether there is to be one more for `wanted`, which is counted as coming then.
    fn reserve(&self, wanted: &Prepare) -> bool {
        let mut ready = self.ready();
        if ready.prepared.as_ref() != Some(wanted) {
            ready.prepared = Some(wanted.clone());
            ready.coming = 0;
            // Who waits for an errand that does not come ends.
            drop(mem::take(&mut ready.processes));
        }
        let more = ready.processes.len() + ready.coming < self.most;
        ready.coming += usize::from(more);
        more
    }

    /// Ends those that are prepared for an image, which is not kept any more then.
    pub fn forget_image(&self) {
        let mut ready = self.ready();
        if matches!(ready.prepared, Some(Prepare::Image(_))) {
            *ready = Ready::default();
        }
    }

    async fn prepare(&self, wanted: &Prepare) -> Result<Started, SpawnError> {
        let started = Started::new(&self.program, &self.registry, Log::File)?;
        let prepared = started.prepare(wanted.shape(), wanted.image(), PREPARE_BOUND);
        prepared.await
    }

    /// One that is prepared for what `fits`, and has not ended while it waited.
    fn take(&self, fits: impl FnOnce(&Prepare) -> bool) -> Option<Started> {
        let mut ready = self.ready();
        if !ready.prepared.as_ref().is_some_and(fits) {
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
