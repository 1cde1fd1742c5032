//! Loading whole images, with all cores.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::frames::{FrameReader, slots_of};
use super::{ImageReader, not_there};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::hash::is_zero;
use crate::name::FileId;
use crate::pack::Pack;
use crate::recipe::{BLOCK_CHUNKS, BlockCoder, Place};
use crate::threads;

/// What to do about chunks of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeros {
    /// Write them.
    Write,
    /// Leave them: the memory is zero, as fresh from the kernel, and stays untouched there.
    AlreadyThere,
}

/// Windows are loaded one after the other, each by all threads, which decode each frame once for all of the window. The
/// list of a window's chunks takes 6 MiB for each GiB.
const WINDOW_BYTES: usize = 1 << 30;

/// Bytes of the frames that a thread takes at a time, if they are one behind the other in a pack. What goes to one place in a file is
/// written at once: the kernel lets one thread write to a file at a time, and the others wait.
const GROUP_BYTES: u32 = 128 << 10;

impl ImageReader {
    /// Loads the whole image into memory, `memory.len()` being its size. Each byte is verified on the way.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`] when the length is another; as [`ImageReader::read_at`]. The memory's content is not
    /// defined then.
    pub fn load_into(&self, memory: &mut [u8], zeros: Zeros) -> Result<()> {
        if memory.len() as u64 != self.size() {
            return Err(Error::OutOfRange {
                offset: 0,
                len: memory.len() as u64,
                size: self.size(),
            });
        }
        let chunk_size = self.shared.config.chunk_size as usize;
        let block_bytes = BLOCK_CHUNKS * chunk_size;
        for (window, memory) in memory
            .chunks_mut(self.window_blocks() * block_bytes)
            .enumerate()
        {
            let first = window * self.window_blocks();
            let blocks = (first..).zip(memory.chunks_mut(block_bytes));
            let mut chunks = self.list(blocks, |places, memory, chunks| {
                for (place, chunk) in places.into_iter().zip(memory.chunks_mut(chunk_size)) {
                    if !place.is_zero() {
                        chunks.push((place, chunk));
                    } else if zeros == Zeros::Write {
                        chunk.fill(0);
                    }
                }
            })?;
            // One chunk at a time: neighbours in memory are separate slices here.
            self.load(
                &mut chunks,
                |_, _| false,
                |_, chunk: &mut &mut [u8], plain| {
                    chunk.copy_from_slice(&plain[..chunk.len()]);
                    Ok(())
                },
            )?;
        }
        Ok(())
    }

    /// Writes the whole image to a file, with holes for zeros, which nobody but its owner may read. An existing file is replaced, in
    /// one step and only when everything is written. The file is not synced.
    ///
    /// # Errors
    ///
    /// As [`ImageReader::read_at`]; the file cannot be written, and is then as it was before.
    pub fn load_file(&self, path: &Path) -> Result<()> {
        let failed = || Error::file(format!("write {}", path.display()));
        // Of a number of its own: a process that is killed leaves it, and another may have the same id.
        let mut draft = path.as_os_str().to_owned();
        draft.push(format!(".{}.part", FileId::random()?));
        let mut create = File::options();
        let file = create.write(true).create_new(true).mode(0o600);
        let file = file.open(&draft).map_err(failed())?;
        let written = file
            .set_len(self.size())
            .map_err(failed())
            .and_then(|()| self.write_to(&file, path))
            .and_then(|()| std::fs::rename(&draft, path).map_err(failed()));
        written.inspect_err(|_| drop(std::fs::remove_file(&draft)))
    }

    /// Writes all that is not zeros to a file that has the image's size.
    fn write_to(&self, file: &File, path: &Path) -> Result<()> {
        let chunk_size = u64::from(self.shared.config.chunk_size);
        let blocks = self.recipe.directory.blocks().len();
        let follows = |chunk: &u64, next: &u64| chunk + 1 == *next;
        let put = |count: usize, chunk: &mut u64, plain: &[u8]| {
            let at = *chunk * chunk_size;
            let len = (count as u64 * chunk_size).min(self.size() - at) as usize;
            file.write_all_at(&plain[..len], at)
                .map_err(Error::file(format!("write {}", path.display())))
        };
        for first in (0..blocks).step_by(self.window_blocks()) {
            let window = first..(first + self.window_blocks()).min(blocks);
            let numbered = window.map(|block| (block, block as u64 * BLOCK_CHUNKS as u64));
            let mut chunks = self.list(numbered, |places, first, chunks| {
                let numbered = places.into_iter().zip(first..);
                chunks.extend(numbered.filter(|(place, _)| !place.is_zero()));
            })?;
            self.load(&mut chunks, follows, put)?;
        }
        Ok(())
    }

    fn window_blocks(&self) -> usize {
        let block_bytes = BLOCK_CHUNKS * self.shared.config.chunk_size as usize;
        (WINDOW_BYTES / block_bytes).max(1)
    }

