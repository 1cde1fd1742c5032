//! A snapshot in work that is sent.

use std::{
    io,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use memory::PAGE_BYTES;
use saved_state::SnapshotId;

use super::{
    PeerAt, PeerError,
    line::Line,
    message::{Message, Pages, STATE_PART},
    receiver::Received,
};
use crate::{
    Content, Error, Saving, Written,
    granules::{self, Granules},
    table::GRANULE_BYTES,
};

/// What is made is kept in a moment, unless a disk hangs.
const KEPT_WITHIN: Duration = Duration::from_secs(300);

/// A peer that was told of a snapshot, of which it has the machine's memory as it was sent last.
#[derive(Debug)]
pub(crate) struct Sender {
    address: String,
    name: String,
    line: Mutex<Line>,
    memory: Sent,
    keeps_disks: bool,
}

/// What the peer has of an image.
#[derive(Debug)]
struct Sent {
    bytes: u64,
    /// By granule, how many of its pages are not zeros.
    pages: Box<[AtomicU8]>,
}

impl Sent {
    fn nothing(bytes: u64) -> Self {
        let granules = bytes.div_ceil(GRANULE_BYTES);
        Self {
            bytes,
            pages: (0..granules).map(|_| AtomicU8::new(0)).collect(),
        }
    }
}

/// An image that the peer is told of.
struct Image<'a> {
    line: &'a Mutex<Line>,
    sent: &'a Sent,
}

impl Image<'_> {
    fn put_one(
        &self,
        line: &mut Line,
        number: usize,
        content: Pages<'_>,
        saving: &Saving,
    ) -> io::Result<()> {
        let pages = content.which.count_ones() as u8;
        let had = self.sent.pages[number].swap(pages, Ordering::Relaxed);
        if had == 0 && pages == 0 && !line.is_quiet() {
            return Ok(());
        }
        // An image of more granules than that is of more than 256 TiB.
        let number = u32::try_from(number).map_err(io::Error::other)?;
        Ok(line.say(Message::Granule { number, content }, &wanted(saving))?)
    }
}

impl Granules for Image<'_> {
    fn bytes(&self) -> u64 {
        self.sent.bytes
    }

    fn put(&self, batch: &[(usize, &[u8])], saving: &Saving) -> io::Result<()> {
        let batch = batch
            .iter()
            .map(|(number, content)| (*number, Pages::of(content)));
        let batch: Vec<_> = batch.collect();
        let mut line = lock(self.line);
        for (number, content) in batch {
            self.put_one(&mut line, number, content, saving)?;
        }
        Ok(())
    }

    fn erase(&self, granule: usize, saving: &Saving) -> io::Result<()> {
        let zeros = Pages::of(&[]);
        self.put_one(&mut lock(self.line), granule, zeros, saving)
    }
}

impl Sender {
    /// Tells the peer of the snapshot `id`, of a machine with so many bytes of memory, which it is to keep as `name`.
    pub(crate) fn begin(
        to: PeerAt<'_>,
        name: &str,
        id: SnapshotId,
        memory_bytes: u64,
        saving: &Saving,
    ) -> Result<Self, Error> {
        dedup::check_name(name).map_err(Error::store(name))?;
        let wanted = wanted(saving);
        let mut line = Line::new(to.connect(&wanted)?);
        let begin = Message::Begin {
            id,
            memory_bytes,
            name,
        };
        let begun = line
            .say(begin, &wanted)
            .and_then(|()| match line.hear(&wanted)? {
                Message::Ready { keeps_disks } => Ok(keeps_disks),
                _ => Err(PeerError::Nonsense),
            });
        let keeps_disks = begun.map_err(|cause| Error::Peer {
            address: to.address.to_owned(),
            cause,
        })?;
        Ok(Self {
            address: to.address.to_owned(),
            name: name.to_owned(),
            line: Mutex::new(line),
            memory: Sent::nothing(memory_bytes),
            keeps_disks,
        })
    }

    /// The machine's memory, as the peer has it.
    pub(crate) fn memory(&self) -> impl Granules {
        Image {
            line: &self.line,
            sent: &self.memory,
        }
    }

