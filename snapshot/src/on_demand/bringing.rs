//! What the threads do that bring memory.

use std::{
    collections::BTreeSet,
    ops::Range,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use dedup::{Around, ImageReader, PartReader};
use memory::{Arrivals, Layout, PAGE_BYTES};

use super::{First, Lost, OnLoss, State, lost::Cause, plan::Plan};
use crate::Error;

/// Where somebody waits for a page of zeros, this much of them comes at once.
const ZEROS_AT_ONCE: u64 = 64 << 10;

/// How long a thread rests that is told again of a page that cannot be had. Who waits for one within the kernel and has a signal
/// to handle asks for it without end.
const REST: Duration = Duration::from_millis(1);

/// How long a thread rests after a part that could not be read. A store that is away refuses each at once.
const REST_AFTER_LOSS: Duration = Duration::from_millis(100);

/// How long it takes until what could not be read, and nobody waits for, is tried again; twice as long each time, up to the second of these.
pub(super) const AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

/// What its threads have in common.
pub(super) struct Bringing {
    /// The snapshot.
    pub(super) name: String,
    pub(super) image: Arc<ImageReader>,
    /// Shared by those who read the image; alone for who has it forget what it has open, which nobody may be about to put there
    /// again.
    pub(super) reading: RwLock<()>,
    pub(super) layout: Layout,
    pub(super) arrivals: Arrivals,
    pub(super) work: Mutex<Work>,
    /// Of `work`.
    pub(super) changed: Condvar,
    pub(super) state: Arc<State>,
    pub(super) first: First,
    pub(super) on_loss: OnLoss,
    pub(super) begun: Instant,
}

/// What is to be done, and what was.
pub(super) struct Work {
    pub(super) plan: Plan,
    /// Pages that somebody waits for and that could not be had.
    pub(super) owed: BTreeSet<u64>,
    /// What nobody waits for may come, too.
    pub(super) first_is_done: bool,
    /// The rest is not to wait any more: somebody waits until everything has come, or the machine stands still.
    pub(super) is_hurried: bool,
    /// When what could not be read is tried again, after all else.
    pub(super) again: Duration,
    /// Somebody has seen that everything is read.
    pub(super) all_read: bool,
    pub(super) complete: bool,
    pub(super) stopped: bool,
}

impl Work {
    /// Whether nothing is to be brought any more.
    pub(super) fn is_ended(&self) -> bool {
        self.stopped || self.complete
    }

    /// Whether only that is left which could not be read and nobody waits for. Of what somebody waits for, it is told who can have it tried again.
    fn lacks_what_may_come(&self) -> bool {
        self.plan.is_at_rest() && self.plan.has_failed() && self.owed.is_empty()
    }
}

/// How long a thread reads parts.
#[derive(Clone, Copy)]
pub(super) enum Patience<'a> {
    UntilComplete,
    /// And this says so.
    WhileThereAreParts(&'a (dyn Fn() -> bool + Sync)),
}

impl Bringing {
    /// Brings pages that somebody waits for, until it is stopped.
    pub(super) fn serve(&self) {
        // Whatever happens here, nobody is left waiting without a word.
        let _told = TellOfPanic(|| self.lose(0, &Cause::Panic));
        loop {
            match self.arrivals.wanted() {
                Ok(Some(pages)) => pages.into_iter().for_each(|page| self.serve_page(page)),
                Ok(None) => return,
                Err(e) => return self.lose(0, &Cause::Host(e)),
            }
        }
    }

    fn serve_page(&self, page: u64) {
        let is_owed = self.work().owed.contains(&page);
        let is_missing = self.arrivals.is_missing(&(page..page + PAGE_BYTES));
        if is_owed && is_missing {
            thread::sleep(REST);
            return;
        }
        self.state.waited_for.fetch_add(1, Ordering::Relaxed);
        if is_missing {
            // Before it comes: who waits for it goes on to the next then, which another thread brings.
            self.note_touch(page);
        }
        self.reading(|| match self.bring(page) {
            Ok(()) => self.work().plan.touched(page / self.image.part_bytes()),
            Err(cause) => self.lose(page, &cause),
        });
    }

    /// Has `read` read the image, and say what became of that; not within another of these.
    pub(super) fn reading<T>(&self, read: impl FnOnce() -> T) -> T {
        let _reading = self.reading.read().unwrap_or_else(PoisonError::into_inner);
        read()
    }

    /// Brings a page, and what comes with it.
    pub(super) fn bring(&self, page: u64) -> Result<(), Cause> {
        if !self.arrivals.is_missing(&(page..page + PAGE_BYTES)) {
            self.arrivals.release(page)?;
            return Ok(());
        }
        match self.image.around(page)? {
            Around::Zeros(range) => {
                let start = page - page % ZEROS_AT_ONCE;
                let window = start.max(range.start)..(start + ZEROS_AT_ONCE).min(range.end);
                self.arrivals.put_zeros(&window)?;
            }
            Around::Data(data) => drop(self.put(data.offset, data.bytes())?),
        }
        Ok(())
    }

    /// Returns how many bytes were not there yet.
    pub(super) fn put(&self, offset: u64, content: &[u8]) -> Result<u64, Cause> {
        let new = self.arrivals.put(offset, content)?;
        self.state.progress.advance(new);
        Ok(new)
    }

    /// Reads parts that nobody has read, with `patience`.
    pub(super) fn read_parts(&self, patience: Patience<'_>) {
        let mut reader = None;
        while let Some(part) = self.take_part(patience) {
            let read = self.reading(|| {
                let mut taken = Taken {
                    bringing: self,
                    part,
                    read: false,
                };
                match self.read_part(&mut reader, part) {
                    Ok(()) => taken.read = true,
                    Err(lost) => self.note(lost),
                }
                taken.read
            });
            if !read {
                thread::sleep(REST_AFTER_LOSS);
            }
        }
    }

    fn take_part(&self, patience: Patience<'_>) -> Option<u64> {
        let mut work = self.work();
        loop {
            if work.is_ended() {
                return None;
            }
            match patience {
                Patience::WhileThereAreParts(wanted) => {
                    return wanted().then(|| work.plan.take()).flatten();
                }
                Patience::UntilComplete if work.first_is_done => {
                    if let Some(part) = work.plan.take() {
                        return Some(part);
                    }
                }
                Patience::UntilComplete => {}
            }
            work = match work.lacks_what_may_come() {
                true => self.wait_to_look_again(work),
                false => self.wait(work),
            };
        }
    }

    /// Waits for a change, or until what could not be read is to be tried again, and then has it tried.
    fn wait_to_look_again<'w>(&'w self, work: MutexGuard<'w, Work>) -> MutexGuard<'w, Work> {
        let again = work.again;
        let (mut work, in_vain) = self.wait_for(work, again);
        // Of all who wait here, the first.
        if !in_vain || !work.lacks_what_may_come() || work.again != again {
            return work;
        }
        work.again = (again * 2).min(AGAIN[1]);
        drop(work);
        self.look_anew();
        self.changed.notify_all();
        self.work()
    }

    fn read_part<'r>(&'r self, reader: &mut Option<PartReader<'r>>, part: u64) -> Result<(), Lost> {
        if self.read_at_once(reader, part).is_ok() {
            return Ok(());
        }
        // It has a pack open, which may be replaced by one that is repaired.
        *reader = None;
        // Bit by bit: all comes that can, and what cannot is named.
        let mut lost = Ok(());
        let range = self.image.part(part);
        for offset in range.step_by(self.image.chunk_bytes() as usize) {
            let end = (offset + self.image.chunk_bytes()).min(self.image.size());
            if self.arrivals.is_missing(&(offset..end))
                && let Err(cause) = self.bring(offset)
            {
                lost = lost.and(Err(self.lost(offset, &cause)));
            }
        }
        lost
    }

    fn read_at_once<'r>(
        &'r self,
        reader: &mut Option<PartReader<'r>>,
        part: u64,
    ) -> Result<(), Cause> {
        let reader = match reader {
            Some(reader) => reader,
            None => reader.insert(self.image.part_reader()?),
        };
        let wanted = |range: &Range<u64>| self.arrivals.is_missing(range);
        reader.read(part, wanted, |offset, bytes| {
            self.put(offset, bytes).map(drop)
        })
    }

    /// Takes note that a part was read, or was not; after the last one, memory is like any other.
    fn end_part(&self, part: u64, read: bool) {
        let mut work = self.work();
        work.plan.put_back(part, read);
        if read {
            work.again = AGAIN[0];
        }
        let last = work.plan.is_done() && !work.all_read;
        work.all_read |= last;
        drop(work);
        if last {
            self.complete();
        }
        self.changed.notify_all();
    }

    pub(super) fn complete(&self) {
        match self.arrivals.complete() {
            Ok(()) => self.arrivals.stop(),
            Err(e) => tracing::warn!("the first touch of a page stays slow in this machine: {e}"),
        }
        // Zeros that nobody asked for do not come, nor what the guest gave back.
        let progress = &self.state.progress;
        progress.advance(progress.total().saturating_sub(progress.done()));
        self.work().complete = true;
        tracing::info!(
            bytes = progress.total(),
            waited_for = self.state.waited_for.load(Ordering::Relaxed),
            ms = self.begun.elapsed().as_millis() as u64,
            "all of the machine's memory is there"
        );
    }

    pub(super) fn need(&self, gpas: Range<u64>) -> Result<(), Lost> {
        let start = gpas.start - gpas.start % PAGE_BYTES;
        for range in self.layout.image_ranges(start..gpas.end) {
            for page in range.step_by(PAGE_BYTES as usize) {
                if let Err(cause) = self.reading(|| self.bring(page)) {
                    let lost = self.lost(page, &cause);
                    self.note(lost.clone());
                    return Err(lost);
                }
            }
        }
        Ok(())
    }

    pub(super) fn retry(&self) -> Result<(), Lost> {
        let lacks_nothing = {
            let work = self.work();
            work.owed.is_empty() && !work.plan.has_failed()
        };
        if lacks_nothing && self.state.lost().is_none() {
            return Ok(());
        }
        let owed = self.look_anew();
        self.changed.notify_all();
        let mut result = Ok(());
        for page in owed {
            if let Err(cause) = self.reading(|| self.bring(page)) {
                let lost = self.lost(page, &cause);
                self.work().owed.insert(page);
                self.note(lost.clone());
                result = result.and(Err(lost));
            }
        }
        result
    }

    /// Has everything that could not be read be read again, with nothing left of what was found then; gives the pages that
    /// somebody waits for.
    fn look_anew(&self) -> BTreeSet<u64> {
        let _alone = self.reading.write().unwrap_or_else(PoisonError::into_inner);
        self.image.refresh();
        self.state.lost().take();
        let mut work = self.work();
        work.plan.retry();
        std::mem::take(&mut work.owed)
    }

    /// Somebody waits for `page`, which cannot be had.
    fn lose(&self, page: u64, cause: &Cause) {
        let lost = self.lost(page, cause);
        self.work().owed.insert(page);
        *self.state.lost() = Some(lost.clone());
        (self.on_loss)(&lost);
    }

    /// Nobody waits for what cannot be had, so that it is enough to say so.
    pub(super) fn note(&self, lost: Lost) {
        let mut noted = self.state.lost();
        if noted.is_none() {
            tracing::warn!("{lost}");
            *noted = Some(lost);
        }
    }

    pub(super) fn lost(&self, offset: u64, cause: &Cause) -> Lost {
        Lost {
            name: self.name.clone(),
            gpa: self.layout.gpa(offset).unwrap_or(offset),
            offset,
            cause: cause.to_string(),
        }
    }

    pub(super) fn work(&self) -> MutexGuard<'_, Work> {
        // Nothing panics while it is held.
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wait<'w>(&self, work: MutexGuard<'w, Work>) -> MutexGuard<'w, Work> {
        let waited = self.changed.wait(work);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits no longer than `bound`; says, too, whether it was that long.
    pub(super) fn wait_for<'w>(
        &self,
        work: MutexGuard<'w, Work>,
        bound: Duration,
    ) -> (MutexGuard<'w, Work>, bool) {
        let waited = self.changed.wait_timeout(work, bound);
        let (work, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        (work, timeout.timed_out())
    }
}

/// Has a thread of this name do its part.
pub(super) fn start(
    name: &str,
    bringing: &Arc<Bringing>,
    work: fn(&Bringing),
) -> Result<(), Error> {
    let bringing = Arc::clone(bringing);
    let named = thread::Builder::new().name(name.to_owned());
    let thread = named.spawn(move || work(&bringing));
    thread.map(drop).map_err(Error::Thread)
}

/// A part that a thread has taken. It counts as not read unless it is, also if the thread panics.
struct Taken<'b> {
    bringing: &'b Bringing,
    part: u64,
    read: bool,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let offset = self.bringing.image.part(self.part).start;
            self.bringing
                .note(self.bringing.lost(offset, &Cause::Panic));
        }
        self.bringing.end_part(self.part, self.read);
    }
}

/// Tells when its thread panics.
struct TellOfPanic<F: Fn()>(F);

impl<F: Fn()> Drop for TellOfPanic<F> {
    fn drop(&mut self) {
        if thread::panicking() {
            (self.0)();
        }
    }
}

pub(super) fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}
