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
const INDEX_AFTER: usize = 1 << 20;

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
    pub(super) fn start(shared: Arc<Shared>, known: Arc<Known>) -> Result<Self> {
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
                    if written.entries.len() >= INDEX_AFTER {
                        let entries = std::mem::take(&mut written.entries);
                        let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
                        shared
                            .index
                            .add(&*shared.backend, &shared.config, entries)?;
                        // In this order, so that they are always known by one or the other.
                        ids.iter().for_each(|id| known.remove(id));
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
