//! What comes before everything that nobody waits for: the machine's working set, or, where none is kept, the time in which it is
//! recorded.
//!
//! It is recorded by who waits for pages. Who reads the rest would come before some of them, and so does not read meanwhile.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use dedup::{Piece, SnapshotReader};
use memory::PAGE_BYTES;

use super::{Bringing, NICE, OnDemand, cores, lost::Cause};
use crate::{
    WorkingSet,
    working_set::{MAX_PAGES, page_offsets},
};

/// How long a machine runs whose working set is recorded. Time in which it mostly waits for pages is not counted: with its working
/// set there, it comes as far in that second as it does without waiting.
const RECORDED: Duration = Duration::from_secs(1);

/// How long that takes at most, as the rest does not come meanwhile.
const RECORDED_WITHIN: Duration = Duration::from_secs(4);

/// How often it is looked whether the machine runs.
const SLICE: Duration = Duration::from_millis(10);

/// Who waits for a page more often than so mostly waits: one takes a tenth of that.
const SELDOM: Duration = Duration::from_millis(1);

/// Pieces that are put in the order in which they are stored, and not in that in which they were touched: so many that what lies
/// together is read together, and so few that what was touched first comes first.
const WINDOW: usize = 1024;

/// Pieces that a thread takes at a time.
const TURN: usize = 16;

/// What is done with the working set that is kept beside a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UseWorkingSet {
    /// It comes first. If there is none, it is recorded.
    #[default]
    Bring,
    /// It is recorded, in place of what is kept.
    Record,
    /// It is neither used nor recorded.
    Ignore,
}

/// What comes first.
pub(crate) enum First {
    Bring(WorkingSet),
    Record(Box<Recorder>),
    Nothing,
}

impl First {
    /// What there is to do first of `snapshot`. What is kept is advice: that it cannot be read is no reason not to go on.
    pub(crate) fn of(snapshot: &SnapshotReader, wanted: UseWorkingSet) -> Self {
        let record = || match snapshot.can_be_annotated() {
            true => Self::Record(Box::new(Recorder::new(snapshot.clone()))),
            // Else everything would be kept waiting for nothing.
            false => Self::Nothing,
        };
        match wanted {
            UseWorkingSet::Ignore => Self::Nothing,
            UseWorkingSet::Record => record(),
            UseWorkingSet::Bring => match WorkingSet::of(snapshot) {
                Ok(Some(set)) => Self::Bring(set),
                Ok(None) => record(),
                Err(error) => {
                    tracing::warn!("the working set is not used, and recorded anew: {error}");
                    record()
                }
            },
        }
    }
}

/// Takes note of pages that somebody waited for.
pub(crate) struct Recorder {
    snapshot: SnapshotReader,
    /// Offsets of pages, no more than [`MAX_PAGES`]; none any more once it has ended.
    pages: Mutex<Option<Vec<u64>>>,
    count: AtomicU64,
}

impl Recorder {
    fn new(snapshot: SnapshotReader) -> Self {
        Self {
            snapshot,
            pages: Mutex::new(Some(Vec::new())),
            count: AtomicU64::new(0),
        }
    }

    /// Somebody waited for `page`. Returns whether there is room for no more.
    pub(super) fn note(&self, page: u64) -> bool {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(pages) = pages.as_mut().filter(|pages| pages.len() < MAX_PAGES) else {
            return false;
        };
        pages.push(page);
        self.count.store(pages.len() as u64, Ordering::Relaxed);
        self.is_full()
    }

    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    fn is_full(&self) -> bool {
        self.count() >= MAX_PAGES as u64
    }

    fn end(&self) -> WorkingSet {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let pages = pages.take().unwrap_or_default();
        WorkingSet::new(pages.into_iter().map(|page| page / PAGE_BYTES))
    }
}

/// Has the rest wait until this is dropped.
pub(super) struct BeforeRest<'b>(&'b Bringing);

impl Drop for BeforeRest<'_> {
    fn drop(&mut self) {
        self.0.work().first_is_done = true;
        self.0.changed.notify_all();
    }
}

impl OnDemand {
    /// Pages of the working set that was kept beside the snapshot, and comes first; 0 without one.
    pub fn working_set_pages(&self) -> u64 {
        self.state.working_set_pages.load(Ordering::Relaxed)
    }

    /// Bytes that came first, with it, and that nobody had to wait for.
    pub fn working_set_bytes(&self) -> u64 {
        self.state.working_set_bytes.load(Ordering::Relaxed)
    }

    /// Whether the working set has come, as far as it can; so it has if there is none, and it is not recorded.
    pub fn has_working_set_come(&self) -> bool {
        self.bringing
            .upgrade()
            .is_none_or(|bringing| bringing.work().first_is_done)
    }

