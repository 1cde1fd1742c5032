//! The parent of a snapshot in work: what is kept from it, and guesses where the rest may be.

use std::sync::Arc;

use super::session::Session;
use crate::error::Result;
use crate::name::FileId;
use crate::read::ImageReader;
use crate::recipe::{BlockCoder, Place};
use crate::snapshot::Snapshot;

/// Below this many packs a table is inherited however many of its rows are unused.
const SMALL_TABLE: usize = 64;

/// The snapshot that one in work is built on. All of its images are open from the beginning, and what they refer to is protected: it may
/// be removed meanwhile.
pub(super) struct ParentSnapshot {
    pub(super) snapshot: Snapshot,
    /// In the order of its facts.
    images: Vec<Arc<ImageReader>>,
}

impl ParentSnapshot {
    /// Opens it, and takes over the pack numbers of its images, unless most of them are no longer in use.
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshot`] when it was removed since it was looked up; it cannot be read.
    ///
    /// [`Error::NoSnapshot`]: crate::Error::NoSnapshot
    pub(super) fn open(session: &Session, snapshot: Snapshot) -> Result<Self> {
        let mut images = Vec::new();
        for image in &snapshot.facts.images {
            let reader = ImageReader::open(session.shared.clone(), &snapshot, &image.name)?;
            let packs = &reader.recipe().directory.packs;
            let used = packs.iter().filter(|id| **id != FileId::default()).count();
            if used * 2 >= packs.len() || packs.len() < SMALL_TABLE {
                session.inherit(packs)?;
            }
            images.push(Arc::new(reader));
        }
        Ok(ParentSnapshot { snapshot, images })
    }

    /// Its image of this name, if it has one.
    pub(super) fn image(&self, name: &str) -> Option<&Arc<ImageReader>> {
        let mut named = self.snapshot.facts.images.iter().zip(&self.images);
        named.find_map(|(facts, reader)| (facts.name == name).then_some(reader))
    }
}

/// An image of the parent.
pub(super) struct Parent {
    reader: Arc<ImageReader>,
    /// The session's number for each pack of the parent's table; none where it must not be referred to.
    numbers: Vec<Option<u32>>,
    /// Whether all numbers are the same, so that blocks can be kept as they are.
    same_numbers: bool,
    pack_slots: u32,
}

impl Parent {
    /// Gives its packs numbers in the session, as far as they may be referred to.
    pub(super) fn new(session: &Session, reader: Arc<ImageReader>) -> Result<Self> {
        let packs = &reader.recipe().directory.packs;
        let mut numbers = Vec::new();
        for &pack in packs {
            numbers.push(if pack == FileId::default() {
                None
            } else {
                session.number_of(pack)?
            });
        }
        let same = |(at, number): (usize, &Option<u32>)| {
            packs[at] == FileId::default() || *number == Some(at as u32)
        };
        let same_numbers = numbers.iter().enumerate().all(same);
        Ok(Parent {
            reader,
            numbers,
            same_numbers,
            pack_slots: session.shared.config.pack_slots(),
        })
    }

    pub(super) fn reader(&self) -> &ImageReader {
        &self.reader
    }

    /// Chunks in a block; 0 beyond the image's end.
    pub(super) fn block_chunks(&self, block: usize) -> usize {
        self.reader.recipe().block_chunks(block)
    }

    /// The plain form of a block, and its places in the session's numbers. A chunk that is there but must not
    /// be referred to is `None`.
    pub(super) fn block(
        &self,
        session: &Session,
        block: usize,
        coder: &mut BlockCoder,
    ) -> Result<(Vec<u8>, Vec<Option<Place>>)> {
        let form = self.reader.recipe().block_form(block)?;
        let places = self.reader.recipe().decode(block, &form, coder)?;
        let in_session = |place: Place| match place.get(self.pack_slots) {
            None => Some(Place::ZERO),
            Some((pack, slot)) => self.numbers[pack as usize].map(|pack| session.place(pack, slot)),
        };
        Ok((form, places.into_iter().map(in_session).collect()))
    }

    /// Whether a block's plain form means the same in the session.
    pub(super) fn has_same_numbers(&self) -> bool {
        self.same_numbers
    }
}
