//! A hot image: a saved machine in memory that nobody can change, from which any number of machines go on.
//!
//! It is a memfd (memfd_create(2)) that is written once, then sealed. The seals are the kernel's word that its content is what
//! was checked when it was written, whoever holds a descriptor of it; so nothing is hashed when a machine begins on it, which maps
//! it privately and shares with the others what it does not write. A file has no such seals: it can be changed under its reader.
//!
//! In it are, one after the other, the memory image, the ranges of that which are not zero, the state, and a footer. State and
//! memory are in one, so that nobody can be given those of two machines. It never leaves its host, and ends with the processes that
//! have it: its bytes are no format to be kept, and another release's are refused.

use std::{
    fs::File,
    ops::Range,
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::Path,
};

use memory::{HostPages, Layout, MachineMemory, PAGE_BYTES};
use rustix::fs::{SealFlags, fcntl_get_seals};
use saved_state::{Container, HEADER_BYTES, MAX_BODY_BYTES};

use crate::{
    Content, Error, Saving, Written, granules, image::Image, image_file::ImageFile, table::Table,
    transfer,
};

/// What must be sealed: content and length.
const SEALS: SealFlags = SealFlags::WRITE
    .union(SealFlags::GROW)
    .union(SealFlags::SHRINK);

/// With the version of the layout in its last byte.
const MAGIC: [u8; 8] = *b"FERMATH\x01";
const FOOTER_BYTES: usize = 32;
const RANGE_BYTES: usize = 16;

/// What it is called in messages: it has no path.
pub(crate) const NAME: &str = "the hot image";

/// What the footer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Footer {
    memory_bytes: u64,
    ranges: u64,
    state_bytes: u64,
}

impl Footer {
    fn to_bytes(self) -> [u8; FOOTER_BYTES] {
        let Self {
            memory_bytes,
            ranges,
            state_bytes,
        } = self;
        let mut bytes = [0; FOOTER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&memory_bytes.to_le_bytes());
        bytes[16..24].copy_from_slice(&ranges.to_le_bytes());
        bytes[24..].copy_from_slice(&state_bytes.to_le_bytes());
        bytes
    }

    /// The footer of an image of `len` bytes, if it is one: what it says can be allocated for.
    fn from_bytes(bytes: &[u8; FOOTER_BYTES], len: u64) -> Option<Self> {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let footer = Self {
            memory_bytes: word(8),
            ranges: word(16),
            state_bytes: word(24),
        };
        let whole = footer.bytes()? == len;
        let possible = footer.ranges <= footer.memory_bytes / PAGE_BYTES
            && footer.state_bytes <= MAX_BODY_BYTES + HEADER_BYTES as u64;
        (bytes.starts_with(&MAGIC) && whole && possible).then_some(footer)
    }

    /// How long the image is.
    fn bytes(&self) -> Option<u64> {
        self.memory_bytes
            .checked_add(self.ranges.checked_mul(RANGE_BYTES as u64)?)?
            .checked_add(self.state_bytes)?
            .checked_add(FOOTER_BYTES as u64)
    }
}

/// Begins an image in `file`, which is empty, of a machine with so many bytes of memory.
pub(crate) fn begin(file: &File, memory_bytes: u64) -> Result<ImageFile, Error> {
    let begun = file.set_len(memory_bytes);
    let file = begun.and_then(|()| file.try_clone());
    let file = file.map_err(Error::io("write", NAME))?;
    Ok(ImageFile::new(file, memory_bytes))
}

/// Writes `memory` and `state` into `file`, in which `image` is. Nothing seals it: that is for who made the file.
pub(crate) fn write(
    file: &File,
    state: &Container,
    image: ImageFile,
    memory: &impl Content,
    saving: &Saving,
) -> Result<Written, Error> {
    granules::save(&image, memory, saving).map_err(Error::io("write", NAME))?;
    let (table, written) = image.finish();
    write_tail(file, state, &table, written.memory_bytes)?;
    Ok(written)
}

/// Writes the machine that `image` and `state` are, each granule compared with its digest as it is copied: what is compared is
/// what is written, whatever becomes of the file.
pub(crate) fn write_image(file: &File, state: &Container, image: &Image) -> Result<(), Error> {
    let memory_bytes = image.memory_bytes();
    file.set_len(memory_bytes)
        .map_err(Error::io("write", NAME))?;
    image.copy_to(file)?;
    write_tail(file, state, image.table(), memory_bytes)
}

fn write_tail(
    file: &File,
    state: &Container,
    table: &Table,
    memory_bytes: u64,
) -> Result<(), Error> {
    let state = state.to_bytes();
    let data = table.data(memory_bytes);
    let footer = Footer {
        memory_bytes,
        ranges: data.len() as u64,
        state_bytes: state.len() as u64,
    };
    let ends = data.iter().flat_map(|range| [range.start, range.end]);
    let mut tail: Vec<u8> = ends.flat_map(u64::to_le_bytes).collect();
    tail.extend_from_slice(&state);
    tail.extend_from_slice(&footer.to_bytes());
    file.write_all_at(&tail, memory_bytes)
        .map_err(Error::io("write", NAME))
}

