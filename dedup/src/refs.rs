//! Names of snapshots: the files in `snapshots/`, and tags.

use std::collections::HashMap;
use std::io;

use crate::annotation;
use crate::backend::{Area, Backend, Publish};
use crate::bytes::Cursor;
use crate::error::{Error, Malformed, Result};
use crate::facts::SnapshotId;
use crate::hash::digest;
use crate::name::check_name;
use crate::snapshot::Snapshot;
use crate::store::Shared;

const MAGIC: &[u8; 8] = b"DEDUPTAG";
const TAG_BYTES: usize = 40;

/// The shortest beginning of an id that names a snapshot.
const MIN_PREFIX: usize = 4;

/// Opens everything that is called a snapshot, one after the other: each is a file that is open, and there may be more of them
/// than a process may have. Gives names and what came of it.
///
/// # Errors
///
/// The list cannot be made.
pub(crate) fn open_all(
    shared: &Shared,
) -> Result<impl Iterator<Item = (String, Result<Snapshot>)> + '_> {
    let listed = shared
        .backend
        .list(Area::Snapshots)
        .map_err(Error::file("list the snapshots"))?;
    let opened = listed.into_iter().filter_map(|entry| {
        match Snapshot::open(shared, &entry.name) {
            // Removed since the listing.
            Err(gone) if gone.is_not_found() => None,
            opened => Some((entry.name, opened)),
        }
    });
    Ok(opened)
}

/// The ids of all snapshots that can be read, and their names. Those that cannot are left to `fsck`.
///
/// # Errors
///
/// The list cannot be made.
pub(crate) fn names_by_id(shared: &Shared) -> Result<HashMap<SnapshotId, String>> {
    let readable = open_all(shared)?.filter_map(|(name, opened)| Some((opened.ok()?.id, name)));
    Ok(readable.collect())
}

/// Finds a snapshot by name, by tag, or by the beginning of its id.
pub(crate) fn resolve(shared: &Shared, reference: &str) -> Result<Snapshot> {
    let missing = || Error::NoSnapshot(reference.to_owned());
    if check_name(reference).is_err() {
        return Err(missing());
    }
    match Snapshot::open(shared, reference) {
        Err(gone) if gone.is_not_found() => {}
        other => return other,
    }
    let tagged = read_tag(&*shared.backend, reference)?;
    let prefix = tagged.map_or_else(|| reference.to_owned(), |id| id.to_string());
    if prefix.len() < MIN_PREFIX {
        return Err(missing());
    }
    let mut found = None;
    // One that cannot be read is not the one that is meant: it must not hide those that can.
    for snapshot in open_all(shared)?.filter_map(|(_, opened)| opened.ok()) {
        if snapshot.id.to_string().starts_with(&prefix) && found.replace(snapshot).is_some() {
            return Err(Error::Ambiguous(reference.to_owned()));
        }
    }
    found.ok_or_else(missing)
}

/// The snapshot that a tag names; `None` when there is no such tag.
pub(crate) fn read_tag(backend: &dyn Backend, name: &str) -> Result<Option<SnapshotId>> {
    let failed = || Error::file(format!("read {}", Area::Tags.path(name)));
    let file = match backend.open(Area::Tags, name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed())?,
    };
    // One byte more than a tag has, to notice what is too long.
    let mut bytes = vec![0; file.size().min(TAG_BYTES as u64 + 1) as usize];
    file.read_exact_at(&mut bytes, 0).map_err(failed())?;
    parse_tag(&bytes, name)
        .map(Some)
        .map_err(|malformed| malformed.in_file(Area::Tags.path(name)))
}

/// All tags, and the snapshot that each names, or why that cannot be told; none for one that went meanwhile.
///
/// # Errors
///
/// The list cannot be made.
pub(crate) fn read_tags(
    backend: &dyn Backend,
) -> Result<Vec<(String, Result<Option<SnapshotId>>)>> {
    let listed = backend
        .list(Area::Tags)
        .map_err(Error::file("list the tags"))?;
    let read = listed.into_iter().map(|entry| {
        let named = read_tag(backend, &entry.name);
        (entry.name, named)
    });
    Ok(read.collect())
}

