//! Leases and condemned lists: how writers, readers and a collection keep out of each other's way.
//!
//! A writer adds a pack to its lease and *then* reads the condemned lists. A collection publishes its
//! condemned list and *then* reads the leases. Whichever comes second sees the other.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use crate::backend::{Area, Backend, Lease, Publish};
use crate::bytes::Cursor;
use crate::error::{Error, Malformed, Result};
use crate::hash::digest;
use crate::name::FileId;

const MAGIC: &[u8; 8] = b"DEDUPCON";

/// Packs that are condemned at a time, at most: 64 TiB of chunks.
pub(crate) const MAX_CONDEMNED: usize = 1 << 20;

/// The packs that this process relies on. Ends when it is dropped.
pub(crate) struct Claim {
    lease: Mutex<Box<dyn Lease>>,
}

impl Claim {
    /// Begins one, of no pack.
    pub(crate) fn new(backend: &dyn Backend) -> Result<Self> {
        Ok(Claim {
            lease: Mutex::new(backend.lease().map_err(Error::io("begin a lease"))?),
        })
    }

    /// Protects packs from now on, unless a collection was first: see [`condemned`].
    pub(crate) fn add(&self, packs: &[FileId]) -> Result<()> {
        let bytes: Vec<u8> = packs.iter().flat_map(|pack| pack.0).collect();
        let mut lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        lease.append(&bytes).map_err(Error::io("write a lease"))
    }
}

/// All packs that living processes claim.
///
/// # Errors
///
/// A lease cannot be read, or is just being written: nothing may be collected then.
pub(crate) fn claimed(backend: &dyn Backend) -> Result<HashSet<FileId>> {
    let mut packs = HashSet::new();
    for lease in backend.leases().map_err(Error::file("read the leases"))? {
        let (ids, rest) = lease.as_chunks();
        if !rest.is_empty() {
            return Err(Error::Busy("a save that just claims packs"));
        }
        packs.extend(ids.iter().copied().map(FileId));
    }
    Ok(packs)
}

/// All packs that running, or crashed, collections may change.
pub(crate) fn condemned(backend: &dyn Backend) -> Result<HashSet<FileId>> {
    let mut packs = HashSet::new();
    for entry in backend
        .list(Area::Condemned)
        .map_err(Error::file("list what is condemned"))?
    {
        match read_condemned(backend, &entry.name) {
            // The collection has ended since.
            Err(gone) if gone.is_not_found() => {}
            other => packs.extend(other?),
        }
    }
    Ok(packs)
}

/// Reads a condemned list.
pub(crate) fn read_condemned(backend: &dyn Backend, name: &str) -> Result<Vec<FileId>> {
    let failed = || Error::file(format!("read {}", Area::Condemned.path(name)));
    let file = backend.open(Area::Condemned, name).map_err(failed())?;
    let damaged = |malformed: Malformed| malformed.in_file(Area::Condemned.path(name));
    // A file can be sparse, and as long as it likes.
    if file.size() > encoded_len(MAX_CONDEMNED) {
        return Err(damaged(Malformed("longer than any that is written")));
    }
    let mut bytes = vec![0; file.size() as usize];
    file.read_exact_at(&mut bytes, 0).map_err(failed())?;
    parse(&bytes).map_err(damaged)
}

/// Bytes of a list of so many packs.
const fn encoded_len(packs: usize) -> u64 {
    (MAGIC.len() + 8 + packs * 16 + 16) as u64
}

/// Publishes a condemned list of at most [`MAX_CONDEMNED`] packs, durably; gives its name.
pub(crate) fn condemn(backend: &dyn Backend, packs: &[FileId]) -> Result<String> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&(packs.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend(packs.iter().flat_map(|pack| pack.0));
    let digest = digest(&[&bytes]);
    bytes.extend_from_slice(&digest);
    let name = FileId::random()?.to_string();
    let failed = || Error::io("write what is condemned");
    let mut draft = backend.draft().map_err(failed())?;
    draft.append(&bytes).map_err(failed())?;
    draft.sync().map_err(failed())?;
    draft
        .publish(Area::Condemned, &name, Publish::New)
        .map_err(failed())?;
    backend.sync(Area::Condemned).map_err(failed())?;
    Ok(name)
}

fn parse(bytes: &[u8]) -> Result<Vec<FileId>, Malformed> {
    let mut cursor = Cursor::new(bytes);
    cursor.expect(MAGIC, "not a condemned list")?;
    let count = cursor.u32()?;
    cursor.expect(&[0; 4], "not a condemned list")?;
    let (packs, rest) = cursor.take(count as usize * 16)?.as_chunks();
    debug_assert!(rest.is_empty());
    let expected: [u8; 16] = cursor.array()?;
    cursor.end()?;
    if digest(&[&bytes[..bytes.len() - 16]]) != expected {
        return Err(Malformed("the digest does not match"));
    }
    Ok(packs.iter().copied().map(FileId).collect())
}
