//! Annotations: what is learned of a snapshot after it was saved, in small files beside it.
//!
//! A snapshot is whole without them, so that one that cannot be read is no loss to it.

use std::collections::{HashMap, HashSet};
use std::io;

use crate::backend::{Area, Backend, Publish};
use crate::bytes::{Cursor, from_hex};
use crate::error::{Error, Malformed, Result};
use crate::facts::SnapshotId;
use crate::hash::digest;
use crate::name::check_name;
use crate::refs::{self, remove_file};
use crate::snapshot::Snapshot;
use crate::store::Shared;

const MAGIC: &[u8; 8] = b"DEDUPANN";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 16;
const DIGEST_BYTES: usize = 16;

/// Bytes that an annotation has at most.
pub const MAX_ANNOTATION_BYTES: usize = 1 << 20;

/// Characters of an annotation's name: with a snapshot's id before it, it is a file's.
const MAX_NAME: usize = 64;

/// No file of an annotation is longer: what it has, sealed, and around it.
const MAX_FILE_BYTES: u64 =
    (HEADER_BYTES + MAX_ANNOTATION_BYTES + crate::seal::OVERHEAD + DIGEST_BYTES) as u64;

/// What an annotation's file is called.
fn file_name(snapshot: SnapshotId, name: &str) -> String {
    format!("{snapshot}.{name}")
}

/// What a file in the area is of; `None` if no annotation is called like this.
fn parse_name(file: &str) -> Option<(SnapshotId, &str)> {
    let (id, name) = file.split_once('.')?;
    check(name).ok()?;
    from_hex(id).map(|id| (SnapshotId(id), name))
}

fn check(name: &str) -> Result<()> {
    check_name(name)?;
    if name.len() > MAX_NAME {
        return Err(Error::Name(name.to_owned()));
    }
    Ok(())
}

/// The content of an annotation; `None` when there is none of this name.
pub(crate) fn read(shared: &Shared, snapshot: &Snapshot, name: &str) -> Result<Option<Vec<u8>>> {
    check(name)?;
    let keys = snapshot.keys()?;
    let file = file_name(snapshot.id, name);
    let Some(stored) = read_stored(&*shared.backend, &file)? else {
        return Ok(None);
    };
    let content = match keys {
        Some(keys) => keys
            .open_annotation(name, &stored)
            .map_err(|malformed| malformed.in_file(Area::Annotations.path(&file)))?,
        None => stored,
    };
    Ok(Some(content))
}

/// The content of a file as it is stored, with its digest checked; `None` when there is none.
fn read_stored(backend: &dyn Backend, file: &str) -> Result<Option<Vec<u8>>> {
    let failed = || Error::file(format!("read {}", Area::Annotations.path(file)));
    let opened = match backend.open(Area::Annotations, file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed())?,
    };
    let damaged = |malformed: Malformed| malformed.in_file(Area::Annotations.path(file));
    if opened.size() > MAX_FILE_BYTES {
        return Err(damaged(Malformed("longer than any that is written")));
    }
    let mut bytes = vec![0; opened.size() as usize];
    opened.read_exact_at(&mut bytes, 0).map_err(failed())?;
    let (version, content) = parse(&bytes, file).map_err(damaged)?;
    if version != VERSION {
        return Err(Error::NewerFile {
            file: Area::Annotations.path(file),
            found: version,
            supported: VERSION,
        });
    }
    Ok(Some(content.to_vec()))
}

/// The version and the content of a file.
fn parse<'b>(bytes: &'b [u8], file: &str) -> Result<(u32, &'b [u8]), Malformed> {
    let mut cursor = Cursor::new(bytes);
    cursor.expect(MAGIC, "not an annotation")?;
    let version = cursor.u32()?;
    let len = cursor.u32()?;
    let content = cursor.take(len as usize)?;
    let expected: [u8; DIGEST_BYTES] = cursor.array()?;
    cursor.end()?;
    let covered = &bytes[..bytes.len() - DIGEST_BYTES];
    if digest(&[covered, file.as_bytes()]) != expected {
        return Err(Malformed("the digest does not match"));
    }
    Ok((version, content))
}

