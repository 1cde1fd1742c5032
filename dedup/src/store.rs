//! The store: what the library is about.

use std::path::Path;
use std::sync::Arc;

use crate::annotation;
use crate::backend::{Area, Backend, LocalDir, Publish};
use crate::config::{Config, CreateOptions};
use crate::error::{Error, Result};
use crate::facts::{Facts, SnapshotId};
use crate::hash::Identifier;
use crate::index::Index;
use crate::key::Key;
use crate::name::FileId;
use crate::pack::{ChunkIds, IdsCache, Pack, ids_cache};
use crate::progress::Progress;
use crate::read::{Frames, ImageReader};
use crate::refs;
use crate::seal::{Access, Keys};
use crate::snapshot::Snapshot;
use crate::write::{Saved, Writer};

/// The name of the image in a snapshot of a single file.
pub const FILE_IMAGE: &str = "file";

/// The name of the file with the store's parameters.
pub(crate) const CONFIG: &str = "config";

/// How to open a store.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The key that the store was created with, if it is encrypted.
    pub key: Option<Key>,
    /// Threads for saving and loading; by default one for each core.
    pub threads: usize,
    /// Bytes of the index to hold in memory while saving. What is beyond is read from the backend, bucket by bucket.
    pub index_memory: u64,
    /// Bytes of decoded frames to keep for [`ImageReader::read_at`].
    pub frame_memory: u64,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            key: None,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            index_memory: 64 << 20,
            frame_memory: 64 << 20,
        }
    }
}

/// A deduplicating store of images. Clones share caches; any number of processes may have it open.
#[derive(Clone)]
pub struct Store {
    pub(crate) shared: Arc<Shared>,
}

/// What everything that belongs to an open store shares.
pub(crate) struct Shared {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) config: Config,
    pub(crate) keys: Access<Keys>,
    /// None without the key.
    identifier: Option<Identifier>,
    pub(crate) index: Index,
    pub(crate) frames: Frames,
    /// By the pack and its version: a collection may replace a pack between two saves.
    ids: IdsCache<(FileId, [u8; 16])>,
    pub(crate) threads: usize,
    pub(crate) progress: Progress,
}

impl Shared {
    /// Computes identities.
    ///
    /// # Errors
    ///
    /// [`Error::Key`] when that takes a key that is not at hand.
    pub(crate) fn identifier(&self) -> Result<&Identifier> {
        self.identifier
            .as_ref()
            .ok_or(Error::Key("no key was given"))
    }

    /// The identities of a pack's chunks, read once for all saves.
    pub(crate) fn ids_of(&self, pack: &Pack) -> Result<Arc<ChunkIds>> {
        self.ids
            .get_or_insert_with(&(pack.id(), pack.version()), || pack.ids().map(Arc::new))
    }

    /// Fails when a snapshot or tag has this name. Somebody may still take it: what counts is the publishing.
    pub(crate) fn check_name_is_free(&self, name: &str) -> Result<()> {
        for area in [Area::Snapshots, Area::Tags] {
            match self.backend.open(area, name) {
                Err(free) if free.kind() == std::io::ErrorKind::NotFound => {}
                Err(other) => {
                    return Err(Error::file(format!("look for {}", area.path(name)))(other));
                }
                Ok(_) => return Err(Error::NameTaken(name.to_owned())),
            }
        }
        Ok(())
    }
}

/// A snapshot's entry in [`Store::log`].
#[derive(Clone, Debug, serde::Serialize)]
pub struct LogEntry {
    /// The snapshot's name now.
    pub name: String,
    /// Its id.
    pub id: SnapshotId,
    /// Further names, in alphabetical order.
    pub tags: Vec<String>,
    /// Bytes of the snapshot's own file.
    pub file_bytes: u64,
    /// What the snapshot says about itself.
    pub facts: Facts,
}

/// What [`Store::list`] found.
#[derive(Debug, Default)]
pub struct Listing {
    /// Snapshots, newest first.
    pub snapshots: Vec<LogEntry>,
    /// What should be snapshots.
    pub unreadable: Vec<Unreadable>,
}

/// A snapshot that cannot be read.
#[derive(Debug)]
pub struct Unreadable {
    /// Its name.
    pub name: String,
    /// Why.
    pub error: Error,
}

