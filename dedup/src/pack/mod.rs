//! Packs: files of frames, with a table of where they are and the identities of their chunks.

mod build;
mod ids;
mod open;
mod salvage;
mod table;

pub(crate) use build::{Batch, PackBuilder};
pub(crate) use ids::{IdsCache, ids_cache};
pub(crate) use open::Pack;
pub(crate) use salvage::salvage;
pub(crate) use table::{ChunkIds, Live, Table};

use crate::config::Config;
use crate::name::FileId;

const MAGIC: &[u8; 8] = b"DEDUPPCK";
const END_MAGIC: &[u8; 8] = b"DEDUPEND";

/// Bytes before the first frame.
const HEADER_BYTES: usize = 8 + 16 + Config::BYTES;

/// Bytes after the identities.
const TRAILER_BYTES: usize = 56;

/// Bytes of the trailer that its own digest covers.
const TRAILER_COVERED: usize = TRAILER_BYTES - 16;

/// Where the copy of the store's config is in a pack.
pub(crate) const CONFIG_AT: u64 = 24;

/// What the sealed identities of a pack are bound to: which slots live tells whose they are.
fn ids_context(header: &[u8], table: &[u8]) -> Vec<u8> {
    let hash = blake3::Hasher::new()
        .update(header)
        .update(table)
        .finalize();
    [b"identities", hash.as_bytes().as_slice()].concat()
}

fn header(id: FileId, config: &Config) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..24].copy_from_slice(&id.0);
    header[24..].copy_from_slice(&config.encode());
    header
}
