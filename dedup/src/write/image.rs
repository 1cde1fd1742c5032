//! Writing one image: from a stream of bytes, zeros and chunks kept from the parent.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

use super::Writer;
use super::blocks::{Task, Work, encode_all};
use super::parent::Parent;
use super::session::BlockAt;
use super::worker::{EncodedBlock, Read, Source};
use crate::error::{Error, Result};
use crate::recipe::BLOCK_CHUNKS;
use crate::snapshot::ImageDraft;

/// An image in work, written from its beginning to its end.
pub struct ImageWriter<'w> {
    writer: &'w mut Writer,
    image: Image,
    /// Blocks that wait until there is one for each thread; the last may be unfinished.
    pending: Vec<Pending>,
    chunk_size: usize,
}

/// What is known so far of an image in work.
pub(super) struct Image {
    /// The parent's image of the same name.
    pub(super) parent: Option<Parent>,
    pub(super) draft: ImageDraft,
    /// Numbers of the packs that it refers to.
    pub(super) packs: BTreeSet<u32>,
}

/// A block that is being filled.
#[derive(Default)]
struct Pending {
    bytes: Vec<u8>,
    /// For each chunk that is begun, whether it is kept from the parent.
    kept: Vec<bool>,
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

impl Image {
    pub(super) fn new(writer: &Writer, name: &str) -> Result<Self> {
        let parent = writer.parent.as_ref();
        let parent = parent.and_then(|parent| parent.image(name)).cloned();
        let parent = parent.map(|image| Parent::new(&writer.session, image));
        let parent = parent.transpose()?;
        Ok(Image {
            parent,
            draft: ImageDraft {
                name: name.to_owned(),
                size: 0,
                zero_chunks: 0,
                new_chunks: 0,
                packs: Vec::new(),
                blocks: Vec::new(),
            },
            packs: BTreeSet::new(),
        })
    }

    /// Appends a block.
    pub(super) fn add(&mut self, block: EncodedBlock) {
        self.draft.zero_chunks += block.zero_chunks;
        self.draft.new_chunks += block.new_chunks;
        self.packs.extend(block.packs);
        self.draft.blocks.push(block.stored);
    }
}

impl<'w> ImageWriter<'w> {
    pub(super) fn new(writer: &'w mut Writer, name: &str) -> Result<Self> {
        Ok(ImageWriter {
            image: Image::new(writer, name)?,
            pending: Vec::new(),
            chunk_size: writer.session.shared.config.chunk_size as usize,
            writer,
        })
    }

    /// Bytes of the image of this name in the parent; `None` when there is none. What is in there can be kept.
    pub fn parent_size(&self) -> Option<u64> {
        self.image
            .parent
            .as_ref()
            .map(|parent| parent.reader().size())
    }

    fn block_bytes(&self) -> usize {
        BLOCK_CHUNKS * self.chunk_size
    }

    /// Bytes until the next block begins; 0 at its beginning.
    fn to_next_block(&self) -> usize {
        let filled = (self.image.draft.size % self.block_bytes() as u64) as usize;
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
            self.image.draft.size += batches.len() as u64;
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
        let (Some(parent_size), Some(end)) = (parent_size, self.image.draft.size.checked_add(len))
        else {
            return refused("there is no such image in a parent");
        };
        if end > parent_size {
            return refused("the parent's image ends before");
        }
        let chunk_size = self.chunk_size as u64;
        if !self.image.draft.size.is_multiple_of(chunk_size)
            || !(end.is_multiple_of(chunk_size) || end == parent_size)
        {
            return refused("they are not whole chunks");
        }
        self.skip(len - len % chunk_size, true)?;
        // A short last chunk may go on with other bytes: take its content, not its place.
        let mut short = vec![0; (len % chunk_size) as usize];
        if let Some(parent) = &self.image.parent {
            parent.reader().read_at(self.image.draft.size, &mut short)?;
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
                self.image.draft.size += now * self.block_bytes() as u64;
                self.encode(&batch[..now as usize])?;
                left -= now;
            }
        }
        let tail = (len - head) % self.block_bytes() as u64;
        self.fill_with_zeros(tail as usize, keep)
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
            |at, buf: &mut [u8]| read(at, buf).map_err(Error::file("read what is to be saved"));
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
        self.image.draft.size += part.end - part.start;
        self.encode(&works)
    }

    /// Completes the image. The snapshot still has to be committed.
    ///
    /// # Errors
    ///
    /// As [`ImageWriter::write`].
    pub fn finish(mut self) -> Result<ImageStats> {
        self.encode_pending()?;
        Ok(self.writer.add_image(self.image))
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
        self.image.draft.size += bytes.len() as u64;
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
        self.image.draft.size += len as u64;
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
        let first_block = self.image.draft.blocks.len();
        let (image, parent) = (self.writer.images.len(), self.image.parent.as_ref());
        let tasks: Vec<Task<'_>> = (first_block..)
            .zip(works)
            .map(|(block, work)| Task {
                at: BlockAt {
                    image: image as u32,
                    block: block as u64,
                },
                parent,
                work,
            })
            .collect();
        let encoded = encode_all(self.writer, &tasks);
        for block in encoded.inspect_err(|_| self.writer.failed = true)? {
            self.image.add(block);
        }
        Ok(())
    }
}
