//! Snapshot files: recipes, a manifest and facts, in one file.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use crate::backend::{Area, Backend, Publish, ReadAt};
use crate::bytes::Cursor;
use crate::config::Config;
use crate::error::{Error, Malformed, Result};
use crate::facts::{Facts, ImageFacts, SnapshotId, Span};
use crate::hash::{digest, short_digest};
use crate::name::{FileId, check_name};
use crate::recipe::{BLOCK_CHUNKS, BlockCoder, Directory, Place, chunks_of};
use crate::seal::{Access, SnapshotKeys};
use crate::store::Shared;

const MAGIC: &[u8; 8] = b"DEDUPSNP";
const END_MAGIC: &[u8; 8] = b"DEDUPSNE";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 16;
const TRAILER_BYTES: usize = 48;

/// Bytes between facts and trailer in an encrypted store, which vouch for the facts.
const AUTHENTICATOR_BYTES: usize = 32;

/// No machine has facts of this size; a larger number is damage.
const MAX_FACTS_BYTES: u32 = 16 << 20;

/// No directory and no manifest is longer: a directory of this size is that of an image of 80 TiB.
const MAX_SPAN_BYTES: u64 = 256 << 20;

/// An image that is ready to be written: its recipe, and what there is to say about it.
pub(crate) struct ImageDraft {
    pub(crate) name: String,
    pub(crate) size: u64,
    pub(crate) zero_chunks: u64,
    pub(crate) new_chunks: u64,
    pub(crate) packs: Vec<crate::name::FileId>,
    /// Stored blocks.
    pub(crate) blocks: Vec<Vec<u8>>,
}

/// A snapshot that is ready to be written.
pub(crate) struct SnapshotDraft {
    pub(crate) name: String,
    pub(crate) created_ms: u64,
    pub(crate) host: String,
    pub(crate) parent: Option<SnapshotId>,
    pub(crate) images: Vec<ImageDraft>,
    pub(crate) manifest: Vec<u8>,
}

impl SnapshotDraft {
    /// The bytes of the file, and the snapshot's id. In an encrypted store the blocks are sealed already, with `keys`.
    pub(crate) fn encode(self, keys: Option<&SnapshotKeys>) -> Result<(Vec<u8>, SnapshotId)> {
        let mut out = Vec::new();
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        let span = |out: &mut Vec<u8>, part: &[u8]| {
            let span = Span {
                at: out.len() as u64,
                len: part.len() as u64,
                digest: digest(&[part]),
            };
            out.extend_from_slice(part);
            span
        };
        let mut images = Vec::new();
        for image in self.images {
            let blocks_at = out.len() as u64;
            let rows = image
                .blocks
                .iter()
                .map(|block| (block.len() as u32, short_digest(&[block])));
            let directory = Directory::new(image.packs, rows);
            image
                .blocks
                .iter()
                .for_each(|block| out.extend_from_slice(block));
            images.push(ImageFacts {
                name: image.name,
                size: image.size,
                zero_chunks: image.zero_chunks,
                new_chunks: image.new_chunks,
                blocks_at,
                directory: span(&mut out, &directory.encode()),
            });
        }
        let manifest = match keys {
            Some(keys) => span(&mut out, &keys.seal_manifest(&self.manifest)?),
            None => span(&mut out, &self.manifest),
        };
        // What is not read must not be written either.
        let longest = images.iter().map(|image| image.directory.len).max();
        if longest.unwrap_or(0).max(manifest.len) > MAX_SPAN_BYTES {
            return Err(Error::Parameter(format!(
                "an image or the manifest is too large: at most {MAX_SPAN_BYTES} bytes are kept of the places of an image's chunks, and of a manifest"
            )));
        }
        let facts = Facts {
            name: self.name,
            created_ms: self.created_ms,
            host: self.host,
            parent: self.parent,
            images,
            manifest,
            salt: keys.map(|keys| keys.salt),
        };
        let facts = serde_json::to_vec(&facts)
            .map_err(|error| Error::io("encode a snapshot")(error.into()))?;
        if facts.len() > MAX_FACTS_BYTES as usize {
            return Err(Error::Parameter(format!(
                "there are too many images for one snapshot: what it says of them may have {MAX_FACTS_BYTES} bytes"
            )));
        }
        let mut trailer = Vec::new();
        trailer.extend_from_slice(&(out.len() as u64).to_le_bytes());
        trailer.extend_from_slice(&(facts.len() as u32).to_le_bytes());
        trailer.extend_from_slice(&VERSION.to_le_bytes());
        let covered: [&[u8]; 3] = [&out[..HEADER_BYTES], &facts, &trailer];
        let id = digest(&covered);
        let authenticator = keys.map(|keys| keys.authenticate(&covered));
        trailer.extend_from_slice(&id);
        trailer.extend_from_slice(END_MAGIC);
        trailer.extend_from_slice(&[0; 8]);
        out.extend_from_slice(&facts);
        if let Some(authenticator) = authenticator {
            out.extend_from_slice(authenticator.as_bytes());
        }
        out.extend_from_slice(&trailer);
        Ok((out, SnapshotId(id)))
    }
}