    /// Decodes the blocks of a window, on all threads. `list` gets a block's places and what belongs to it, and adds
    /// what is to be loaded. Gives all of that, by place.
    fn list<T: Send, D: Send>(
        &self,
        blocks: impl Iterator<Item = (usize, T)> + Send,
        list: impl Fn(Vec<Place>, T, &mut Vec<(Place, D)>) + Sync,
    ) -> Result<Vec<(Place, D)>> {
        let all = Mutex::new(Vec::new());
        threads::share(self.shared.threads, blocks, |next| {
            let mut coder = BlockCoder::new()?;
            let mut mine = Vec::new();
            while let Some((block, of_block)) = next() {
                let places = self.recipe.places(block, &mut coder)?;
                list(places, of_block, &mut mine);
            }
            lock(&all).append(&mut mine);
            Ok(())
        })?;
        let mut all = all.into_inner().unwrap_or_else(PoisonError::into_inner);
        // Mostly sorted already, which the sort makes use of.
        all.sort_by_key(|(place, _)| *place);
        Ok(all)
    }

    /// Decodes each frame once, on all threads, and puts its chunks where they go. `chunks` are in the order of their
    /// places. `put` gets a number of chunks that follow each other in the frame as well as, by `follows`, at their
    /// destinations, the first destination, and the chunks' bytes.
    fn load<D: Send>(
        &self,
        chunks: &mut [(Place, D)],
        follows: impl Fn(&D, &D) -> bool + Sync,
        put: impl Fn(usize, &mut D, &[u8]) -> Result<()> + Sync,
    ) -> Result<()> {
        let config = &self.shared.config;
        let (pack_slots, group_chunks) = (config.pack_slots(), group_chunks(config));
        let group_of = |place: Place| {
            place
                .get(pack_slots)
                .map(|(pack, slot)| (pack, slot / group_chunks))
        };
        let groups = chunks.chunk_by_mut(|(a, _), (b, _)| group_of(*a) == group_of(*b));
        threads::share(self.shared.threads, groups, |next| {
            let mut loader = Loader::new(self)?;
            while let Some(chunks) = next() {
                loader.load(chunks, &follows, &put)?;
            }
            Ok(())
        })
    }
}

/// Chunks of as many frames as a thread takes at a time.
fn group_chunks(config: &Config) -> u32 {
    let frame_bytes = config.frame_chunks() * config.chunk_size;
    (GROUP_BYTES / frame_bytes).max(1) * config.frame_chunks()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One thread's share of a load.
pub(super) struct Loader<'r> {
    image: &'r ImageReader,
    frame: FrameReader,
    /// Room for the frames of a group.
    plain: Vec<u8>,
    /// Which frame, of which pack of the recipe's, was decoded to its beginning.
    decoded: Option<(u32, u32)>,
    pack: Option<(u32, Arc<Pack>)>,
}

impl<'r> Loader<'r> {
    pub(super) fn new(image: &'r ImageReader) -> Result<Self> {
        let config = &image.shared.config;
        Ok(Loader {
            image,
            frame: FrameReader::new()?,
            plain: vec![0; (group_chunks(config) * config.chunk_size) as usize],
            decoded: None,
            pack: None,
        })
    }

    /// Decodes the frames of a group that chunks are in, and puts those where they go.
    fn load<D>(
        &mut self,
        chunks: &mut [(Place, D)],
        follows: impl Fn(&D, &D) -> bool,
        put: impl Fn(usize, &mut D, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let config = &self.image.shared.config;
        let (pack_slots, frame_chunks) = (config.pack_slots(), config.frame_chunks());
        let (chunk_size, group_chunks) = (config.chunk_size as usize, group_chunks(config));
        let at = |place: Place| place.get(pack_slots).unwrap_or_default();
        let in_group = |place: Place| (at(place).1 % group_chunks) as usize * chunk_size;
        let Some((first, _)) = chunks.first() else {
            return Ok(());
        };
        let pack = self.pack(at(*first).0)?;
        let mut decoded = None;
        for (place, _) in &*chunks {
            let (_, slot) = at(*place);
            if !pack.table().has(slot) {
                return Err(not_there(pack.id()));
            }
            let frame = slot / frame_chunks;
            if decoded != Some(frame) {
                let begin = in_group(*place) - (slot % frame_chunks) as usize * chunk_size;
                self.decode_to(begin, &pack, frame)?;
                decoded = Some(frame);
            }
            if is_zero(&self.plain[in_group(*place)..][..chunk_size]) {
                return Err(not_there(pack.id()));
            }
        }
        let runs = chunks.chunk_by_mut(|(a, to), (b, next)| b.follows(*a) && follows(to, next));
        for run in runs {
            let from = in_group(run[0].0);
            let count = run.len();
            put(
                count,
                &mut run[0].1,
                &self.plain[from..][..count * chunk_size],
            )?;
        }
        Ok(())
    }

    /// What it reads.
    pub(super) fn image(&self) -> &'r ImageReader {
        self.image
    }

