//! A thread that completes packs while others go on.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::known::Known;
use crate::backend::Publish;
use crate::error::{Error, Result};
use crate::index::Entry;
use crate::pack::PackBuilder;
use crate::store::Shared;

/// Chunks after which a segment of the index is written in the middle of a save, so that a save of any size takes
/// bounded memory: about 70 bytes for each chunk.
pub(super) const INDEX_AFTER: usize = 1 << 20;

/// Packs that may wait to be made durable before writers wait too.
const QUEUE: usize = 2;

/// Makes packs durable, in the background: `fsync` waits for the disk, not for the processor.
pub(super) struct Publisher {
    queue: Mutex<Option<SyncSender<PackBuilder>>>,
    thread: Mutex<Option<JoinHandle<Result<Written>>>>,
}

/// What was published and is not in the index yet.
#[derive(Default)]
pub(super) struct Written {
    pub(super) entries: Vec<Entry>,
    /// Bytes of all packs.
    pub(super) bytes: u64,
}

impl Publisher {
    /// Starts the thread; whenever it has `index_after` chunks, they go into the index.
    ///
    /// # Errors
    ///
    /// The system has no thread to give.
    pub(super) fn start(
        shared: Arc<Shared>,
        known: Arc<Known>,
        index_after: usize,
    ) -> Result<Self> {
        let (queue, packs) = sync_channel::<PackBuilder>(QUEUE);
        let thread = std::thread::Builder::new()
            .name("dedup-publish".into())
            .spawn(move || {
                let mut written = Written::default();
                for pack in packs {
                    let published = pack.publish(Publish::New)?;
                    written.bytes += published.size;
                    let entry = |(slot, id)| Entry {
                        id,
                        pack: published.id,
                        slot,
                    };
                    written
                        .entries
                        .extend(published.slots.into_iter().map(entry));
                    if written.entries.len() >= index_after {
                        index(&shared, &known, std::mem::take(&mut written.entries));
                    }
                }
                Ok(written)
            });
        let thread = thread.map_err(Error::io("start a thread"))?;
        Ok(Publisher {
            queue: Mutex::new(Some(queue)),
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Hands over a pack that is full.
    pub(super) fn publish(&self, pack: PackBuilder) -> Result<()> {
        let queue = self
            .queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if queue.is_some_and(|queue| queue.send(pack).is_ok()) {
            return Ok(());
        }
        // The thread has ended early, which it does only with an error.
        self.finish().map(drop)
    }

    /// Waits until all packs are published.
    pub(super) fn finish(&self) -> Result<Written> {
        drop(
            self.queue
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let joined = thread.map(JoinHandle::join);
        match joined {
            Some(Ok(result)) => result,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Err(Error::Parameter("this save has failed before".into())),
        }
    }
}

/// Hands chunks over to the index. It is advice: where it cannot be written, they are stored again when they come again.
fn index(shared: &Shared, known: &Known, entries: Vec<Entry>) {
    let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
    let _ = shared.index.add(&*shared.backend, &shared.config, entries);
    // In this order, so that they are always known by one or the other. And in any case, for there is memory for so many.
    ids.iter().for_each(|id| known.remove(id));
}

impl Drop for Publisher {
    fn drop(&mut self) {
        // What was not committed is garbage, and so is its error.
        drop(
            self.queue
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(thread.map(JoinHandle::join));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CreateOptions;
    use crate::frame::Encoder;
    use crate::name::FileId;
    use crate::recipe::Place;
    use crate::store::{OpenOptions, Store};

    #[test]
    fn an_index_that_cannot_be_written_fails_no_save() {
        let dir = tempfile::tempdir().unwrap();
        let (create, open) = (CreateOptions::default(), OpenOptions::default());
        let shared = Store::create_dir(dir.path(), &create, open).unwrap().shared;
        let index = dir.path().join("index");
        std::fs::remove_dir(&index).unwrap();
        std::fs::write(&index, "no directory").unwrap();
        let known = Arc::new(Known::new());
        let publisher = Publisher::start(shared.clone(), known.clone(), 1).unwrap();
        let mut ids = Vec::new();
        for byte in 1..4 {
            let page = [byte; 4096];
            let id = shared.identifier().unwrap().identify(&page);
            known.get_or_insert(id, || Place::ZERO);
            let mut pack = PackBuilder::new(&shared, FileId::random().unwrap()).unwrap();
            let mut encoder = Encoder::new(shared.config.level).unwrap();
            let frame = encoder.encode(0, 1, &page, None).unwrap().to_vec();
            pack.append(0, &frame, &[Some(id)]).unwrap();
            publisher.publish(pack).unwrap();
            ids.push(id);
        }
        let written = publisher.finish().unwrap();
        assert!(written.bytes > 0 && written.entries.is_empty());
        assert!(ids.iter().all(|id| known.get(id).is_none()));
        let packs = shared.backend.list(crate::backend::Area::Packs).unwrap();
        assert_eq!(packs.len(), 3);
    }
}