/// Writes a snapshot's file, durably but for the area's sync.
pub(crate) fn publish(backend: &dyn Backend, name: &str, bytes: &[u8]) -> Result<()> {
    let failed = || Error::io(format!("write {}", Area::Snapshots.path(name)));
    let mut draft = backend.draft().map_err(failed())?;
    draft.append(bytes).map_err(failed())?;
    draft.sync().map_err(failed())?;
    draft
        .publish(Area::Snapshots, name, Publish::New)
        .map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Error::NameTaken(name.to_owned()),
            _ => failed()(error),
        })
}

/// An open snapshot file.
#[derive(Clone)]
pub(crate) struct Snapshot {
    pub(crate) id: SnapshotId,
    pub(crate) facts: Facts,
    /// The name it has now; equal to the one it was saved under unless somebody moved the file.
    pub(crate) name: String,
    file: Arc<dyn ReadAt>,
    keys: Access<Arc<SnapshotKeys>>,
}

impl Snapshot {
    /// Opens a snapshot and checks its facts, not yet its recipes. In an encrypted store it takes the key to know that
    /// nobody has changed the facts on purpose.
    pub(crate) fn open(shared: &Shared, name: &str) -> Result<Self> {
        let backend = &*shared.backend;
        let failed = || Error::file(format!("read {}", Area::Snapshots.path(name)));
        let file = backend.open(Area::Snapshots, name).map_err(failed())?;
        let damaged = |malformed: Malformed| malformed.in_file(Area::Snapshots.path(name));
        let size = file.size();
        let too_short = || damaged(Malformed("too short"));
        let authenticator_len = if shared.config.is_encrypted() {
            AUTHENTICATOR_BYTES
        } else {
            0
        };
        let trailer_at = size
            .checked_sub(TRAILER_BYTES as u64)
            .ok_or_else(too_short)?;
        let facts_end = trailer_at
            .checked_sub(authenticator_len as u64)
            .filter(|&end| end >= HEADER_BYTES as u64)
            .ok_or_else(too_short)?;
        let (mut header, mut trailer) = ([0; HEADER_BYTES], [0; TRAILER_BYTES]);
        file.read_exact_at(&mut header, 0).map_err(failed())?;
        file.read_exact_at(&mut trailer, trailer_at)
            .map_err(failed())?;
        let (facts_at, facts_len, id) =
            parse_ends(&header, &trailer, facts_end).map_err(|refused| match refused {
                Refused::Newer(found) => Error::NewerFile {
                    file: Area::Snapshots.path(name),
                    found,
                    supported: VERSION,
                },
                Refused::Malformed(malformed) => damaged(malformed),
            })?;
        let mut encoded = vec![0; facts_len as usize];
        file.read_exact_at(&mut encoded, facts_at)
            .map_err(failed())?;
        let mut authenticator = [0; AUTHENTICATOR_BYTES];
        let authenticator = &mut authenticator[..authenticator_len];
        file.read_exact_at(authenticator, facts_end)
            .map_err(failed())?;
        let covered: [&[u8]; 3] = [&header, &encoded, &trailer[..16]];
        if digest(&covered) != id {
            return Err(damaged(Malformed("the digest of the facts does not match")));
        }
        let facts: Facts = serde_json::from_slice(&encoded)
            .map_err(|_| damaged(Malformed("the facts do not parse")))?;
        facts.check_texts().map_err(damaged)?;
        let salt = match facts.salt {
            Some(salt) if shared.config.is_encrypted() => salt,
            None if !shared.config.is_encrypted() => FileId::default(),
            _ => {
                return Err(damaged(Malformed(
                    "it is sealed, or is not, unlike its store",
                )));
            }
        };
        let keys = shared.keys.map(|keys| Arc::new(keys.snapshot(salt)));
        if let Access::Open(keys) = &keys {
            // Compares in constant time.
            if keys.authenticate(&covered) != *authenticator {
                return Err(damaged(Malformed(
                    "the facts were not written with the store's key",
                )));
            }
            if facts.name != name {
                return Err(damaged(Malformed("it was saved under another name")));
            }
        }
        let snapshot = Snapshot {
            id: SnapshotId(id),
            facts,
            name: name.to_owned(),
            file,
            keys,
        };
        snapshot.check_layout(facts_at).map_err(damaged)?;
        Ok(snapshot)
    }