fn encode(stored: &[u8], file: &str) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&(stored.len() as u32).to_le_bytes());
    bytes.extend_from_slice(stored);
    let digest = digest(&[&bytes, file.as_bytes()]);
    bytes.extend_from_slice(&digest);
    bytes
}

/// Keeps `content` beside a snapshot, durably, in place of what was there under this name.
pub(crate) fn write(
    shared: &Shared,
    snapshot: &Snapshot,
    name: &str,
    content: &[u8],
) -> Result<()> {
    check(name)?;
    if content.len() > MAX_ANNOTATION_BYTES {
        return Err(Error::Parameter(format!(
            "an annotation has at most {MAX_ANNOTATION_BYTES} bytes, and not {}",
            content.len()
        )));
    }
    let sealed = match snapshot.keys()? {
        Some(keys) => Some(keys.seal_annotation(name, content)?),
        None => None,
    };
    snapshot.is_there(shared)?;
    let backend = &*shared.backend;
    let file = file_name(snapshot.id, name);
    let failed = || Error::io(format!("write {}", Area::Annotations.path(&file)));
    let mut draft = backend.draft().map_err(failed())?;
    let bytes = encode(sealed.as_deref().unwrap_or(content), &file);
    draft.append(&bytes).map_err(failed())?;
    draft.sync().map_err(failed())?;
    draft
        .publish(Area::Annotations, &file, Publish::Replace)
        .map_err(failed())?;
    backend.sync(Area::Annotations).map_err(failed())?;
    // Whoever removes the snapshot looks for annotations after that.
    if let Err(gone) = snapshot.is_there(shared) {
        remove_file(backend, Area::Annotations, &file)?;
        return Err(gone);
    }
    Ok(())
}

/// Removes all annotations of a snapshot that was removed.
pub(crate) fn remove_of(backend: &dyn Backend, snapshot: SnapshotId) -> Result<()> {
    for (file, id) in all(backend)? {
        if id == snapshot {
            remove_file(backend, Area::Annotations, &file)?;
        }
    }
    Ok(())
}

/// Removes annotations of no snapshot; gives their number.
///
/// # Errors
///
/// A snapshot cannot be read, which may be the one.
pub(crate) fn remove_orphans(shared: &Shared) -> Result<u64> {
    let backend = &*shared.backend;
    // Before the snapshots: who annotates one has found it.
    let mut orphans = all(backend)?;
    if orphans.is_empty() {
        return Ok(0);
    }
    let ids = refs::open_all(shared)?.map(|(_, opened)| opened.map(|snapshot| snapshot.id));
    let ids: HashSet<SnapshotId> = ids.collect::<Result<_>>()?;
    orphans.retain(|(_, id)| !ids.contains(id));
    let mut removed = 0;
    for (file, _) in orphans {
        removed += u64::from(remove_file(backend, Area::Annotations, &file)?);
    }
    Ok(removed)
}

/// The files of all annotations, and whose they are. What is called otherwise is left to `fsck`.
fn all(backend: &dyn Backend) -> Result<Vec<(String, SnapshotId)>> {
    let files = backend
        .list(Area::Annotations)
        .map_err(Error::file("list the annotations"))?;
    let named = files.into_iter().filter_map(|entry| {
        let (id, _) = parse_name(&entry.name)?;
        Some((entry.name, id))
    });
    Ok(named.collect())
}

/// Checks a file: its digest and, with the key, what is sealed, if one of `snapshots` is its own. That there is none is no
/// problem: the next collection removes it.
pub(crate) fn check_file(
    shared: &Shared,
    file: &str,
    snapshots: &HashMap<SnapshotId, String>,
) -> Result<()> {
    let Some((id, name)) = parse_name(file) else {
        return Err(
            Malformed("no annotation is called like this").in_file(Area::Annotations.path(file))
        );
    };
    read_stored(&*shared.backend, file)?;
    let own = snapshots.get(&id).filter(|_| !shared.keys.is_locked());
    // One that is gone by now is as none.
    match own.map(|own| Snapshot::open(shared, own)) {
        Some(Ok(snapshot)) if snapshot.id == id => read(shared, &snapshot, name).map(drop),
        _ => Ok(()),
    }
}
