//! Which slots of which packs are referred to.

use std::collections::{HashMap, HashSet};

use crate::error::Result;
use crate::facts::SnapshotId;
use crate::name::FileId;
use crate::protect::claimed;
use crate::recipe::BlockCoder;
use crate::refs::open_all;
use crate::store::Shared;

/// A set of slots of one pack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Slots {
    words: Vec<u64>,
}

impl Slots {
    pub(crate) fn insert(&mut self, slot: u32) {
        let word = slot as usize / 64;
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (slot % 64);
    }

    pub(crate) fn contains(&self, slot: u32) -> bool {
        self.words
            .get(slot as usize / 64)
            .is_some_and(|word| word >> (slot % 64) & 1 == 1)
    }

    pub(crate) fn len(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }
}

/// What is referred to, by living processes and by snapshots. Takes 2 KiB for each pack of 64 MiB of chunks.
#[derive(Default)]
pub(crate) struct Marks {
    /// Packs of which nothing may go: living processes rely on them, or a snapshot names them and it takes a key
    /// that is not at hand to know which slots.
    whole: HashSet<FileId>,
    slots: HashMap<FileId, Slots>,
    seen: HashSet<SnapshotId>,
}

impl Marks {
    /// Adds everything that is referred to now. What was referred to at an earlier call stays.
    ///
    /// Leases first: a writer publishes its snapshot before its lease ends, and is seen in one of the two.
    ///
    /// # Errors
    ///
    /// Something cannot be read; the marks are then worth nothing.
    pub(crate) fn add_all(&mut self, shared: &Shared) -> Result<()> {
        self.whole.extend(claimed(&*shared.backend)?);
        let mut coder = BlockCoder::new()?;
        let pack_slots = shared.config.pack_slots();
        for (_, opened) in open_all(shared)? {
            let snapshot = opened?;
            if !self.seen.insert(snapshot.id) {
                continue;
            }
            for image in 0..snapshot.facts.images.len() {
                let recipe = snapshot.recipe(&shared.config, image)?;
                if shared.keys.is_locked() {
                    self.whole.extend(&recipe.directory.packs);
                    continue;
                }
                for block in 0..recipe.directory.blocks().len() {
                    let places = recipe.places(block, &mut coder)?;
                    for run in places.chunk_by(|a, b| a.pack(pack_slots) == b.pack(pack_slots)) {
                        let Some(pack) = run[0].pack(pack_slots) else {
                            continue;
                        };
                        let slots = self
                            .slots
                            .entry(recipe.directory.packs[pack as usize])
                            .or_default();
                        run.iter()
                            .filter_map(|place| place.get(pack_slots))
                            .for_each(|(_, slot)| slots.insert(slot));
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether nothing of a pack may go.
    pub(crate) fn is_whole(&self, pack: FileId) -> bool {
        self.whole.contains(&pack)
    }

    /// The slots of a pack that snapshots refer to; `None` when there are none.
    pub(crate) fn slots(&self, pack: FileId) -> Option<&Slots> {
        self.slots.get(&pack)
    }
}
