//! Checking snapshots: every block decoded, every place looked up.

use super::{Check, packs};
use crate::backend::{Area, Backend};
use crate::error::{Error, Result};
use crate::frame::Decoder;
use crate::marks::Slots;
use crate::name::{FileId, check_name};
use crate::recipe::BlockCoder;
use crate::snapshot::Snapshot;
use crate::store::Shared;

impl Check<'_> {
    /// Checks a snapshot; what is wrong with itself, and with packs that it needs, is noted.
    pub(super) fn snapshot(&mut self, name: &str) {
        self.snapshots += 1;
        match self.check_snapshot(name) {
            // Removed since the listing.
            Err(gone) if gone.is_not_found() => self.snapshots -= 1,
            Err(error) => {
                if !matches!(error, Error::Damaged { .. } | Error::Name(_)) {
                    self.unreadable.insert(Area::Snapshots.path(name));
                }
                self.problem(
                    Area::Snapshots,
                    name,
                    error.of_its_file(),
                    vec![name.to_owned()],
                );
            }
            Ok(()) => {}
        }
    }

    fn check_snapshot(&mut self, name: &str) -> Result<()> {
        let shared = self.shared;
        if shared.keys.is_locked() {
            check_name(name)?;
            return self.check_digests(&Snapshot::open(shared, name)?);
        }
        read_through(shared, name, |pack, slot| {
            if !self.whole(pack)?.is_some_and(|whole| whole.contains(slot)) {
                self.hit.entry(pack).or_default().insert(name.to_owned());
            }
            Ok(())
        })
    }

    /// What is whole of a pack; `None` if it is not there. One that was not when packs were listed is looked for now: the snapshot may be
    /// another of the same name.
    fn whole(&mut self, pack: FileId) -> Result<Option<&Slots>> {
        if !self.packs.whole.contains_key(&pack) && !self.missing.contains(&pack) {
            let there = self.shared.backend.open(Area::Packs, &pack.to_string());
            if there.is_ok() {
                let (whole, checked) = packs::check_one(self.shared, pack, &mut Decoder::new()?);
                self.packs.add(pack, whole, checked);
            } else {
                self.missing.insert(pack);
            }
        }
        Ok(self.packs.whole.get(&pack))
    }

    /// Checks what takes no key: all digests. A snapshot counts as hit by any damage to a pack that it names.
    fn check_digests(&mut self, snapshot: &Snapshot) -> Result<()> {
        snapshot.stored_manifest()?;
        for image in 0..snapshot.facts.images.len() {
            let recipe = snapshot.recipe(&self.shared.config, image)?;
            for block in 0..recipe.directory.blocks().len() {
                recipe.stored_block(block)?;
            }
            let packs = recipe.directory.packs.iter();
            for &pack in packs.filter(|id| **id != FileId::default()) {
                let missing = self.whole(pack)?.is_none();
                if missing || self.packs.problems.contains_key(&pack) {
                    let hit = self.hit.entry(pack).or_default();
                    hit.insert(snapshot.name.clone());
                }
            }
        }
        Ok(())
    }
}

/// Reads all that a snapshot says; tells `refers` of each chunk that it refers to.
pub(super) fn read_through(
    shared: &Shared,
    name: &str,
    mut refers: impl FnMut(FileId, u32) -> Result<()>,
) -> Result<()> {
    check_name(name)?;
    let snapshot = Snapshot::open(shared, name)?;
    snapshot.manifest()?;
    let config = &shared.config;
    let mut coder = BlockCoder::new()?;
    for image in 0..snapshot.facts.images.len() {
        let recipe = snapshot.recipe(config, image)?;
        for block in 0..recipe.directory.blocks().len() {
            let places = recipe.places(block, &mut coder)?;
            for (pack, slot) in places
                .iter()
                .filter_map(|place| place.get(config.pack_slots()))
            {
                refers(recipe.directory.packs[pack as usize], slot)?;
            }
        }
    }
    Ok(())
}
