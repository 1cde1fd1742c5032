//! A layer's content that comes from elsewhere, a part at a time: what somebody reads comes first.

use std::{
    collections::BTreeSet,
    fmt,
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use crate::{
    bits::Bits,
    convert::BLOCK_BYTES,
    layout::{Geometry, SECTOR_BYTES},
};

/// What comes as a whole, in bytes: a few frames of a store, so that who waits for a sector waits for little else.
pub(crate) const UNIT_BYTES: u64 = 64 << 10;
/// What is read at a time, in units.
const RUN_UNITS: u64 = 16;
/// What is read at a time, in bytes, for who waits, and may want to do something else before all of it has come.
const PIECE_BYTES: u64 = 4 * UNIT_BYTES;
const WORD_BITS: u64 = u64::BITS as u64;

/// What somebody else has kept of a disk.
pub trait Origin: Send + Sync {
    /// Size of the disk, in bytes.
    fn bytes(&self) -> u64;

    /// Calls `found` with each range, in bytes and ascending, that may be other than zeros.
    ///
    /// # Errors
    ///
    /// When that cannot be told.
    fn each_data(&self, found: &mut dyn FnMut(Range<u64>)) -> io::Result<()>;

    /// Fills `buffer` with what is at `offset`.
    ///
    /// # Errors
    ///
    /// When that cannot be had. It may be asked for again.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// The coming of a layer's content.
pub(crate) struct Arrival {
    /// There until all has come: it may keep files open, and their store from giving space back.
    origin: Mutex<Option<Arc<dyn Origin>>>,
    geometry: Geometry,
    /// The layer's.
    file: File,
    state: Mutex<State>,
    /// Told when units have come, or could not be had.
    changed: Condvar,
    complete: AtomicBool,
    come: AtomicU64,
    total: u64,
}

/// A part of a disk that is not here yet.
#[derive(Debug)]
pub struct Awaited {
    pub(crate) arrival: Arc<Arrival>,
    /// In the layer's file.
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Awaited {
    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// The same in pieces of at most a quarter of a MiB, of which several can be brought at once.
    pub fn pieces(self) -> impl Iterator<Item = Self> {
        let Self {
            arrival,
            offset,
            len,
        } = self;
        // No two have a part of the same unit.
        let into_disk = offset.saturating_sub(arrival.geometry.data_at());
        let mut at = 0;
        std::iter::from_fn(move || {
            let to_end_of_piece = PIECE_BYTES - (into_disk + at) % PIECE_BYTES;
            let piece = Self {
                arrival: Arc::clone(&arrival),
                offset: offset + at,
                len: to_end_of_piece.min(len - at),
            };
            at += piece.len;
            (piece.len > 0).then_some(piece)
        })
    }

    /// Has it come. The disk may be in use meanwhile.
    ///
    /// # Errors
    ///
    /// When it cannot be had. It can be tried again.
    pub fn bring(&self) -> io::Result<()> {
        self.arrival.bring(self.offset, self.len)
    }
}

struct State {
    /// A bit for each unit that is to come.
    absent: Vec<u64>,
    /// Those of them that somebody is bringing.
    in_work: BTreeSet<u64>,
    /// How many are absent.
    left: u64,
    /// What has come may be lost again: the host could not write it.
    lost: bool,
}

/// One way through all that is to come. What cannot be had does not end it.
#[derive(Default)]
pub(crate) struct Pass {
    at: u64,
    /// Up to here units are brought one by one: not all of them can be had.
    alone_until: u64,
    failed: Option<io::Error>,
}

impl Arrival {
    /// Of what the layer owns, of a disk of this geometry.
    pub(crate) fn new(
        origin: Arc<dyn Origin>,
        geometry: Geometry,
        owned: &Bits,
        file: File,
    ) -> Self {
        let units = geometry.bytes().div_ceil(UNIT_BYTES);
        let mut state = State {
            absent: vec![0; units.div_ceil(WORD_BITS) as usize],
            in_work: BTreeSet::new(),
            left: 0,
            lost: false,
        };
        owned.each_run(|start, end| {
            let bytes = start * SECTOR_BYTES..end * SECTOR_BYTES;
            units_of(&bytes).for_each(|unit| state.expect(unit));
        });
        let total = state.left * UNIT_BYTES;
        let arrival = Self {
            origin: Mutex::new(Some(origin)),
            geometry,
            file,
            state: Mutex::new(state),
            changed: Condvar::new(),
            complete: AtomicBool::new(false),
            come: AtomicU64::new(0),
            total,
        };
        if total == 0 {
            arrival.complete(&mut arrival.state());
        }
        arrival
    }

    /// Whether all is there.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Bytes that have come, and that there were to come, in whole units.
    pub(crate) fn progress(&self) -> (u64, u64) {
        (self.come.load(Ordering::Relaxed), self.total)
    }

    /// Whether all of `len` bytes of the layer's file at `offset` are there, as far as they are data.
    pub(crate) fn has(&self, offset: u64, len: u64) -> bool {
        self.is_complete() || {
            let state = self.state();
            let mut units = units_of(&self.in_disk(offset, len));
            !state.lost && units.all(|unit| !state.is_absent(unit))
        }
    }

    /// What its file takes on the host.
    #[cfg(test)]
    pub(crate) fn allocated_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.file.metadata().unwrap().blocks() * 512
    }

    /// Whether what has come cannot be relied upon.
    pub(crate) fn is_lost(&self) -> bool {
        self.state().lost
    }

    /// What has come cannot be relied upon any more: from now on, nothing can be had.
    pub(crate) fn lose(&self) {
        let mut state = self.state();
        state.lost = true;
        self.complete.store(false, Ordering::Release);
        self.changed.notify_all();
    }

    /// All is there, by whatever way.
    pub(crate) fn end(&self) {
        let mut state = self.state();
        state.lost = false;
        self.complete(&mut state);
        drop(state);
        self.come.store(self.total, Ordering::Relaxed);
        self.changed.notify_all();
    }

    fn complete(&self, state: &mut State) {
        state.absent = Vec::new();
        state.left = 0;
        *lock(&self.origin) = None;
        self.complete.store(true, Ordering::Release);
    }

    /// Has `len` bytes of the layer's file at `offset` be there; waits for others who bring some of them.
    fn bring(&self, offset: u64, len: u64) -> io::Result<()> {
        let units = units_of(&self.in_disk(offset, len));
        let mut state = self.state();
        let mut at = units.start;
        loop {
            state.trusted()?;
            let Some(next) = state.next_absent(at..units.end) else {
                return Ok(());
            };
            at = next;
            let run = state.take(at..units.end.min(at + RUN_UNITS));
            if run.is_empty() {
                // Whatever comes of it, it is looked at anew then.
                state = self.wait(state);
                continue;
            }
            drop(state);
            InWork::new(self, run).bring()?;
            state = self.state();
        }
    }

    /// Brings the next of what nobody is bringing, and says how many bytes that were; `None` when all is there. What others bring is waited
    /// for at the end, and brought if they cannot.
    ///
    /// # Errors
    ///
    /// At the end, what the first was that could not be had.
    pub(crate) fn bring_next(&self, pass: &mut Pass) -> io::Result<Option<u64>> {
        let mut state = self.state();
        loop {
            state.trusted()?;
            let at_once = match pass.at < pass.alone_until {
                true => 1,
                false => RUN_UNITS,
            };
            if let Some(run) = state.take_next(pass.at, at_once) {
                drop(state);
                return Ok(Some(self.try_run(run, pass)));
            }
            if state.left == 0 {
                return Ok(None);
            }
            if !state.in_work.is_empty() {
                state = self.wait(state);
                // What could not be had is not tried twice.
                if pass.failed.is_none() {
                    pass.at = 0;
                }
                continue;
            }
            if let Some(error) = pass.failed.take() {
                return Err(error);
            }
            pass.at = 0;
        }
    }

    fn try_run(&self, run: Range<u64>, pass: &mut Pass) -> u64 {
        match InWork::new(self, run.clone()).bring() {
            Ok(()) => {
                pass.at = run.end;
                (run.end - run.start) * UNIT_BYTES
            }
            Err(_) if run.end - run.start > 1 => {
                (pass.at, pass.alone_until) = (run.start, run.end);
                0
            }
            Err(error) => {
                pass.at = run.end;
                pass.failed.get_or_insert(error);
                0
            }
        }
    }

    fn in_disk(&self, offset: u64, len: u64) -> Range<u64> {
        let start = offset.saturating_sub(self.geometry.data_at());
        start..start.saturating_add(len).min(self.geometry.bytes())
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let waited = self.changed.wait(state);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl fmt::Debug for Arrival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arrival")
            .field("progress", &self.progress())
            .finish_non_exhaustive()
    }
}

impl State {
    fn trusted(&self) -> io::Result<()> {
        match self.lost {
            true => Err(io::Error::other("an earlier sync of it failed")),
            false => Ok(()),
        }
    }

    fn expect(&mut self, unit: u64) {
        if let Some(word) = self.absent.get_mut((unit / WORD_BITS) as usize)
            && *word & bit(unit) == 0
        {
            *word |= bit(unit);
            self.left += 1;
        }
    }

    fn has_come(&mut self, unit: u64) {
        if let Some(word) = self.absent.get_mut((unit / WORD_BITS) as usize)
            && *word & bit(unit) != 0
        {
            *word &= !bit(unit);
            self.left -= 1;
        }
    }

    fn is_absent(&self, unit: u64) -> bool {
        let word = self.absent.get((unit / WORD_BITS) as usize);
        word.is_some_and(|word| word & bit(unit) != 0)
    }

    /// The first of `units` that is absent.
    fn next_absent(&self, units: Range<u64>) -> Option<u64> {
        let mut at = units.start;
        while at < units.end {
            let word = self.absent.get((at / WORD_BITS) as usize)?;
            let rest = word >> (at % WORD_BITS);
            if rest != 0 {
                let found = at + u64::from(rest.trailing_zeros());
                return (found < units.end).then_some(found);
            }
            at = (at / WORD_BITS + 1) * WORD_BITS;
        }
        None
    }

    /// The absent ones that `units` begin with and that nobody is bringing, which the caller now is.
    fn take(&mut self, units: Range<u64>) -> Range<u64> {
        let first = units.start;
        let is_free = |unit: &u64| self.is_absent(*unit) && !self.in_work.contains(unit);
        let last = units.take_while(is_free).last();
        let run = first..last.map_or(first, |last| last + 1);
        self.in_work.extend(run.clone());
        run
    }

    /// As [`State::take`], of the first so many from `at` on that there are.
    fn take_next(&mut self, mut at: u64, most: u64) -> Option<Range<u64>> {
        loop {
            at = self.next_absent(at..u64::MAX)?;
            let run = self.take(at..at + most);
            if !run.is_empty() {
                return Some(run);
            }
            at += 1;
        }
    }
}

/// Units that somebody is bringing. Whatever comes of it, others learn of it.
struct InWork<'a> {
    arrival: &'a Arrival,
    run: Range<u64>,
    done: bool,
}

impl<'a> InWork<'a> {
    fn new(arrival: &'a Arrival, run: Range<u64>) -> Self {
        Self {
            arrival,
            run,
            done: false,
        }
    }

    fn bring(mut self) -> io::Result<()> {
        let Arrival {
            origin,
            geometry,
            file,
            ..
        } = self.arrival;
        let origin = lock(origin).clone();
        // It goes when all has come, by whatever way.
        let Some(origin) = origin else {
            return Ok(());
        };
        let offset = self.run.start * UNIT_BYTES;
        let end = geometry.bytes().min(self.run.end * UNIT_BYTES);
        let mut bytes = vec![0; (end - offset) as usize];
        origin.read(offset, &mut bytes)?;
        for data in data_of(&bytes) {
            let at = geometry.data_at() + offset + data.start as u64;
            #[cfg(test)]
            let len = data.len() as u64;
            file.write_all_at(&bytes[data], at)?;
            #[cfg(test)]
            crate::tape::wrote(file, at, len);
        }
        self.done = true;
        Ok(())
    }
}

impl Drop for InWork<'_> {
    fn drop(&mut self) {
        let mut state = self.arrival.state();
        for unit in self.run.clone() {
            state.in_work.remove(&unit);
            if self.done {
                state.has_come(unit);
            }
        }
        if self.done && !self.arrival.is_complete() {
            let bytes = (self.run.end - self.run.start) * UNIT_BYTES;
            self.arrival.come.fetch_add(bytes, Ordering::Relaxed);
            if state.left == 0 && !state.lost {
                self.arrival.complete(&mut state);
            }
        }
        drop(state);
        self.arrival.changed.notify_all();
    }
}

fn bit(unit: u64) -> u64 {
    1 << (unit % WORD_BITS)
}

/// The units that have some of these bytes.
fn units_of(bytes: &Range<u64>) -> Range<u64> {
    bytes.start / UNIT_BYTES..bytes.end.div_ceil(UNIT_BYTES)
}

/// The runs of blocks that are not all zeros.
fn data_of(bytes: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let is_data = |at: &usize| {
        let block = &bytes[*at..bytes.len().min(at + BLOCK_BYTES)];
        block.iter().any(|byte| *byte != 0)
    };
    let mut blocks = (0..bytes.len()).step_by(BLOCK_BYTES).peekable();
    std::iter::from_fn(move || {
        let start = blocks.find(is_data)?;
        let mut end = start + BLOCK_BYTES;
        while let Some(next) = blocks.next_if(is_data) {
            end = next + BLOCK_BYTES;
        }
        Some(start..end.min(bytes.len()))
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change of what they guard is whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
