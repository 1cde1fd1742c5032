//! Writing one image: from a stream of bytes, zeros and chunks kept from the parent.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::Writer;
use super::file::data_extents;
use super::parent::Parent;
use super::session::{BlockAt, Session};
use super::worker::{Block, EncodedBlock, Read, Source, Worker, packs_of};
use crate::error::{Error, Result};
use crate::recipe::{BLOCK_CHUNKS, Place};
use crate::snapshot::ImageDraft;

/// An image in work, written from its beginning to its end.
pub struct ImageWriter<'w> {
    writer: &'w mut Writer,
    parent: Option<Parent>,
    image: ImageDraft,
    packs: BTreeSet<u32>,
    /// Blocks that wait until there is one for each thread; the last may be unfinished.
    pending: Vec<Pending>,
    chunk_size: usize,
}

/// A block that is being filled.
#[derive(Default)]
struct Pending {
    bytes: Vec<u8>,
    /// For each chunk that is begun, whether it is kept from the parent.
    kept: Vec<bool>,
}

/// What there is to do for a block.
enum Work<'a> {
    Encode {
        source: Source<'a>,
        kept: Option<&'a [bool]>,
    },
    Zeros {
        chunks: u64,
    },
    Keep,
}

/// What became of an image.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ImageStats {
    /// The image's name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Chunks of zeros.
    pub zero_chunks: u64,
    /// Chunks that the store did not hold before.
    pub new_chunks: u64,
    /// Chunks that it did.
    pub known_chunks: u64,
}

impl ImageStats {
    pub(super) fn of(image: &ImageDraft, chunk_size: u32) -> Self {
        let chunks = image.size.div_ceil(u64::from(chunk_size));
        ImageStats {
            name: image.name.clone(),
            size: image.size,
            zero_chunks: image.zero_chunks,
            new_chunks: image.new_chunks,
            known_chunks: chunks - image.zero_chunks - image.new_chunks,
        }
    }
}

impl<'w> ImageWriter<'w> {
    pub(super) fn new(writer: &'w mut Writer, name: &str) -> Result<Self> {
        let parent = match &writer.parent {
            Some(parent) => Parent::open(&writer.session, parent, name)?,
            None => None,
        };
        Ok(ImageWriter {
            parent,
            image: ImageDraft {
                name: name.to_owned(),
                size: 0,
                zero_chunks: 0,
                new_chunks: 0,
                packs: Vec::new(),
                blocks: Vec::new(),
            },
            packs: BTreeSet::new(),
            pending: Vec::new(),
            chunk_size: writer.session.shared.config.chunk_size as usize,
            writer,
        })
    }

    /// Bytes of the image of this name in the parent; `None` when there is none. What is in there can be kept.
    pub fn parent_size(&self) -> Option<u64> {
        self.parent.as_ref().map(|parent| parent.reader().size())
    }

    fn block_bytes(&self) -> usize {
        BLOCK_CHUNKS * self.chunk_size
    }

    /// Bytes until the next block begins; 0 at its beginning.
    fn to_next_block(&self) -> usize {
        let filled = (self.image.size % self.block_bytes() as u64) as usize;
        if filled == 0 {
            0
        } else {
            self.block_bytes() - filled
        }
    }