impl Store {
    /// Creates a store in a directory, which is made if need be, and opens it.
    ///
    /// # Errors
    ///
    /// [`Error::StoreExists`]; [`Error::LostConfig`]; an impossible parameter; the directory cannot be written.
    pub fn create_dir(
        path: impl AsRef<Path>,
        create: &CreateOptions,
        open: OpenOptions,
    ) -> Result<Self> {
        let path = path.as_ref();
        let backend =
            LocalDir::create(path).map_err(Error::io(format!("make {}", path.display())))?;
        Store::create(backend, create, open)
    }

    /// Opens the store in a directory. Writes nothing: a read-only directory will do for reading.
    ///
    /// # Errors
    ///
    /// [`Error::NoStore`]; [`Error::LostConfig`]; [`Error::NewerStore`]; [`Error::Key`]; [`Error::Damaged`].
    pub fn open_dir(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        Store::open(LocalDir::new(path.as_ref()), options)
    }

    /// Creates a store in a backend that has none, and opens it.
    ///
    /// # Errors
    ///
    /// As [`Store::create_dir`].
    pub fn create(
        backend: impl Backend,
        create: &CreateOptions,
        mut open: OpenOptions,
    ) -> Result<Self> {
        let config = Config::new(create)?;
        check_holds_nothing(&backend)?;
        let failed = || Error::io("write config");
        let mut draft = backend.draft().map_err(failed())?;
        draft.append(&config.encode()).map_err(failed())?;
        draft.sync().map_err(failed())?;
        draft
            .publish(Area::Root, CONFIG, Publish::New)
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::AlreadyExists => Error::StoreExists,
                _ => failed()(error),
            })?;
        backend.sync(Area::Root).map_err(failed())?;
        open.key = create.key.clone();
        Store::open(backend, open)
    }

    /// Opens the store in a backend.
    ///
    /// # Errors
    ///
    /// As [`Store::open_dir`].
    pub fn open(backend: impl Backend, options: OpenOptions) -> Result<Self> {
        let config = read_config(&backend)?;
        let keys = config.unlock(options.key.as_ref())?;
        Ok(Store::with_keys(backend, config, keys, &options))
    }

    /// Opens the store in a directory for what takes no key; see [`Store::open_without_key`].
    ///
    /// # Errors
    ///
    /// As [`Store::open_dir`], but for the key.
    pub fn open_dir_without_key(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        Store::open_without_key(LocalDir::new(path.as_ref()), options)
    }

    /// Opens a store for what takes no key, whether or not it is encrypted: [`Store::log`], [`Store::show`],
    /// [`Store::stat`], [`Store::tag`] and [`Store::rm`] work as always; [`Store::fsck`] checks digests and
    /// decodes nothing; [`Store::gc`] removes packs that no snapshot names and shrinks none. Everything else is
    /// [`Error::Key`] in an encrypted store. The key of `options` is not looked at.
    ///
    /// # Errors
    ///
    /// As [`Store::open_dir`], but for the key.
    pub fn open_without_key(backend: impl Backend, options: OpenOptions) -> Result<Self> {
        let config = read_config(&backend)?;
        let keys = if config.is_encrypted() {
            Access::Locked
        } else {
            Access::Plain
        };
        Ok(Store::with_keys(backend, config, keys, &options))
    }

    fn with_keys(
        backend: impl Backend,
        config: Config,
        keys: Access<Keys>,
        options: &OpenOptions,
    ) -> Self {
        let identifier = match &keys {
            Access::Plain => Some(Identifier::new(None)),
            Access::Locked => None,
            Access::Open(keys) => Some(Identifier::new(Some(keys.identities()))),
        };
        Store {
            shared: Arc::new(Shared {
                backend: Arc::new(backend),
                keys,
                identifier,
                index: Index::new(options.index_memory),
                frames: Frames::new(options.frame_memory),
                ids: ids_cache(),
                threads: options.threads.max(1),
                progress: Progress::default(),
                config,
            }),
        }
    }

    /// Whether the store is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.shared.config.is_encrypted()
    }

    /// The store's id: random, given to it when it was created.
    #[must_use]
    pub fn id(&self) -> [u8; 16] {
        self.shared.config.store_id.0
    }

    /// How far the collection, check or repair is that runs on this open store, in bytes of packs.
    #[must_use]
    pub fn progress(&self) -> &Progress {
        &self.shared.progress
    }

    /// Bytes of a chunk.
    #[must_use]
    pub fn chunk_size(&self) -> u32 {
        self.shared.config.chunk_size
    }

    /// Begins a snapshot. With a parent (a name, tag or id), unchanged chunks can be kept from it, and others
    /// are looked for at their old places first.
    ///
    /// # Errors
    ///
    /// [`Error::NameTaken`]; no such parent; the store cannot be written.
    pub fn writer(&self, name: &str, parent: Option<&str>) -> Result<Writer> {
        let parent = parent.map(|parent| self.resolve(parent)).transpose()?;
        Writer::new(self.shared.clone(), name, parent)
    }

    /// Saves a file as a snapshot with the one image [`FILE_IMAGE`].
    ///
    /// # Errors
    ///
    /// As [`Store::writer`]; the file cannot be read.
    pub fn save_file(&self, name: &str, path: impl AsRef<Path>) -> Result<Saved> {
        let mut writer = self.writer(name, None)?;
        writer.images_from_files(&[(FILE_IMAGE, path.as_ref())])?;
        writer.commit()
    }

    /// Loads a snapshot that [`Store::save_file`] made into a file.
    ///
    /// # Errors
    ///
    /// As [`Store::image`] and [`ImageReader::load_file`].
    pub fn load_file(&self, snapshot: &str, path: impl AsRef<Path>) -> Result<()> {
        self.image(snapshot, FILE_IMAGE)?.load_file(path.as_ref())
    }

    /// Opens an image of a snapshot (by name, tag or id) for reading.
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshot`]; [`Error::NoImage`]; [`Error::Damaged`].
    pub fn image(&self, snapshot: &str, image: &str) -> Result<ImageReader> {
        let snapshot = self.resolve(snapshot)?;
        ImageReader::open(self.shared.clone(), &snapshot, image)
    }

    /// The opaque bytes that a snapshot was saved with.
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshot`]; [`Error::Damaged`].
    pub fn manifest(&self, snapshot: &str) -> Result<Vec<u8>> {
        self.resolve(snapshot)?.manifest()
    }

    /// Looks a snapshot up (by name, tag or id) once, for all that is wanted of it.
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshot`]; [`Error::Damaged`].
    pub fn snapshot(&self, reference: &str) -> Result<SnapshotReader> {
        Ok(SnapshotReader {
            shared: self.shared.clone(),
            snapshot: self.resolve(reference)?,
        })
    }

    /// What one snapshot says about itself.
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshot`]; [`Error::Damaged`].
    pub fn show(&self, snapshot: &str) -> Result<LogEntry> {
        let snapshot = self.resolve(snapshot)?;
        let tags = refs::tags_by_snapshot(&*self.shared.backend)?;
        Ok(log_entry(snapshot, &tags))
    }

    /// All snapshots, newest first.
    ///
    /// # Errors
    ///
    /// A snapshot cannot be read; see [`Store::list`].
    pub fn log(&self) -> Result<Vec<LogEntry>> {
        let listing = self.list()?;
        match listing.unreadable.into_iter().next() {
            Some(unreadable) => Err(unreadable.error),
            None => Ok(listing.snapshots),
        }
    }

    /// All snapshots that can be read, newest first, and those that cannot.
    ///
    /// # Errors
    ///
    /// The lists of snapshots or tags cannot be made.
    pub fn list(&self) -> Result<Listing> {
        let tags = refs::tags_by_snapshot(&*self.shared.backend)?;
        let mut listing = Listing::default();
        for (name, opened) in refs::open_all(&self.shared)? {
            match opened {
                Ok(snapshot) => listing.snapshots.push(log_entry(snapshot, &tags)),
                Err(error) => listing.unreadable.push(Unreadable { name, error }),
            }
        }
        listing
            .snapshots
            .sort_by(|a, b| (b.facts.created_ms, &b.name).cmp(&(a.facts.created_ms, &a.name)));
        Ok(listing)
    }

    /// Gives a snapshot a further name. A tag of this name is moved to it.
    ///
    /// # Errors
    ///
    /// [`Error::Name`]; [`Error::NameTaken`] by a snapshot; [`Error::NoSnapshot`].
    pub fn tag(&self, snapshot: &str, tag: &str) -> Result<()> {
        let snapshot = self.resolve(snapshot)?;
        refs::set_tag(&*self.shared.backend, tag, snapshot.id)
    }

    /// Removes a tag, or a snapshot with all its tags. What only it referred to goes with the next [`Store::gc`].
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshot`]; the store cannot be written.
    pub fn rm(&self, name: &str) -> Result<()> {
        refs::remove(&self.shared, name)
    }

    /// The snapshot with this name, tag or id.
    pub(crate) fn resolve(&self, reference: &str) -> Result<Snapshot> {
        refs::resolve(&self.shared, reference)
    }
}

/// A snapshot that was looked up. Whatever becomes of its names, this stays the one.
#[derive(Clone)]
pub struct SnapshotReader {
    shared: Arc<Shared>,
    snapshot: Snapshot,
}

impl SnapshotReader {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.snapshot.id
    }

    /// Its name, of which it may have been found by a tag or by its id.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.snapshot.name
    }

    /// The opaque bytes that it was saved with.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`].
    pub fn manifest(&self) -> Result<Vec<u8>> {
        self.snapshot.manifest()
    }

    /// What it says about itself.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.snapshot.facts
    }

    /// The names of its images, in the order in which they were saved.
    pub fn images(&self) -> impl Iterator<Item = &str> {
        self.snapshot
            .facts
            .images
            .iter()
            .map(|image| image.name.as_str())
    }

    /// What was kept beside it under this name, if anything.
    ///
    /// # Errors
    ///
    /// [`Error::Name`]; [`Error::Key`]; [`Error::Damaged`]; [`Error::NewerFile`]. The snapshot is whole nevertheless.
    pub fn annotation(&self, name: &str) -> Result<Option<Vec<u8>>> {
        annotation::read(&self.shared, &self.snapshot, name)
    }

    /// Whether anything can be kept beside it at all: the store can be written to.
    #[must_use]
    pub fn can_be_annotated(&self) -> bool {
        self.shared.backend.draft().is_ok()
    }

    /// Keeps `content`, of at most [`MAX_ANNOTATION_BYTES`](crate::MAX_ANNOTATION_BYTES), beside it under a name of at most 64
    /// characters, in place of what was there. It is there, whole and durably, when this returns, and goes with the snapshot.
    ///
    /// # Errors
    ///
    /// [`Error::Name`]; [`Error::Parameter`] for too much; [`Error::Key`]; [`Error::NoSnapshot`] when the snapshot was
    /// removed meanwhile; the store cannot be written.
    pub fn annotate(&self, name: &str, content: &[u8]) -> Result<()> {
        annotation::write(&self.shared, &self.snapshot, name, content)
    }

    /// Opens one of its images for reading.
    ///
    /// # Errors
    ///
    /// [`Error::NoImage`]; [`Error::Damaged`]; the snapshot was removed meanwhile.
    pub fn image(&self, image: &str) -> Result<ImageReader> {
        ImageReader::open(self.shared.clone(), &self.snapshot, image)
    }
}

