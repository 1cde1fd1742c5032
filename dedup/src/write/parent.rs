//! The parent of a snapshot in work: what is kept from it, and guesses where the rest may be.

use super::session::Session;
use crate::error::Result;
use crate::name::FileId;
use crate::read::ImageReader;
use crate::recipe::{BlockCoder, Place};
use crate::snapshot::Snapshot;

/// Below this many packs a table is inherited however many of its rows are unused.
const SMALL_TABLE: usize = 64;

/// An image of the parent.
pub(super) struct Parent {
    reader: ImageReader,
    /// The session's number for each pack of the parent's table; none where it must not be referred to.
    numbers: Vec<Option<u32>>,
    /// Whether all numbers are the same, so that blocks can be kept as they are.
    same_numbers: bool,
    pack_slots: u32,
}

impl Parent {
    /// Takes over the pack numbers of all of the parent's images, unless most of them are no longer in use.
    pub(super) fn inherit(session: &Session, parent: &Snapshot) -> Result<()> {
        for image in 0..parent.facts.images.len() {
            let packs = parent
                .recipe(&session.shared.config, image)?
                .directory
                .packs;
            let used = packs.iter().filter(|id| **id != FileId::default()).count();
            if used * 2 >= packs.len() || packs.len() < SMALL_TABLE {
                session.inherit(&packs)?;
            }
        }
        Ok(())
    }

    /// Opens the parent's image of this name, if it has one.
    pub(super) fn open(session: &Session, parent: &Snapshot, image: &str) -> Result<Option<Self>> {
        if !parent.facts.images.iter().any(|facts| facts.name == image) {
            return Ok(None);
        }
        let reader = ImageReader::open(session.shared.clone(), parent, image)?;
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
        Ok(Some(Parent {
            reader,
            numbers,
            same_numbers,
            pack_slots: session.shared.config.pack_slots(),
        }))
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