    /// Appends bytes. Large pieces are hashed and compressed by all threads and not copied before.
    ///
    /// # Errors
    ///
    /// The store cannot be written; the snapshot in work is then useless.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let (head, rest) = bytes.split_at(self.to_next_block().min(bytes.len()));
        self.fill(head)?;
        let whole_batches = rest.len() / self.batch_bytes() * self.batch_bytes();
        let (batches, tail) = rest.split_at(whole_batches);
        if !batches.is_empty() {
            self.encode_pending()?;
            let works: Vec<Work<'_>> = batches
                .chunks(self.block_bytes())
                .map(|bytes| Work::Encode {
                    source: Source::Bytes(bytes),
                    kept: None,
                })
                .collect();
            self.image.size += batches.len() as u64;
            self.encode(&works)?;
        }
        tail.chunks(self.block_bytes())
            .try_for_each(|block| self.fill(block))
    }

    /// Appends zeros, without looking at them.
    ///
    /// # Errors
    ///
    /// As [`ImageWriter::write`].
    pub fn skip_zeros(&mut self, len: u64) -> Result<()> {
        self.skip(len, false)
    }

    /// Appends what the parent has here: `len` bytes that have not changed. Neither reads nor hashes them.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] when the parent has no such image or ends before, or when the bytes do not begin and end
    /// at a chunk's boundary (the image's end is one); [`Error::Damaged`] when the parent's chunks are not there.
    pub fn keep(&mut self, len: u64) -> Result<()> {
        let parent_size = self.parent_size();
        let refused = |why: &str| Err(Error::Parameter(format!("cannot keep {len} bytes: {why}")));
        let (Some(parent_size), Some(end)) = (parent_size, self.image.size.checked_add(len)) else {
            return refused("there is no such image in a parent");
        };
        if end > parent_size {
            return refused("the parent's image ends before");
        }
        let chunk_size = self.chunk_size as u64;
        if !self.image.size.is_multiple_of(chunk_size)
            || !(end.is_multiple_of(chunk_size) || end == parent_size)
        {
            return refused("they are not whole chunks");
        }
        self.skip(len - len % chunk_size, true)?;
        // A short last chunk may go on with other bytes: take its content, not its place.
        let mut short = vec![0; (len % chunk_size) as usize];
        if let Some(parent) = &self.parent {
            parent.reader().read_at(self.image.size, &mut short)?;
        }
        self.write(&short)
    }

    fn skip(&mut self, len: u64, keep: bool) -> Result<()> {
        let head = (self.to_next_block() as u64).min(len);
        self.fill_with_zeros(head as usize, keep)?;
        let blocks = (len - head) / self.block_bytes() as u64;
        if blocks > 0 {
            self.encode_pending()?;
            let zeros = || Work::Zeros {
                chunks: BLOCK_CHUNKS as u64,
            };
            // Not all at once: an image can have millions.
            let batch: Vec<Work<'_>> = (0..blocks.min(1024))
                .map(|_| if keep { Work::Keep } else { zeros() })
                .collect();
            let mut left = blocks;
            while left > 0 {
                let now = left.min(batch.len() as u64);
                self.image.size += now * self.block_bytes() as u64;
                self.encode(&batch[..now as usize])?;
                left -= now;
            }
        }
        let tail = (len - head) % self.block_bytes() as u64;
        self.fill_with_zeros(tail as usize, keep)
    }

    /// Saves a whole file. Must be all there is in the image.
    pub(super) fn write_file(&mut self, path: &Path) -> Result<()> {
        let failed = || Error::io(format!("read {}", path.display()));
        let file = File::open(path).map_err(failed())?;
        let (size, extents) = data_extents(&file).map_err(failed())?;
        let read = |at, buf: &mut [u8]| file.read_exact_at(buf, at).map_err(failed());
        self.encode_read(0..size, &extents, &read)
    }

    /// Appends `len` bytes that `read` gives: it is called with an offset from the first of them on and with a buffer
    /// to fill, by all threads, each for what it is about to hash.
    ///
    /// # Errors
    ///
    /// As [`ImageWriter::write`]; `read` fails.
    pub fn write_with(
        &mut self,
        len: u64,
        read: impl Fn(u64, &mut [u8]) -> io::Result<()> + Sync,
    ) -> Result<()> {
        let read =
            |at, buf: &mut [u8]| read(at, buf).map_err(Error::io("read what is to be saved"));
        let head = (self.to_next_block() as u64).min(len);
        self.fill_with(0, head as usize, &read)?;
        let blocks = match (len - head) / self.block_bytes() as u64 {
            // It would keep one thread busy, and so waits for others.
            1 => 0,
            blocks => blocks,
        };
        let whole = head..head + blocks * self.block_bytes() as u64;
        if !whole.is_empty() {
            self.encode_pending()?;
            self.encode_read(whole.clone(), std::slice::from_ref(&whole), &read)?;
        }
        (whole.end..len)
            .step_by(self.block_bytes())
            .try_for_each(|at| {
                let len = (len - at).min(self.block_bytes() as u64);
                self.fill_with(at, len as usize, &read)
            })
    }

    /// Encodes whole blocks, the last of which may be the image's short one, of what `read` gives.
    fn encode_read(
        &mut self,
        part: Range<u64>,
        extents: &[Range<u64>],
        read: &Read<'_>,
    ) -> Result<()> {
        let block_bytes = self.block_bytes() as u64;
        let works: Vec<Work<'_>> = part
            .clone()
            .step_by(self.block_bytes())
            .map(|at| Work::Encode {
                source: Source::Read {
                    read,
                    extents,
                    at,
                    len: block_bytes.min(part.end - at) as usize,
                },
                kept: None,
            })
            .collect();
        self.image.size += part.end - part.start;
        self.encode(&works)
    }

    /// Completes the image. The snapshot still has to be committed.
    ///
    /// # Errors
    ///
    /// As [`ImageWriter::write`].
    pub fn finish(mut self) -> Result<ImageStats> {
        self.encode_pending()?;
        Ok(self.writer.add_image(self.image, &self.packs))
    }

    fn threads(&self) -> usize {
        self.writer.session.shared.threads
    }

    fn batch_bytes(&self) -> usize {
        self.threads() * self.block_bytes()
    }

    /// Appends bytes that lie in one block.
    fn fill(&mut self, bytes: &[u8]) -> Result<()> {
        self.begin_block(bytes.len())?;
        if let Some(block) = self.pending.last_mut() {
            block.bytes.extend_from_slice(bytes);
            block
                .kept
                .resize(block.bytes.len().div_ceil(self.chunk_size), false);
        }
        self.image.size += bytes.len() as u64;
        Ok(())
    }

    /// Appends bytes that have to be read and lie in one block.
    fn fill_with(&mut self, at: u64, len: usize, read: &Read<'_>) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let mut bytes = vec![0; len];
        read(at, &mut bytes).inspect_err(|_| self.writer.failed = true)?;
        self.fill(&bytes)
    }

    /// Appends zeros, or chunks to keep, that lie in one block.
    fn fill_with_zeros(&mut self, len: usize, keep: bool) -> Result<()> {
        self.begin_block(len)?;
        if let Some(block) = self.pending.last_mut() {
            block.bytes.resize(block.bytes.len() + len, 0);
            block
                .kept
                .resize(block.bytes.len().div_ceil(self.chunk_size), keep);
        }
        self.image.size += len as u64;
        Ok(())
    }

    /// Sees to it that there is a block to fill with `len` bytes.
    fn begin_block(&mut self, len: usize) -> Result<()> {
        if len > 0 && self.to_next_block() == 0 {
            if self.pending.len() >= self.threads() {
                self.encode_pending()?;
            }
            self.pending.push(Pending::default());
        }
        Ok(())
    }

    fn encode_pending(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        let works: Vec<Work<'_>> = pending
            .iter()
            .map(|block| Work::Encode {
                source: Source::Bytes(&block.bytes),
                kept: Some(&block.kept),
            })
            .collect();
        self.encode(&works)
    }

    /// Encodes the next blocks, on all threads.
    fn encode(&mut self, works: &[Work<'_>]) -> Result<()> {
        let first_block = self.image.blocks.len();
        let (writer, parent) = (&*self.writer, self.parent.as_ref());
        let next = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        let done: Mutex<Vec<(usize, EncodedBlock)>> = Mutex::new(Vec::with_capacity(works.len()));
        let work_on = || -> Result<()> {
            let mut worker = writer.take_worker()?;
            let mut mine = Vec::new();
            while let Some((at, work)) = {
                let at = next.fetch_add(1, Ordering::Relaxed);
                works
                    .get(at)
                    .filter(|_| !failed.load(Ordering::Relaxed))
                    .map(|work| (at, work))
            } {
                let at_block = BlockAt {
                    image: writer.images.len() as u32,
                    block: (first_block + at) as u64,
                };
                let encoded = encode_one(&mut worker, &writer.session, parent, at_block, work);
                mine.push((
                    at,
                    encoded.inspect_err(|_| failed.store(true, Ordering::Relaxed))?,
                ));
            }
            writer.return_worker(worker);
            done.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .append(&mut mine);
            Ok(())
        };
        let threads = self.writer.session.shared.threads.min(works.len());
        if let Err(error) = crate::threads::on(threads, work_on) {
            self.writer.failed = true;
            return Err(error);
        }
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.sort_unstable_by_key(|(at, _)| *at);
        for (_, block) in done {
            self.image.zero_chunks += block.zero_chunks;
            self.image.new_chunks += block.new_chunks;
            self.packs.extend(block.packs);
            self.image.blocks.push(block.stored);
        }
        Ok(())
    }
}

