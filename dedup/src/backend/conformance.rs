//! What every [`Backend`] must do, as checks that run on any of them.

use std::io::{Error, ErrorKind, Result};

use super::{Area, Backend, Lock, Publish};

/// Checks an empty backend, and leaves it empty.
///
/// # Errors
///
/// The first rule that it breaks, or an error of its own.
pub fn check(backend: &dyn Backend) -> Result<()> {
    drafts_are_invisible_until_published(backend)?;
    names_are_given_once(backend)?;
    readers_keep_what_they_opened(backend)?;
    areas_are_apart(backend)?;
    missing_files_are_not_found(backend)?;
    leases_live_with_their_owner(backend)?;
    locks_exclude(backend)?;
    rule(
        backend.clear_dead()? == 0,
        "nothing of the living is cleared",
    )?;
    for area in Area::ALL {
        rule(backend.list(area)?.is_empty(), "everything removed is gone")?;
    }
    Ok(())
}

fn rule(holds: bool, rule: &str) -> Result<()> {
    if holds {
        Ok(())
    } else {
        Err(Error::other(format!("broken rule: {rule}")))
    }
}

fn write(
    backend: &dyn Backend,
    area: Area,
    name: &str,
    content: &[u8],
    how: Publish,
) -> Result<()> {
    let mut draft = backend.draft()?;
    draft.append(content)?;
    draft.sync()?;
    draft.publish(area, name, how)?;
    backend.sync(area)
}

fn read(backend: &dyn Backend, area: Area, name: &str) -> Result<Vec<u8>> {
    let file = backend.open(area, name)?;
    let mut content = vec![0; file.size() as usize];
    file.read_exact_at(&mut content, 0)?;
    Ok(content)
}

fn drafts_are_invisible_until_published(backend: &dyn Backend) -> Result<()> {
    let mut draft = backend.draft()?;
    draft.append(b"one, ")?;
    draft.append(b"two")?;
    for area in Area::ALL {
        rule(backend.list(area)?.is_empty(), "a draft is in no list")?;
    }
    rule(backend.clear_dead()? == 0, "a draft in work is not cleared")?;
    draft.publish(Area::Packs, "a", Publish::New)?;
    let listed = backend.list(Area::Packs)?;
    rule(
        listed.len() == 1 && listed[0].name == "a" && listed[0].size == 8,
        "a published file is listed",
    )?;
    rule(
        read(backend, Area::Packs, "a")? == b"one, two",
        "appends are in order",
    )?;

    let file = backend.open(Area::Packs, "a")?;
    let mut part = [0; 3];
    file.read_exact_at(&mut part, 5)?;
    rule(&part == b"two", "reads begin where asked")?;
    let beyond = file
        .read_exact_at(&mut part, 6)
        .map_err(|error| error.kind());
    rule(
        beyond == Err(ErrorKind::UnexpectedEof),
        "reads beyond the end fail",
    )?;

    drop(backend.draft()?);
    rule(
        backend.list(Area::Packs)?.len() == 1,
        "a dropped draft leaves nothing",
    )?;
    backend.remove(Area::Packs, "a")
}

fn names_are_given_once(backend: &dyn Backend) -> Result<()> {
    write(backend, Area::Snapshots, "a", b"first", Publish::New)?;
    let second =
        write(backend, Area::Snapshots, "a", b"second", Publish::New).map_err(|error| error.kind());
    rule(
        second == Err(ErrorKind::AlreadyExists),
        "a taken name is refused",
    )?;
    rule(
        read(backend, Area::Snapshots, "a")? == b"first",
        "a refused file changes nothing",
    )?;
    backend.remove(Area::Snapshots, "a")
}

fn readers_keep_what_they_opened(backend: &dyn Backend) -> Result<()> {
    write(backend, Area::Packs, "a", b"old", Publish::New)?;
    let reader = backend.open(Area::Packs, "a")?;
    write(backend, Area::Packs, "a", b"newer", Publish::Replace)?;
    let mut content = [0; 3];
    reader.read_exact_at(&mut content, 0)?;
    rule(
        &content == b"old" && reader.size() == 3,
        "a replaced file stays readable",
    )?;
    rule(
        read(backend, Area::Packs, "a")? == b"newer",
        "a replaced file is new to others",
    )?;
    let reader = backend.open(Area::Packs, "a")?;
    backend.remove(Area::Packs, "a")?;
    reader.read_exact_at(&mut content, 0)?;
    rule(&content == b"new", "a removed file stays readable")
}

fn areas_are_apart(backend: &dyn Backend) -> Result<()> {
    for area in Area::ALL {
        write(backend, area, "same", area.dir().as_bytes(), Publish::New)?;
    }
    for area in Area::ALL {
        rule(backend.list(area)?.len() == 1, "each area lists its own")?;
        rule(
            read(backend, area, "same")? == area.dir().as_bytes(),
            "each area keeps its own",
        )?;
        backend.remove(area, "same")?;
        backend.sync(area)?;
    }
    Ok(())
}

fn missing_files_are_not_found(backend: &dyn Backend) -> Result<()> {
    let opened = backend
        .open(Area::Packs, "absent")
        .map(drop)
        .map_err(|error| error.kind());
    rule(
        opened == Err(ErrorKind::NotFound),
        "opening what is not there",
    )?;
    let removed = backend
        .remove(Area::Packs, "absent")
        .map_err(|error| error.kind());
    rule(
        removed == Err(ErrorKind::NotFound),
        "removing what is not there",
    )
}

fn leases_live_with_their_owner(backend: &dyn Backend) -> Result<()> {
    let mut first = backend.lease()?;
    let second = backend.lease()?;
    first.append(b"one, ")?;
    first.append(b"two")?;
    let mut leases = backend.leases()?;
    leases.sort();
    rule(
        leases == [b"".to_vec(), b"one, two".to_vec()],
        "leases are seen as they are",
    )?;
    rule(backend.clear_dead()? == 0, "leases of the living stay")?;
    drop(second);
    rule(
        backend.leases()? == [b"one, two".to_vec()],
        "a dropped lease has ended",
    )?;
    drop(first);
    rule(backend.leases()?.is_empty(), "all leases have ended")
}

fn locks_exclude(backend: &dyn Backend) -> Result<()> {
    let held = backend.try_lock(Lock::Gc)?;
    rule(held.is_some(), "a free lock is given")?;
    rule(backend.try_lock(Lock::Gc)?.is_none(), "a held lock is not")?;
    rule(backend.try_lock(Lock::Index)?.is_some(), "locks are apart")?;
    drop(held);
    rule(
        backend.try_lock(Lock::Gc)?.is_some(),
        "a released lock is free",
    )
}