fn parse_tag(bytes: &[u8], name: &str) -> Result<SnapshotId, Malformed> {
    let mut cursor = Cursor::new(bytes);
    cursor.expect(MAGIC, "not a tag")?;
    let id = cursor.array()?;
    let expected: [u8; 16] = cursor.array()?;
    cursor.end()?;
    if digest(&[&bytes[..24], name.as_bytes()]) != expected {
        return Err(Malformed("the digest does not match"));
    }
    Ok(SnapshotId(id))
}

fn tag_bytes(id: SnapshotId, name: &str) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&id.0);
    let digest = digest(&[&bytes, name.as_bytes()]);
    bytes.extend_from_slice(&digest);
    bytes
}

/// All tags and what they name, in alphabetical order. Tags that cannot be read are left to `fsck`.
pub(crate) fn tags_by_snapshot(backend: &dyn Backend) -> Result<Vec<(String, SnapshotId)>> {
    let tags = read_tags(backend)?.into_iter();
    let mut tags: Vec<_> = tags
        .filter_map(|(tag, named)| Some((tag, named.ok()??)))
        .collect();
    tags.sort();
    Ok(tags)
}

/// Makes or moves a tag, durably.
pub(crate) fn set_tag(backend: &dyn Backend, tag: &str, id: SnapshotId) -> Result<()> {
    check_name(tag)?;
    match backend.open(Area::Snapshots, tag) {
        Err(free) if free.kind() == io::ErrorKind::NotFound => {}
        Err(other) => {
            return Err(Error::file(format!(
                "look for {}",
                Area::Snapshots.path(tag)
            ))(other));
        }
        Ok(_) => return Err(Error::NameTaken(tag.to_owned())),
    }
    let failed = || Error::io(format!("write {}", Area::Tags.path(tag)));
    let mut draft = backend.draft().map_err(failed())?;
    draft.append(&tag_bytes(id, tag)).map_err(failed())?;
    draft.sync().map_err(failed())?;
    draft
        .publish(Area::Tags, tag, Publish::Replace)
        .map_err(failed())?;
    backend.sync(Area::Tags).map_err(failed())
}

/// Removes a tag or a snapshot, durably. The beginning of an id is not enough to lose a snapshot by.
pub(crate) fn remove(shared: &Shared, name: &str) -> Result<()> {
    let backend = &*shared.backend;
    if check_name(name).is_ok() && remove_file(backend, Area::Tags, name)? {
        return sync(backend, Area::Tags);
    }
    let snapshot = resolve(shared, name)?;
    if snapshot.name != name && snapshot.id.to_string() != name {
        return Err(Error::NoSnapshot(name.to_owned()));
    }
    let mut untagged = false;
    for (tag, id) in tags_by_snapshot(backend)? {
        untagged |= id == snapshot.id && remove_file(backend, Area::Tags, &tag)?;
    }
    // Tags first, so that none is left that names nothing.
    if untagged {
        sync(backend, Area::Tags)?;
    }
    // Last, for meanwhile another may have removed it and saved something else under its name.
    snapshot.is_there(shared)?;
    if !remove_file(backend, Area::Snapshots, &snapshot.name)? {
        return Err(Error::NoSnapshot(name.to_owned()));
    }
    sync(backend, Area::Snapshots)?;
    // The snapshot is gone, whatever becomes of these: the next collection removes what is left of them.
    let _ = annotation::remove_of(backend, snapshot.id);
    Ok(())
}

/// Removes a file; whether it was there.
pub(crate) fn remove_file(backend: &dyn Backend, area: Area, name: &str) -> Result<bool> {
    match backend.remove(area, name) {
        Ok(()) => Ok(true),
        Err(gone) if gone.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(other) => Err(Error::io(format!("remove {}", area.path(name)))(other)),
    }
}

fn sync(backend: &dyn Backend, area: Area) -> Result<()> {
    backend
        .sync(area)
        .map_err(Error::io(format!("sync {}", area.dir())))
}