fn encode_one(
    worker: &mut Worker,
    session: &Session,
    parent: Option<&Parent>,
    at_block: BlockAt,
    work: &Work<'_>,
) -> Result<EncodedBlock> {
    let block = at_block.block as usize;
    let parent = parent.filter(|parent| parent.block_chunks(block) > 0);
    match *work {
        Work::Zeros { chunks } => Ok(EncodedBlock {
            stored: Vec::new(),
            packs: Vec::new(),
            zero_chunks: chunks,
            new_chunks: 0,
        }),
        Work::Encode { source, kept } => {
            let kept = kept.filter(|kept| kept.contains(&true));
            encode_source(worker, session, parent, at_block, source, kept)
        }
        Work::Keep => {
            let kept = [true; BLOCK_CHUNKS];
            let Some(parent) = parent else {
                unreachable!("`keep` has checked that there is one")
            };
            let (form, places) = parent.block(session, block, &mut worker.coder)?;
            let all: Option<Vec<Place>> = places.iter().copied().collect();
            match all.filter(|_| parent.has_same_numbers()) {
                Some(places) => {
                    check_there(session, &places)?;
                    Ok(EncodedBlock {
                        packs: packs_of(&places, session.shared.config.pack_slots()),
                        zero_chunks: places.iter().filter(|place| place.is_zero()).count() as u64,
                        new_chunks: 0,
                        stored: session.seal_block(at_block, form)?,
                    })
                }
                None => {
                    let zeros = vec![0; BLOCK_CHUNKS * session.shared.config.chunk_size as usize];
                    let source = Source::Bytes(&zeros);
                    encode_source(worker, session, Some(parent), at_block, source, Some(&kept))
                }
            }
        }
    }
}

