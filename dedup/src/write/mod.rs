//! Saving.

mod blocks;
mod file;
mod files;
mod image;
mod known;
mod parent;
mod publisher;
mod session;
mod worker;

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

pub use image::{ImageStats, ImageWriter};

use image::Image;
use session::Session;
use worker::Worker;

use crate::backend::Area;
use crate::error::{Error, Result};
use crate::facts::{SnapshotId, as_text};
use crate::name::check_name;
use crate::snapshot::{self, ImageDraft, Snapshot, SnapshotDraft};
use crate::store::Shared;
use parent::ParentSnapshot;

/// A snapshot in work. Nothing of it is visible before [`Writer::commit`]; dropped, it leaves at most packs
/// that the next collection removes.
pub struct Writer {
    session: Session,
    name: String,
    parent: Option<ParentSnapshot>,
    images: Vec<ImageDraft>,
    manifest: Vec<u8>,
    /// Whether an image failed: with the thread that was at it went chunks of earlier images, too.
    failed: bool,
    /// One for each thread, when they are not at work.
    workers: Mutex<Vec<Worker>>,
}

/// A snapshot that is saved, durably.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Saved {
    /// Its id.
    pub id: SnapshotId,
    /// Its name.
    pub name: String,
    /// What became of its images.
    pub images: Vec<ImageStats>,
    /// Bytes of new packs.
    pub pack_bytes: u64,
    /// Bytes of the snapshot's own file.
    pub snapshot_bytes: u64,
}

impl Writer {
    pub(crate) fn new(shared: Arc<Shared>, name: &str, parent: Option<Snapshot>) -> Result<Self> {
        check_name(name)?;
        shared.check_name_is_free(name)?;
        let session = Session::new(shared)?;
        let parent = parent.map(|parent| ParentSnapshot::open(&session, parent));
        let parent = parent.transpose()?;
        Ok(Writer {
            session,
            name: name.to_owned(),
            parent,
            images: Vec::new(),
            manifest: Vec::new(),
            failed: false,
            workers: Mutex::default(),
        })
    }

    /// The parent's id, if there is one.
    pub fn parent_id(&self) -> Option<SnapshotId> {
        self.parent.as_ref().map(|parent| parent.snapshot.id)
    }

    /// Bytes of the image of this name in the parent, if there is one: it can be kept from there.
    pub fn parent_size(&self, image: &str) -> Option<u64> {
        let image = self.parent.as_ref()?.image(image)?;
        Some(image.size())
    }

    /// Begins an image.
    ///
    /// # Errors
    ///
    /// The name is impossible, or the snapshot has an image of this name; the parent's image cannot be read.
    pub fn image(&mut self, name: &str) -> Result<ImageWriter<'_>> {
        self.check_whole()?;
        self.check_image_name(name)?;
        ImageWriter::new(self, name)
    }

    /// Saves whole files, or block devices, as an image each. Holes are not read. All threads work on all of the
    /// files: none waits for the others where one ends.
    ///
    /// # Errors
    ///
    /// As [`Writer::image`], for a name before anything is done; a file cannot be read, or is neither a file nor a block
    /// device. The snapshot in work is then useless.
    pub fn images_from_files(&mut self, files: &[(&str, &Path)]) -> Result<Vec<ImageStats>> {
        self.check_whole()?;
        let mut names = HashSet::new();
        for (name, _) in files {
            self.check_image_name(name)?;
            if !names.insert(name) {
                return Err(Error::ImageTaken((*name).to_owned()));
            }
        }
        let mut stats = Vec::with_capacity(files.len());
        for some in files.chunks(files::MAX_OPEN) {
            let saved = files::save(self, some);
            stats.extend(saved.inspect_err(|_| self.failed = true)?);
        }
        Ok(stats)
    }

    /// Sets the opaque bytes that the snapshot carries besides its images.
    pub fn set_manifest(&mut self, manifest: Vec<u8>) {
        self.manifest = manifest;
    }

    /// Completes the snapshot. When this returns, it survives a power cut.
    ///
    /// # Errors
    ///
    /// [`Error::NameTaken`] when another was faster; [`Error::Repaired`]; [`Error::Parameter`] when it is larger than any that is read;
    /// the store cannot be written; an image has failed before. The snapshot does not exist then, unless it was the last of all writes that failed, the one
    /// that makes its name durable.
    pub fn commit(self) -> Result<Saved> {
        self.check_whole()?;
        let shared = self.session.shared.clone();
        for worker in self
            .workers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter_mut()
        {
            worker.flush(&self.session)?;
        }
        let written = self.session.finish_packs()?;
        // Also for packs of others that this snapshot refers to and that they may not have synced yet.
        shared
            .backend
            .sync(Area::Packs)
            .map_err(Error::io("sync packs"))?;

        let images = self
            .images
            .iter()
            .map(|image| ImageStats::of(image, shared.config.chunk_size))
            .collect();
        let draft = SnapshotDraft {
            name: self.name.clone(),
            created_ms: now_ms(),
            host: as_text(&rustix::system::uname().nodename().to_string_lossy()),
            parent: self.parent.map(|parent| parent.snapshot.id),
            images: self.images,
            manifest: self.manifest,
        };
        let (bytes, id) = draft.encode(self.session.snapshot_keys.as_ref())?;
        shared.check_name_is_free(&self.name)?;
        self.session.check_unchanged()?;
        snapshot::publish(&*shared.backend, &self.name, &bytes)?;
        shared
            .backend
            .sync(Area::Snapshots)
            .map_err(Error::io("sync snapshots"))?;
        // The snapshot is there, whatever becomes of the index: without it, later saves store more.
        let _ = shared
            .index
            .add(&*shared.backend, &shared.config, written.entries);
        Ok(Saved {
            id,
            name: self.name,
            images,
            pack_bytes: written.bytes,
            snapshot_bytes: bytes.len() as u64,
        })
    }

    fn check_whole(&self) -> Result<()> {
        if self.failed {
            return Err(Error::Parameter(
                "an image of this snapshot could not be saved: begin the snapshot anew".into(),
            ));
        }
        Ok(())
    }

    /// A worker that has nothing to do, or a new one.
    fn take_worker(&self) -> Result<Worker> {
        let idle = self
            .workers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        idle.map_or_else(|| Worker::new(self.session.shared.config.level), Ok)
    }

    fn return_worker(&self, worker: Worker) {
        self.workers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(worker);
    }

    fn check_image_name(&self, name: &str) -> Result<()> {
        check_name(name)?;
        if self.images.iter().any(|image| image.name == name) {
            return Err(Error::ImageTaken(name.to_owned()));
        }
        Ok(())
    }

    /// Adds an image that is complete.
    fn add_image(&mut self, image: Image) -> ImageStats {
        let mut draft = image.draft;
        draft.packs = self.session.table(&image.packs);
        let stats = ImageStats::of(&draft, self.session.shared.config.chunk_size);
        self.images.push(draft);
        stats
    }
}

fn now_ms() -> u64 {
    // A clock before 1970 is wrong, but no reason not to save.
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}