    /// The machine stands still, so that nothing can be said of a second of its running: no working set is recorded, if one is.
    pub fn stands_still(&self) {
        if let Some(bringing) = self.bringing.upgrade() {
            bringing.work().is_hurried = true;
            bringing.changed.notify_all();
        }
    }

    /// Pages of the working set that is recorded, so far, or was; 0 if it is not.
    pub fn recorded_pages(&self) -> u64 {
        self.state.recorded_pages.load(Ordering::Relaxed)
    }
}

impl Bringing {
    /// Brings the working set, on all cores, and then lets the rest come.
    #[tracing::instrument(skip_all, fields(snapshot = self.name))]
    pub(super) fn bring_working_set(&self) {
        let _first = BeforeRest(self);
        let First::Bring(set) = &self.first else {
            return;
        };
        let begun = Instant::now();
        let offsets: Vec<u64> = page_offsets(set).collect();
        let found = self.reading(|| self.image.pieces(&offsets));
        let mut pieces = match found {
            Ok(pieces) => pieces,
            Err(error) => return tracing::warn!("the working set does not come first: {error}"),
        };
        pieces.chunks_mut(WINDOW).for_each(<[_]>::sort_unstable);
        let turns = Mutex::new(pieces.chunks(TURN));
        let next = || turns.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || match self.bring_pieces(next) {
            Ok(()) | Err(Cause::Stopped) => {}
            // Who waits for it, or reads the rest, says what is to be said.
            Err(cause) => tracing::debug!("not all of the working set comes first: {cause}"),
        };
        thread::scope(|scope| {
            for _ in 1..cores() {
                // Those that the host does not give, the others do the work of.
                let _ = thread::Builder::new()
                    .name("working-set".to_owned())
                    .spawn_scoped(scope, work);
            }
            work();
        });
        tracing::info!(
            pages = offsets.len(),
            us = begun.elapsed().as_micros() as u64,
            "the working set has come"
        );
    }

    fn bring_pieces<'p>(&self, next: impl Fn() -> Option<&'p [Piece]>) -> Result<(), Cause> {
        let mut reader = self.image.part_reader()?;
        while let Some(pieces) = next() {
            if self.work().is_ended() {
                return Err(Cause::Stopped);
            }
            self.reading(|| {
                for piece in pieces {
                    if !self.arrivals.is_missing(&piece.range) {
                        continue;
                    }
                    let new = match reader.read_piece(piece)? {
                        Some(bytes) => self.put(piece.range.start, bytes)?,
                        None => self.arrivals.put_zeros(&piece.range)?,
                    };
                    let bytes = &self.state.working_set_bytes;
                    bytes.fetch_add(new, Ordering::Relaxed);
                }
                Ok::<_, Cause>(())
            })?;
        }
        Ok(())
    }

    /// Somebody waits for the page at this offset.
    pub(super) fn note_touch(&self, page: u64) {
        if let First::Record(recorder) = &self.first {
            let is_full = recorder.note(page);
            let count = recorder.count();
            self.state.recorded_pages.store(count, Ordering::Relaxed);
            if is_full {
                self.changed.notify_all();
            }
        }
    }

    /// Waits until the working set is recorded, lets the rest come, and keeps it. Where it cannot be kept, the machine runs on.
    #[tracing::instrument(skip_all, fields(snapshot = self.name))]
    pub(super) fn record(&self) {
        let First::Record(recorder) = &self.first else {
            return;
        };
        let first = BeforeRest(self);
        let is_whole = self.wait_while_recording(recorder);
        drop(first);
        let set = recorder.end();
        if !is_whole {
            tracing::debug!("the working set is not recorded: it did not run long enough alone");
            return;
        }
        // It is this thread's alone.
        let _ = rustix::process::setpriority_process(None, NICE);
        match set.keep(&recorder.snapshot) {
            Ok(()) => tracing::info!(pages = set.pages().len(), "the working set is recorded"),
            Err(error) => tracing::warn!(
                "the working set is not kept, and the machine runs on: {}",
                crate::error::in_full(&error)
            ),
        }
    }

    /// Returns whether nothing came in between.
    fn wait_while_recording(&self, recorder: &Recorder) -> bool {
        let begun = Instant::now();
        let (mut ran, mut last, mut pages) = (Duration::ZERO, begun, recorder.count());
        let mut work = self.work();
        loop {
            if work.is_hurried || work.is_ended() {
                return false;
            }
            let is_long = ran >= RECORDED || begun.elapsed() >= RECORDED_WITHIN;
            if is_long || recorder.is_full() {
                return true;
            }
            let waited = self.changed.wait_timeout(work, SLICE);
            (work, _) = waited.unwrap_or_else(PoisonError::into_inner);
            let (passed, count) = (last.elapsed(), recorder.count());
            if u128::from(count - pages) * SELDOM.as_nanos() <= passed.as_nanos() {
                ran += passed;
            }
            (last, pages) = (last + passed, count);
        }
    }
}