fn log_entry(snapshot: Snapshot, tags: &[(String, SnapshotId)]) -> LogEntry {
    let tags = tags
        .iter()
        .filter(|(_, id)| *id == snapshot.id)
        .map(|(tag, _)| tag.clone())
        .collect();
    LogEntry {
        file_bytes: snapshot.size(),
        name: snapshot.name,
        id: snapshot.id,
        tags,
        facts: snapshot.facts,
    }
}

/// Fails when there is what only a store can have: with other parameters than its own, nothing of it could be read, and
/// all of it be collected.
fn check_holds_nothing(backend: &dyn Backend) -> Result<()> {
    for area in [Area::Packs, Area::Snapshots] {
        let listed = backend
            .list(area)
            .map_err(Error::file(format!("list {}", area.dir())))?;
        if listed.is_empty() {
            continue;
        }
        // Whoever has written them has found a config before, and it never goes.
        return Err(match read_config(backend) {
            Err(lost @ Error::LostConfig(_)) => lost,
            _ => Error::StoreExists,
        });
    }
    Ok(())
}

/// Why there is no `config`: no store, or one that has lost it, which nobody may be told to make anew.
fn without_config(backend: &dyn Backend) -> Error {
    let holds = |area: &Area| backend.list(*area).is_ok_and(|files| !files.is_empty());
    [Area::Packs, Area::Snapshots]
        .iter()
        .find(|area| holds(area))
        .map_or(Error::NoStore, |area| Error::LostConfig(area.dir()))
}

/// Reads the store's parameters.
pub(crate) fn read_config(backend: &dyn Backend) -> Result<Config> {
    let file = backend
        .open(Area::Root, CONFIG)
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => without_config(backend),
            _ => Error::file("read config")(error),
        })?;
    // A config of another length is damaged, but may be of a newer version.
    let mut bytes = vec![0; file.size().min(4096) as usize];
    file.read_exact_at(&mut bytes, 0)
        .map_err(Error::file("read config"))?;
    Config::parse(&bytes, CONFIG)
}
