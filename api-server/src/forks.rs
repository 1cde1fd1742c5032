//! What `POST /fork` does: one machine goes on as many.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use api_types::{ErrorCode, ForkAnswer, ForkRequest};
use control::{HotImage, LaunchSpec, Origin, Pool, Prepare, RegistryError, Source};
use tokio::{sync::OnceCell, task::spawn_blocking};
use tracing::{info, instrument};

use crate::{
    ServerConfig,
    error::ApiError,
    machines::{Machines, broken},
    plan::{self, Forked},
};

impl Machines {
    /// Forks a machine; returns once all of its forks run, or fails and leaves none.
    #[instrument(skip_all, fields(count))]
    pub(crate) async fn fork(&self, request: ForkRequest) -> Result<ForkAnswer, ApiError> {
        let (config, tree) = (self.config.clone(), self.tree.clone());
        let plan = spawn_blocking(move || plan::fork(&config, &tree, &request))
            .await
            .map_err(broken)??;
        tracing::Span::current().record("count", plan.count);
        let admitted = self.admit(plan.count as usize)?;
        let image = self.image(&plan).await?;
        let specs = (0..plan.count)
            .zip(&admitted.secrets)
            .map(|(number, secret)| {
                let changes = plan.net_changes.iter();
                Ok(LaunchSpec {
                    clock: plan.clock,
                    net_changes: changes.map(|change| change.of_fork(number)).collect(),
                    ..self.spec(Origin::Fork(image.parent().clone()), secret.clone())?
                })
            });
        let specs = specs.collect::<Result<Vec<_>, ApiError>>()?;
        let bound = self.config.limits.restore;
        let forks = self.forks.pool.fork(&image, specs.clone(), bound).await;
        if forks.is_err() {
            self.make_up();
        }
        let both = specs.iter().zip(forks?);
        let forks: Vec<_> = both
            .map(|(spec, vmm)| self.adopt(spec, vmm, Vec::new()))
            .collect();
        info!(?forks, "a machine was forked");
        // For the next; nobody waits for it.
        let wanted = match self.forks.is_kept(&image) {
            true => Prepare::Image(image),
            false => Prepare::Shape(image.shape()),
        };
        let pool = Arc::clone(&self.forks.pool);
        tokio::spawn(async move { pool.fill(wanted).await });
        Ok(ForkAnswer { forks })
    }

    async fn image(&self, plan: &plan::Fork) -> Result<Arc<HotImage>, ApiError> {
        match &plan.of {
            Forked::Machine(pid) => {
                let record = self.record(*pid)?;
                let (image, report) = HotImage::of_machine(&record, plan.clock).await?;
                info!(pid, ?report, "a machine was held to be forked");
                Ok(Arc::new(image))
            }
            Forked::Saved(source) => self.saved_image(source).await,
        }
    }

    /// The image of a saved machine: that which is kept or just being made, if it is of the same two files.
    async fn saved_image(&self, source: &Source) -> Result<Arc<HotImage>, ApiError> {
        // Before they are read: if they change meanwhile, the next request finds that.
        let Ok(of) = stamp(source) else {
            return self.read_image(source).await;
        };
        if let Some(image) = self.forks.kept(&of) {
            return Ok(image);
        }
        let coming = self.forks.coming(&of);
        let made = coming.get_or_init(async || {
            // It may have come before this was looked for.
            if let Some(image) = self.forks.kept(&of) {
                return Ok(image);
            }
            let image = self.read_image(source).await?;
            self.forks.keep(of.clone(), &image);
            Ok(image)
        });
        made.await.clone()
    }

    async fn read_image(&self, source: &Source) -> Result<Arc<HotImage>, ApiError> {
        let (program, bound) = (&self.config.vmm_binary, self.config.limits.restore);
        let registry = self.registry.dir();
        let confinement = Some(self.confinement());
        let image = HotImage::of_saved(program, registry, source.clone(), confinement, bound);
        Ok(Arc::new(image.await?))
    }

    /// Has what a failure left cleared away, and what it took of what was prepared be prepared again. Nobody waits for it.
    pub(crate) fn make_up(&self) {
        let pool = Arc::clone(&self.forks.pool);
        tokio::spawn(async move { pool.refill().await });
    }
}

/// What is kept for the next fork.
#[derive(Debug)]
pub(crate) struct Forks {
    pub(crate) pool: Arc<Pool>,
    keeps: bool,
    /// The image of the saved machine that was forked last.
    image: Mutex<Option<(Stamp, Arc<HotImage>)>>,
    /// Those that are being made, of which many who ask at once get one.
    coming: Mutex<Vec<(Stamp, Weak<Coming>)>>,
}

/// An image that is being made, and what has come of it.
type Coming = OnceCell<Result<Arc<HotImage>, ApiError>>;

/// What tells the two files of a saved machine from any others, and from what they are after a change.
type Stamp = (Source, [(u64, u64, u64, i128); 2]);

impl Forks {
    pub(crate) fn new(config: &ServerConfig) -> Result<Self, RegistryError> {
        Ok(Self {
            pool: Arc::new(Pool::new(&config.vmm_binary, &config.run_dir, config.pool)?),
            keeps: config.pool > 0,
            image: Mutex::default(),
            coming: Mutex::default(),
        })
    }

    /// Where the image of `of` is to be that is just being made, by who asks for it first.
    fn coming(&self, of: &Stamp) -> Arc<Coming> {
        let mut coming = self.coming.lock().unwrap_or_else(PoisonError::into_inner);
        coming.retain(|(_, image)| image.strong_count() > 0);
        let same = coming.iter().find(|(stamp, _)| stamp == of);
        if let Some(image) = same.and_then(|(_, image)| image.upgrade()) {
            return image;
        }
        let image = Arc::default();
        coming.push((of.clone(), Arc::downgrade(&image)));
        image
    }

    fn kept(&self, of: &Stamp) -> Option<Arc<HotImage>> {
        let image = self.image.lock().unwrap_or_else(PoisonError::into_inner);
        let (stamp, image) = image.as_ref()?;
        (stamp == of).then(|| Arc::clone(image))
    }

    fn is_kept(&self, image: &Arc<HotImage>) -> bool {
        let kept = self.image.lock().unwrap_or_else(PoisonError::into_inner);
        kept.as_ref()
            .is_some_and(|(_, kept)| Arc::ptr_eq(kept, image))
    }

    fn keep(&self, of: Stamp, image: &Arc<HotImage>) {
        if self.keeps {
            let mut kept = self.image.lock().unwrap_or_else(PoisonError::into_inner);
            *kept = Some((of, Arc::clone(image)));
            // It would have the one before kept as well.
            self.pool.forget_image();
        }
    }
}

/// That of `source`. A change of a file changes the time of its last change of status, which nobody can set.
fn stamp(source: &Source) -> io::Result<Stamp> {
    let Source::Files { state, memory, .. } = source else {
        return Err(io::ErrorKind::Unsupported.into());
    };
    let of = |path| {
        let found = fs::metadata(path)?;
        let changed = i128::from(found.ctime()) * 1_000_000_000 + i128::from(found.ctime_nsec());
        Ok::<_, io::Error>((found.dev(), found.ino(), found.size(), changed))
    };
    Ok((source.clone(), [of(state)?, of(memory)?]))
}

impl From<control::ImageError> for ApiError {
    fn from(error: control::ImageError) -> Self {
        match error {
            control::ImageError::Machine(error) => error.into(),
            control::ImageError::Spawn(error) => error.into(),
            control::ImageError::Host(_) => Self::with_causes(ErrorCode::Internal, &error),
        }
    }
}