    /// Fails when it was removed since it was opened, whoever has its name by now.
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshot`]; what has its name cannot be read.
    pub(crate) fn is_there(&self, shared: &Shared) -> Result<()> {
        let missing = || Error::NoSnapshot(self.name.clone());
        match Snapshot::open(shared, &self.name) {
            Ok(found) if found.id == self.id => Ok(()),
            Ok(_) => Err(missing()),
            Err(gone) if gone.is_not_found() => Err(missing()),
            Err(other) => Err(other),
        }
    }

    /// Checks that the parts follow each other without gaps, up to the facts.
    fn check_layout(&self, facts_at: u64) -> Result<(), Malformed> {
        let mut at = HEADER_BYTES as u64;
        let mut names = HashSet::new();
        for image in &self.facts.images {
            if check_name(&image.name).is_err() || !names.insert(&image.name) {
                return Err(Malformed("an image has an impossible name"));
            }
            if image.blocks_at != at || image.directory.at < at {
                return Err(Malformed("the parts do not follow each other"));
            }
            at = image.directory.end()?;
        }
        if self.facts.manifest.at != at || self.facts.manifest.end()? != facts_at {
            return Err(Malformed("the parts do not follow each other"));
        }
        Ok(())
    }

    /// The bytes of the file.
    pub(crate) fn size(&self) -> u64 {
        self.file.size()
    }

    /// What seals what is its own; `None` in a store that is not encrypted.
    ///
    /// # Errors
    ///
    /// [`Error::Key`] when it takes a key that is not at hand.
    pub(crate) fn keys(&self) -> Result<Option<&SnapshotKeys>> {
        Ok(self.keys.get()?.map(|keys| &**keys))
    }

    /// The opaque bytes that the snapshot was saved with.
    pub(crate) fn manifest(&self) -> Result<Vec<u8>> {
        let keys = self.keys.get()?;
        let stored = self.stored_manifest()?;
        match keys {
            Some(keys) => keys
                .open_manifest(&stored)
                .map_err(|malformed| self.damaged(malformed)),
            None => Ok(stored),
        }
    }

    /// The manifest as it is stored, with its digest checked.
    pub(crate) fn stored_manifest(&self) -> Result<Vec<u8>> {
        self.read_span(&self.facts.manifest, "the manifest's digest does not match")
    }

    fn read_span(&self, span: &Span, otherwise: &'static str) -> Result<Vec<u8>> {
        // `check_layout` saw to it that the span lies in the file, but a file can be sparse.
        if span.len > MAX_SPAN_BYTES {
            return Err(self.damaged(Malformed("a part is longer than any that is written")));
        }
        let mut bytes = vec![0; span.len as usize];
        self.file
            .read_exact_at(&mut bytes, span.at)
            .map_err(self.failed())?;
        if digest(&[&bytes]) != span.digest {
            return Err(self.damaged(Malformed(otherwise)));
        }
        Ok(bytes)
    }

    /// Opens the recipe of the image at this position.
    pub(crate) fn recipe(&self, config: &Config, image: usize) -> Result<Recipe> {
        let facts = &self.facts.images[image];
        let directory = self.read_span(&facts.directory, "a directory's digest does not match")?;
        let directory = Directory::parse(&directory, facts.size, config)
            .map_err(|error| self.damaged(error))?;
        if facts.blocks_at.checked_add(directory.blocks_len()) != Some(facts.directory.at) {
            return Err(self.damaged(Malformed("the blocks do not fill their place")));
        }
        Ok(Recipe {
            chunks: chunks_of(facts.size, config),
            size: facts.size,
            blocks_at: facts.blocks_at,
            pack_slots: config.pack_slots(),
            image: image as u32,
            directory,
            snapshot: self.clone(),
        })
    }

    /// The recipe of the image with this name.
    pub(crate) fn recipe_of(&self, config: &Config, image: &str) -> Result<Recipe> {
        let position = self
            .facts
            .images
            .iter()
            .position(|facts| facts.name == image);
        self.recipe(
            config,
            position.ok_or_else(|| Error::NoImage(image.to_owned()))?,
        )
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> Error {
        Error::file(format!("read {}", Area::Snapshots.path(&self.name)))
    }

    fn damaged(&self, malformed: Malformed) -> Error {
        malformed.in_file(Area::Snapshots.path(&self.name))
    }
}

enum Refused {
    Newer(u32),
    Malformed(Malformed),
}

impl From<Malformed> for Refused {
    fn from(malformed: Malformed) -> Self {
        Refused::Malformed(malformed)
    }
}

/// Reads header and trailer: offset and length of the facts, and the digest that covers them.
fn parse_ends(
    header: &[u8],
    trailer: &[u8],
    facts_end: u64,
) -> Result<(u64, u32, [u8; 16]), Refused> {
    let mut cursor = Cursor::new(header);
    cursor.expect(MAGIC, "not a snapshot")?;
    let version = cursor.u32()?;
    let mut cursor = Cursor::new(trailer);
    let (facts_at, facts_len, same_version, id) =
        (cursor.u64()?, cursor.u32()?, cursor.u32()?, cursor.array()?);
    // A newer release says so at both ends, a flipped bit at one.
    if version > VERSION && same_version == version {
        return Err(Refused::Newer(version));
    }
    cursor.expect(END_MAGIC, "the end is missing")?;
    cursor.expect(&[0; 8], "the end is missing")?;
    if same_version != version || facts_len > MAX_FACTS_BYTES {
        return Err(Malformed("the trailer is impossible").into());
    }
    if facts_at < HEADER_BYTES as u64
        || facts_at.checked_add(u64::from(facts_len)) != Some(facts_end)
    {
        return Err(Malformed("the facts do not end where they should").into());
    }
    Ok((facts_at, facts_len, id))
}

/// The recipe of one image.
pub(crate) struct Recipe {
    pub(crate) directory: Directory,
    /// Chunks in the image.
    pub(crate) chunks: u64,
    /// Bytes of the image.
    pub(crate) size: u64,
    blocks_at: u64,
    pack_slots: u32,
    /// The image's position in the snapshot.
    image: u32,
    snapshot: Snapshot,
}

impl Recipe {
    /// Chunks in the block at this position.
    pub(crate) fn block_chunks(&self, block: usize) -> usize {
        let before = block as u64 * BLOCK_CHUNKS as u64;
        (self.chunks.saturating_sub(before)).min(BLOCK_CHUNKS as u64) as usize
    }

    /// The stored bytes of a block, with their digest checked.
    pub(crate) fn stored_block(&self, block: usize) -> Result<Vec<u8>> {
        let row = self.directory.blocks()[block];
        let mut stored = vec![0; row.len as usize];
        let file = &self.snapshot.file;
        file.read_exact_at(&mut stored, self.blocks_at + row.offset)
            .map_err(self.snapshot.failed())?;
        if short_digest(&[&stored]) != row.digest {
            return Err(self
                .snapshot
                .damaged(Malformed("a block's digest does not match")));
        }
        Ok(stored)
    }

    /// The plain form of a block: what is stored, or what is under its seal.
    pub(crate) fn block_form(&self, block: usize) -> Result<Vec<u8>> {
        let keys = self.snapshot.keys.get()?;
        let stored = self.stored_block(block)?;
        match keys {
            Some(keys) => keys
                .open_block(self.image, block as u64, &stored)
                .map_err(|malformed| self.snapshot.damaged(malformed)),
            None => Ok(stored),
        }
    }

    /// Decodes a block.
    pub(crate) fn places(&self, block: usize, coder: &mut BlockCoder) -> Result<Vec<Place>> {
        self.decode(block, &self.block_form(block)?, coder)
    }

    /// Decodes the plain form of a block.
    pub(crate) fn decode(
        &self,
        block: usize,
        form: &[u8],
        coder: &mut BlockCoder,
    ) -> Result<Vec<Place>> {
        let mut places = vec![Place::ZERO; self.block_chunks(block)];
        coder
            .decode(
                form,
                self.directory.packs.len() as u32,
                self.pack_slots,
                &mut places,
            )
            .map_err(|malformed| self.snapshot.damaged(malformed))?;
        Ok(places)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Memory;
    use crate::config::CreateOptions;
    use crate::store::{OpenOptions, Store};

    fn draft(images: usize, manifest: Vec<u8>) -> SnapshotDraft {
        let image = |number: usize| ImageDraft {
            name: format!("image-{number:0200}"),
            size: 0,
            zero_chunks: 0,
            new_chunks: 0,
            packs: Vec::new(),
            blocks: Vec::new(),
        };
        SnapshotDraft {
            name: "name".into(),
            created_ms: 0,
            host: "host".into(),
            parent: None,
            images: (0..images).map(image).collect(),
            manifest,
        }
    }

    /// Digests guard against accidents: anybody may make a snapshot with any text in it.
    #[test]
    fn texts_that_would_steer_a_terminal_are_refused() {
        let backend = Memory::new();
        let (create, open) = (CreateOptions::default(), OpenOptions::default());
        let store = Store::create(backend.clone(), &create, open).unwrap();
        let opened = |file: &str, name: &str, host: &str| {
            let draft = SnapshotDraft {
                name: name.into(),
                host: host.into(),
                ..draft(0, Vec::new())
            };
            publish(&backend, file, &draft.encode(None).unwrap().0).unwrap();
            Snapshot::open(&store.shared, file).map(drop)
        };
        opened("good", "name", "the höst").unwrap();
        for (file, name, host) in [
            ("escape", "name", "\u{1b}[2Jevil"),
            ("line", "name", "evil\nline"),
            ("c1", "name", "\u{9b}2J"),
            ("name", "\u{1b}[2J", "host"),
        ] {
            let opened = opened(file, name, host);
            assert!(matches!(opened, Err(Error::Damaged { .. })), "{opened:?}");
        }
    }

    #[test]
    fn what_would_not_be_read_is_not_written() {
        let too_long = vec![0; MAX_SPAN_BYTES as usize + 1];
        for draft in [draft(60_000, Vec::new()), draft(1, too_long)] {
            let refused = draft.encode(None).map(drop);
            assert!(matches!(refused, Err(Error::Parameter(_))), "{refused:?}");
        }
        assert!(draft(1000, vec![1; 1000]).encode(None).is_ok());
    }
}