/// An image whose seals have been looked at, and whose footer is that of one.
#[derive(Debug)]
pub(crate) struct Hot {
    file: File,
    layout: Layout,
    data: Vec<Range<u64>>,
}

impl Hot {
    /// Takes `fd` for an image if it is sealed, and reads the state in it.
    pub(crate) fn open(fd: OwnedFd) -> Result<(Self, Container), Error> {
        // What is no memfd has no seals, or that against further seals alone.
        if !fcntl_get_seals(&fd).is_ok_and(|seals| seals.contains(SEALS)) {
            return Err(Error::NotSealed);
        }
        let file = File::from(fd);
        let bad = |reason: &str| Error::Memory {
            path: NAME.into(),
            reason: reason.to_owned(),
        };
        let failed = || Error::io("read", NAME);
        let len = file.metadata().map_err(failed())?.len();
        let footer_at = len.checked_sub(FOOTER_BYTES as u64);
        let footer_at = footer_at.ok_or_else(|| bad("is too short"))?;
        let mut footer = [0; FOOTER_BYTES];
        file.read_exact_at(&mut footer, footer_at)
            .map_err(failed())?;
        let footer = Footer::from_bytes(&footer, len);
        let footer =
            footer.ok_or_else(|| bad("is not one, or is another release's; make another"))?;
        let mut tail = vec![0; (footer_at - footer.memory_bytes) as usize];
        file.read_exact_at(&mut tail, footer.memory_bytes)
            .map_err(failed())?;
        let (ranges, state) = tail.split_at(footer.ranges as usize * RANGE_BYTES);
        let layout =
            Layout::new(footer.memory_bytes).map_err(|e| bad(&format!("cannot be used: {e}")))?;
        let data = data(ranges, footer.memory_bytes);
        let data = data.ok_or_else(|| bad("says of its memory what cannot be; make another"))?;
        let state = Container::from_bytes(state).map_err(|source| Error::State {
            path: NAME.into(),
            source,
        })?;
        Ok((Self { file, layout, data }, state))
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.layout.bytes()
    }

    /// Maps it over memory that was made for it.
    pub(crate) fn load_over(&self, memory: &MachineMemory) -> Result<(), Error> {
        let mapped = memory.map_over(&self.file, &self.data);
        mapped.map_err(Error::GuestMemory)
    }

    /// Maps it as the memory of a machine, or copies it into one of reserved huge pages.
    pub(crate) fn load(&self, pages: HostPages) -> Result<MachineMemory, Error> {
        let layout = self.layout.clone();
        match pages {
            HostPages::Any => MachineMemory::from_image(layout, &self.file, &self.data)
                .map_err(Error::GuestMemory),
            HostPages::Reserved => MachineMemory::filled(layout, pages, |image| {
                transfer::read_data(&self.file, Path::new(NAME), &self.data, image)
            }),
        }
    }
}

/// The ranges, if they are ascending, apart, of whole pages, and within an image of `end` bytes.
fn data(bytes: &[u8], end: u64) -> Option<Vec<Range<u64>>> {
    let (words, _) = bytes.as_chunks::<8>();
    let (pairs, _) = words.as_chunks::<2>();
    let mut last = 0;
    pairs
        .iter()
        .map(|[start, stop]| {
            let range = u64::from_le_bytes(*start)..u64::from_le_bytes(*stop);
            let pages =
                range.start.is_multiple_of(PAGE_BYTES) && range.end.is_multiple_of(PAGE_BYTES);
            let fits = last <= range.start && range.start < range.end && range.end <= end;
            last = range.end;
            (pages && fits).then_some(range)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_possible_ranges_are_believed() {
        let page = PAGE_BYTES;
        let read = |ends: &[u64]| {
            let bytes: Vec<u8> = ends.iter().flat_map(|end| end.to_le_bytes()).collect();
            data(&bytes, 8 * page)
        };
        assert_eq!(read(&[]), Some(vec![]));
        let good = read(&[0, page, 2 * page, 8 * page]);
        assert_eq!(good, Some(vec![0..page, 2 * page..8 * page]));
        for bad in [
            &[0, 9 * page][..],
            &[page, page],
            &[2 * page, page],
            &[1, page],
            &[0, page - 1],
            &[2 * page, 3 * page, page, 2 * page],
            &[0, page.wrapping_neg()],
        ] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn a_footer_is_of_an_image_of_its_length_alone(fields: [u64; 3], len: u64) {
            let [memory_bytes, ranges, state_bytes] = fields;
            let footer = Footer { memory_bytes, ranges, state_bytes };
            let read = Footer::from_bytes(&footer.to_bytes(), len);
            prop_assert!(read.is_none_or(|read| read.bytes() == Some(len)));
        }
    }
}