/// Encodes a block of which some chunks may be kept.
fn encode_source(
    worker: &mut Worker,
    session: &Session,
    parent: Option<&Parent>,
    at: BlockAt,
    source: Source<'_>,
    kept: Option<&[bool]>,
) -> Result<EncodedBlock> {
    let Some(parent) = parent else {
        let (kept, parent) = (None, None);
        return worker.encode(
            session,
            &Block {
                at,
                source,
                kept,
                parent,
            },
        );
    };
    let (_, places) = match parent.block(session, at.block as usize, &mut worker.coder) {
        // What cannot be read was to be a guess alone.
        Err(_) if kept.is_none() => {
            return encode_source(worker, session, None, at, source, None);
        }
        other => other?,
    };
    let guesses: Vec<Place> = places
        .iter()
        .map(|place| place.unwrap_or(Place::ZERO))
        .collect();
    let guesses = Some(guesses.as_slice());
    let (Some(kept), Source::Bytes(bytes)) = (kept, source) else {
        let (kept, parent) = (None, guesses);
        return worker.encode(
            session,
            &Block {
                at,
                source,
                kept,
                parent,
            },
        );
    };
    let is_kept = |at: usize| kept.get(at) == Some(&true);
    let kept_places: Vec<Place> = (places.iter().enumerate())
        .filter(|(at, _)| is_kept(*at))
        .filter_map(|(_, place)| *place)
        .collect();
    check_there(session, &kept_places)?;
    // Chunks that a collection is about to take are still there to be read: store them again.
    let mut kept = kept.to_vec();
    let mut bytes = std::borrow::Cow::Borrowed(bytes);
    let chunk_size = session.shared.config.chunk_size as usize;
    for number in (0..kept.len())
        .filter(|&number| kept[number] && places[number].is_none())
        .collect::<Vec<_>>()
    {
        let end = ((number + 1) * chunk_size).min(bytes.len());
        let chunk = &mut bytes.to_mut()[number * chunk_size..end];
        let offset = (at.block as usize * BLOCK_CHUNKS + number) as u64 * chunk_size as u64;
        parent.reader().read_at(offset, chunk)?;
        kept[number] = false;
    }
    let block = Block {
        at,
        source: Source::Bytes(&bytes),
        kept: Some(&kept),
        parent: guesses,
    };
    worker.encode(session, &block)
}

/// Checks that chunks which are to be referred to unseen are there.
fn check_there(session: &Session, places: &[Place]) -> Result<()> {
    let pack_slots = session.shared.config.pack_slots();
    let mut looked_at = None;
    for (pack, slot) in places.iter().filter_map(|place| place.get(pack_slots)) {
        let ids = match &looked_at {
            Some((number, ids)) if *number == pack => ids,
            _ => &looked_at.insert((pack, session.ids(pack))).1,
        };
        if ids.as_ref().and_then(|ids| ids.get(slot)).is_none() {
            return Err(Error::Damaged {
                file: "the parent".into(),
                what: "a chunk that is to be kept is not there; save without a parent instead",
            });
        }
    }
    Ok(())
}
