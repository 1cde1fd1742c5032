//! What memory was at a cut.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
};

use super::{Elsewhere, Flags, GRANULE_BYTES, Outcome, Phase, Shared};

/// To copy so many granules takes less than to protect them, of which KVM has to be told, and the fault after that of who writes to
/// them next: it is most likely the ones that are written to all the time.
const FEW: usize = 4;

/// What some bytes of memory were at a cut, for who saves them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// So many bytes.
    pub bytes: u64,
    /// What they were.
    pub kind: PartKind,
}

/// What bytes were at a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartKind {
    /// What they are in the base.
    InBase,
    /// What they are in the copy that was made of them last.
    Copied,
    /// Zeros.
    Zeros,
    /// To be read.
    Data,
}

/// What memory was at a cut. Each byte is to be read once: what was read may be written over. Dropped, nothing is known to be in
/// any base.
#[derive(Debug)]
pub struct AtCut {
    shared: Arc<Shared>,
    elsewhere: Elsewhere,
    protected_bytes: u64,
    finished: bool,
}

impl AtCut {
    pub(super) fn new(shared: Arc<Shared>, elsewhere: Elsewhere) -> io::Result<Self> {
        let protected_bytes = begin(&shared, elsewhere)?;
        Ok(Self {
            shared,
            elsewhere,
            protected_bytes,
            finished: false,
        })
    }

    /// Parts begin and end at multiples of so many bytes, or at the end of the image.
    pub const UNIT_BYTES: u64 = GRANULE_BYTES;

    /// Bytes of the image.
    pub fn bytes(&self) -> u64 {
        self.shared.host.bytes()
    }

    /// Bytes that had to be protected or set aside while the guest stood still.
    pub fn protected_bytes(&self) -> u64 {
        self.protected_bytes
    }

    /// All of it, one part behind the other, each of whole granules but the last.
    pub fn parts(&self) -> Vec<Part> {
        let granules = &self.shared.granules;
        let mut parts: Vec<Part> = Vec::new();
        for granule in 0..granules.count() {
            let flags = granules.flags(granule);
            let kind = if flags.has(Flags::ABSENT) {
                PartKind::Zeros
            } else if self.elsewhere.base && flags.has(Flags::IN_BASE) {
                PartKind::InBase
            } else if self.elsewhere.copies && flags.has(Flags::COPIED) {
                PartKind::Copied
            } else {
                PartKind::Data
            };
            let image = granules.image(&(granule..granule + 1));
            let bytes = image.end - image.start;
            match parts.last_mut() {
                Some(last) if last.kind == kind => last.bytes += bytes,
                _ => parts.push(Part { bytes, kind }),
            }
        }
        parts
    }

    /// Fills `content` with what was at `offset` of the image.
    ///
    /// # Errors
    ///
    /// When it is not there any more: it was read before, or there was no memory to set it aside; or the image ends before.
    pub fn read(&self, offset: u64, content: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        let mut rest = content;
        while !rest.is_empty() {
            let to_next = GRANULE_BYTES - at % GRANULE_BYTES;
            let here = to_next.min(rest.len() as u64);
            let (part, after) = rest.split_at_mut(here as usize);
            self.read_of_granule(at, part)?;
            at += here;
            rest = after;
        }
        Ok(())
    }

    fn read_of_granule(&self, at: u64, content: &mut [u8]) -> io::Result<()> {
        let Shared {
            granules,
            aside,
            host,
            ..
        } = &*self.shared;
        let granule = (at / GRANULE_BYTES) as usize;
        if granule >= granules.count() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let _turn = self.shared.block_of(granule);
        let flags = granules.flags(granule);
        if flags.has(Flags::ABSENT) {
            content.fill(0);
        } else if flags.has(Flags::ASIDE) {
            aside.read(at, content)?;
        } else if flags.has(Flags::PROTECTED) {
            host.read(at, content)?;
            if granules.note_read(granule, &(at..at + content.len() as u64)) {
                granules.set(granule, flags.with(Flags::READ));
            }
        } else {
            return Err(io::Error::other(
                "memory at the cut was read before, and has been written to since",
            ));
        }
        // Only now: it says of what was read before that nobody wrote to it.
        match self.shared.torn.load(Ordering::SeqCst) {
            false => Ok(()),
            true => Err(io::Error::other(
                "memory at the cut was not kept, for want of memory for what was written over",
            )),
        }
    }

    /// Ends it. The snapshot is done, as `outcome` says.
    pub fn finish(mut self, outcome: Outcome) {
        self.end(outcome);
    }

    fn end(&mut self, outcome: Outcome) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let shared = &self.shared;
        let mut phase = shared.phase_alone();
        for granule in 0..shared.granules.count() {
            shared.granules.finish(granule, outcome);
        }
        *phase = Phase::Clearing;
        drop(phase);
        // Not while somebody waits: it can be much.
        if let Err(error) = shared.aside.clear() {
            tracing::warn!("memory that was set aside is not given back: {error}");
        }
        *shared.phase_alone() = Phase::Tracking;
    }
}

impl Drop for AtCut {
    fn drop(&mut self) {
        self.end(Outcome::NoBase);
    }
}

/// Protects what was written to, or sets it aside at once if that is less; returns its bytes.
fn begin(shared: &Shared, elsewhere: Elsewhere) -> io::Result<u64> {
    let mut phase = shared.phase_alone();
    shared.check_ready(*phase)?;
    let granules = &shared.granules;
    let written = granules.written();
    let blocks = (0..granules.blocks()).filter(|block| granules.unprotected(*block) > 0);
    for block in blocks {
        let _turn = shared.block(block);
        match written <= FEW {
            true => shared.set_written_aside(block)?,
            false => shared.protect_written(block)?,
        }
    }
    shared.torn.store(false, Ordering::SeqCst);
    *phase = Phase::Saving { elsewhere };
    Ok(written as u64 * GRANULE_BYTES)
}
