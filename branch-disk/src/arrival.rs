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
    origin: Box<dyn Origin>,
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
}

impl Arrival {
    /// Of what the layer owns, of a disk of this geometry.
    pub(crate) fn new(
        origin: Box<dyn Origin>,
        geometry: Geometry,
        owned: &Bits,
        file: File,
    ) -> Self {
        let units = geometry.bytes().div_ceil(UNIT_BYTES);
        let mut state = State {
            absent: vec![0; units.div_ceil(WORD_BITS) as usize],
            in_work: BTreeSet::new(),
            left: 0,
        };
        owned.each_run(|start, end| {
            let bytes = start * SECTOR_BYTES..end * SECTOR_BYTES;
            units_of(&bytes).for_each(|unit| state.expect(unit));
        });
        Self {
            origin,
            geometry,
            file,
            complete: AtomicBool::new(state.left == 0),
            come: AtomicU64::new(0),
            total: state.left * UNIT_BYTES,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
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
            units.all(|unit| !state.is_absent(unit))
        }
    }

    /// Has `len` bytes of the layer's file at `offset` be there; waits for others who bring some of them.
    fn bring(&self, offset: u64, len: u64) -> io::Result<()> {
        self.bring_units(units_of(&self.in_disk(offset, len)), &|| true)
    }

    /// Has everything be there, as long as it is `wanted`: `Interrupted` once it is not.
    pub(crate) fn bring_all(&self, wanted: &dyn Fn() -> bool) -> io::Result<()> {
        self.bring_units(units_of(&(0..self.geometry.bytes())), wanted)
    }

    fn bring_units(&self, units: Range<u64>, wanted: &dyn Fn() -> bool) -> io::Result<()> {
        let mut state = self.state();
        let mut at = units.start;
        while let Some(next) = state.next_absent(at..units.end) {
            if !wanted() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            at = next;
            let run = state.take(at..units.end.min(at + RUN_UNITS));
            if run.is_empty() {
                // Its end is told, whatever it is, and it is looked at anew then.
                state = self.wait(state);
                continue;
            }
            drop(state);
            let mut work = InWork {
                arrival: self,
                run,
                done: false,
            };
            work.bring()?;
            drop(work);
            state = self.state();
        }
        Ok(())
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
        // Each change of it is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
    fn expect(&mut self, unit: u64) {
        let (word, bit) = (unit / WORD_BITS, 1 << (unit % WORD_BITS));
        if let Some(word) = self.absent.get_mut(word as usize)
            && *word & bit == 0
        {
            *word |= bit;
            self.left += 1;
        }
    }

    fn is_absent(&self, unit: u64) -> bool {
        let word = self.absent.get((unit / WORD_BITS) as usize);
        word.is_some_and(|word| word & (1 << (unit % WORD_BITS)) != 0)
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
        let mut free =
            units.take_while(|unit| self.is_absent(*unit) && !self.in_work.contains(unit));
        let run = first..free.by_ref().last().map_or(first, |last| last + 1);
        self.in_work.extend(run.clone());
        run
    }
}

/// Units that somebody is bringing. Whatever comes of it, others learn of it.
struct InWork<'a> {
    arrival: &'a Arrival,
    run: Range<u64>,
    done: bool,
}

impl InWork<'_> {
    fn bring(&mut self) -> io::Result<()> {
        let Arrival {
            origin,
            geometry,
            file,
            ..
        } = self.arrival;
        let offset = self.run.start * UNIT_BYTES;
        let end = geometry.bytes().min(self.run.end * UNIT_BYTES);
        let mut bytes = vec![0; (end - offset) as usize];
        origin.read(offset, &mut bytes)?;
        for (block, at) in bytes
            .chunks(BLOCK_BYTES)
            .zip((offset..).step_by(BLOCK_BYTES))
        {
            if block.iter().any(|byte| *byte != 0) {
                file.write_all_at(block, geometry.data_at() + at)?;
            }
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
            if self.done
                && let Some(word) = state.absent.get_mut((unit / WORD_BITS) as usize)
            {
                *word &= !(1 << (unit % WORD_BITS));
                state.left -= 1;
            }
        }
        if self.done {
            let bytes = (self.run.end - self.run.start) * UNIT_BYTES;
            self.arrival.come.fetch_add(bytes, Ordering::Relaxed);
            self.arrival
                .complete
                .store(state.left == 0, Ordering::Release);
        }
        drop(state);
        self.arrival.changed.notify_all();
    }
}

/// The units that have some of these bytes.
fn units_of(bytes: &Range<u64>) -> Range<u64> {
    bytes.start / UNIT_BYTES..bytes.end.div_ceil(UNIT_BYTES)
}