    /// Bytes of the frame that was decoded last by [`Loader::decode`].
    ///
    /// # Errors
    ///
    /// Chunks that they are in are not there.
    pub(super) fn bytes(&self, bytes: Range<usize>) -> Result<&[u8]> {
        let config = &self.image.shared.config;
        let decoded = self.decoded.zip(self.pack.as_ref());
        let there = decoded.filter(|((_, frame), (_, pack))| {
            let first = *frame * config.frame_chunks();
            let chunk_size = config.chunk_size as usize;
            slots_of(config, &bytes).all(|slot| {
                let chunk = self.plain.get(slot * chunk_size..(slot + 1) * chunk_size);
                pack.table().has(first + slot as u32) && !chunk.is_none_or(is_zero)
            })
        });
        let plain = there.and_then(|_| self.plain.get(bytes));
        plain.ok_or_else(|| {
            let pack = self.pack.as_ref();
            not_there(pack.map(|(_, pack)| pack.id()).unwrap_or_default())
        })
    }

    /// As [`Loader::decode`], unless it is the frame that was decoded last.
    pub(super) fn decode_once(&mut self, number: u32, frame: u32) -> Result<()> {
        if self.decoded == Some((number, frame)) {
            return Ok(());
        }
        self.decode(number, frame)
    }

    /// Decodes a frame, for [`Loader::bytes`].
    pub(super) fn decode(&mut self, number: u32, frame: u32) -> Result<()> {
        let pack = self.pack(number)?;
        self.decode_to(0, &pack, frame)?;
        self.decoded = Some((number, frame));
        Ok(())
    }

    /// A pack of the recipe's, which stays open for what comes next.
    fn pack(&mut self, number: u32) -> Result<Arc<Pack>> {
        if let Some((current, pack)) = &self.pack
            && *current == number
        {
            return Ok(pack.clone());
        }
        let shared = &self.image.shared;
        let id = self.image.recipe.directory.packs[number as usize];
        let pack = shared.frames.pack(shared, id)?;
        self.decoded = None;
        self.pack = Some((number, pack.clone()));
        Ok(pack)
    }

    /// Decodes a frame to the bytes `begin` and following.
    fn decode_to(&mut self, begin: usize, pack: &Pack, frame: u32) -> Result<()> {
        self.decoded = None;
        let FrameReader { decoder, stored } = &mut self.frame;
        pack.read_frame(frame, decoder, stored, &mut self.plain[begin..])?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::*;
    use crate::CreateOptions;
    use crate::backend::Memory;
    use crate::store::{OpenOptions, Store};

    /// A recipe can be made up by whoever can write to the store.
    #[test]
    fn a_slot_that_its_frame_does_not_have_is_not_there() {
        let backend = Arc::new(Memory::new());
        let store =
            Store::create(backend, &CreateOptions::default(), OpenOptions::default()).unwrap();
        let mut writer = store.writer("name", None).unwrap();
        let mut image = writer.image("image").unwrap();
        let chunks = [[1; 4096], [2; 4096], [3; 4096]].concat();
        image.write(&chunks).unwrap();
        image.finish().unwrap();
        writer.commit().unwrap();
        let image = store.image("name", "image").unwrap();
        let pack_slots = image.shared.config.pack_slots();
        let load = |slots: Range<u32>| {
            let loaded = Mutex::new(Vec::new());
            let mut places: Vec<_> = slots
                .map(|slot| (Place::new(0, slot, pack_slots), ()))
                .collect();
            let put = |_, _: &mut (), plain: &[u8]| {
                lock(&loaded).extend_from_slice(plain);
                Ok(())
            };
            image.load(&mut places, |(), ()| true, put)?;
            Ok(loaded.into_inner().unwrap())
        };
        assert_eq!(load(0..3).unwrap(), chunks);
        let beyond: Result<_> = load(2..4);
        assert!(matches!(beyond, Err(Error::Damaged { .. })), "{beyond:?}");
    }

    #[test]
    fn a_thread_that_fails_ends_the_work_of_all() {
        let backend = Arc::new(Memory::new());
        let open = OpenOptions {
            threads: 2,
            ..OpenOptions::default()
        };
        let store = Store::create(backend, &CreateOptions::default(), open).unwrap();
        let mut writer = store.writer("name", None).unwrap();
        let mut image = writer.image("image").unwrap();
        let groups = 50;
        let chunks = groups * group_chunks(&store.shared.config);
        for chunk in 1..=chunks {
            image.write(&chunk.to_le_bytes().repeat(1024)).unwrap();
        }
        image.finish().unwrap();
        writer.commit().unwrap();
        let image = store.image("name", "image").unwrap();
        let pack_slots = image.shared.config.pack_slots();
        let mut places: Vec<_> = (0..chunks)
            .map(|slot| (Place::new(0, slot, pack_slots), ()))
            .collect();
        let loaded = AtomicU32::new(0);
        let put = |_, _: &mut (), _: &[u8]| match loaded.fetch_add(1, Ordering::Relaxed) {
            0 => Err(Error::EncodeCheck),
            _ => {
                std::thread::sleep(Duration::from_millis(5));
                Ok(())
            }
        };
        let failed: Result<()> = image.load(&mut places, |(), ()| true, put);
        assert!(matches!(failed, Err(Error::EncodeCheck)), "{failed:?}");
        let loaded = loaded.into_inner();
        assert!(loaded < groups / 2, "{loaded} groups of {groups}");
    }
}