    pub(crate) fn keeps_disks(&self) -> bool {
        self.keeps_disks
    }

    /// Sends what is not there yet of `memory`, and `state`.
    pub(crate) fn write(
        &self,
        state: &[u8],
        memory: &impl Content,
        saving: &Saving,
    ) -> Result<Written, Error> {
        granules::save(&self.memory(), memory, saving).map_err(self.failed())?;
        let mut line = lock(&self.line);
        for part in state.chunks(STATE_PART) {
            line.say(Message::State(part), &wanted(saving))
                .map_err(|cause| self.error(cause))?;
        }
        let pages = self.memory.pages.iter();
        let pages = pages.map(|pages| u64::from(pages.load(Ordering::Relaxed)));
        Ok(Written {
            memory_bytes: self.memory.bytes,
            data_bytes: pages.sum::<u64>() * PAGE_BYTES,
        })
    }

    /// Sends the disk with this number, of which the peer has nothing.
    pub(crate) fn write_disk(
        &self,
        number: usize,
        content: &impl Content,
        saving: &Saving,
    ) -> Result<(), Error> {
        let failed = || self.failed();
        let pieces = content.pieces(None, GRANULE_BYTES).map_err(Error::Read)?;
        let bytes = pieces.iter().map(|piece| piece.bytes()).sum();
        let number = u32::try_from(number).map_err(io::Error::other);
        let number = number.map_err(failed())?;
        lock(&self.line)
            .say(Message::Disk { number, bytes }, &wanted(saving))
            .map_err(|cause| self.error(cause))?;
        let image = Image {
            line: &self.line,
            sent: &Sent::nothing(bytes),
        };
        granules::save(&image, content, saving).map_err(failed())
    }

    /// Says that all is said, and waits until the peer has made the snapshot of it, which it does not keep yet.
    pub(crate) fn finish(&self, saving: &Saving) -> Result<(), Error> {
        let wanted = wanted(saving);
        let mut line = lock(&self.line);
        let ended = line.say(Message::End, &wanted);
        ended.map_err(|cause| self.error(cause))?;
        loop {
            match line.hear(&wanted).map_err(|cause| self.error(cause))? {
                Message::Working => {}
                Message::Made => return Ok(()),
                _ => return Err(self.error(PeerError::Nonsense)),
            }
        }
    }

    /// Has the peer keep it, and waits until it is durable there.
    pub(crate) fn publish(self) -> Result<Received, Error> {
        let until = Instant::now() + KEPT_WITHIN;
        let in_time = || Instant::now() < until;
        // From here on, only what the peer says tells whether it has kept it.
        let failed = |cause| match cause {
            PeerError::Stream(_) => self.error(PeerError::Undecided),
            cause => self.error(cause),
        };
        let mut line = lock(&self.line);
        line.say(Message::Keep, &in_time).map_err(failed)?;
        loop {
            match line.hear(&in_time).map_err(failed)? {
                Message::Working => {}
                Message::Saved {
                    new_bytes,
                    id,
                    name,
                } if name == self.name => {
                    return Ok(Received {
                        name: name.to_owned(),
                        id,
                        new_bytes,
                    });
                }
                _ => return Err(self.error(PeerError::Nonsense)),
            }
        }
    }

    fn error(&self, cause: PeerError) -> Error {
        Error::Peer {
            address: self.address.clone(),
            cause,
        }
    }

    /// What became of an image that is sent: the peer, or who it is read from.
    pub(crate) fn failed(&self) -> impl FnOnce(io::Error) -> Error {
        |error| match error.downcast::<PeerError>() {
            Ok(cause) => self.error(cause),
            Err(error) => Error::Read(error),
        }
    }
}

fn wanted(saving: &Saving) -> impl Fn() -> bool {
    || saving.pass(0).is_ok()
}

fn lock(line: &Mutex<Line>) -> MutexGuard<'_, Line> {
    // A message that was cut short by a panic is followed by nothing that makes sense to the peer, which says so.
    line.lock().unwrap_or_else(PoisonError::into_inner)
}
