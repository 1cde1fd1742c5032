//! What the files of a chain are called.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    path::{Path, PathBuf},
};

use crate::{error::Error, header::LayerId};

const LAYER: &str = ".layer";
const HEAD: &str = ".head";
const PARTIAL: &str = ".partial";
const KEPT: &str = ".kept";
const ID_DIGITS: usize = 32;
/// Bytes of a name of somebody's that are kept where two ids come behind it: files have names of 255 at most, and drafts have more.
const STEM_BYTES: usize = 128;

/// Bytes that a file's name has at most.
const NAME_BYTES: usize = 255;
/// Bytes that are put behind a disk's name when it is sealed.
pub(crate) const SEALED_BYTES: usize = 1 + ID_DIGITS + LAYER.len();
/// Bytes that are put behind a layer's name for a child's second name of it.
const KEPT_BYTES: usize = 1 + ID_DIGITS + KEPT.len();
/// Bytes that a disk's name has at most, but for what is put behind it here.
pub(crate) const MAX_DISK_BYTES: usize = NAME_BYTES - SEALED_BYTES;

/// The name that a head called `path` gets when it is sealed.
pub(crate) fn sealed(path: &Path, id: LayerId) -> Result<PathBuf, Error> {
    named(path, |stem| format!("{stem}.{id}{LAYER}"))
}

/// A name for a head on the sealed layer `path`.
pub(crate) fn head_on(path: &Path, id: LayerId) -> Result<PathBuf, Error> {
    named(path, |stem| format!("{stem}.{id}{HEAD}"))
}

/// The file name for the layer `id`, once at `path`, where it is made again of what the snapshot `of` has of it: its own, if that is a
/// sealed layer's, whose id stands for its content (a head that was about to end has that name, too, after a crash, until it is opened). What
/// was only read need not be sealed, and then its id stands for whatever is written to it: such a name has the snapshot's id, too, so
/// that what two snapshots have of it does not meet.
///
/// # Errors
///
/// [`Error::Path`] when `path` has no file name, or one that is not UTF-8.
pub fn rebuilt(path: &Path, id: LayerId, of: &str) -> Result<OsString, Error> {
    let own = path.file_name().unwrap_or_default();
    if own
        .as_encoded_bytes()
        .ends_with(format!(".{id}{LAYER}").as_bytes())
    {
        return Ok(own.to_owned());
    }
    let named = named(path, |stem| {
        let fits = |end: &usize| stem.is_char_boundary(*end);
        let end = (0..=STEM_BYTES.min(stem.len())).rev().find(fits);
        let stem = &stem[..end.unwrap_or_default()];
        format!("{stem}.{of}.{id}{LAYER}")
    })?;
    Ok(named.file_name().unwrap_or_default().to_owned())
}

/// A second name for the layer `path`, for its child with that id.
pub(crate) fn kept(path: &Path, child: LayerId) -> PathBuf {
    let mut name = fitting(path.file_name().unwrap_or_default(), KEPT_BYTES);
    name.push(format!(".{child}{KEPT}"));
    path.with_file_name(name)
}

/// `name`, or its digest where there is no room for so many bytes more.
fn fitting(name: &OsStr, more: usize) -> OsString {
    if name.len() + more <= NAME_BYTES {
        return name.to_owned();
    }
    let digest = blake3::hash(name.as_encoded_bytes()).to_hex();
    digest[..ID_DIGITS].into()
}

fn named(path: &Path, name: impl FnOnce(&str) -> String) -> Result<PathBuf, Error> {
    let own = path.file_name().and_then(|name| name.to_str());
    let own = own.ok_or_else(|| Error::Path {
        path: path.to_owned(),
    })?;
    let name = name(stem(own));
    if name.len() > NAME_BYTES {
        return Err(Error::LongName {
            path: path.to_owned(),
        });
    }
    Ok(path.with_file_name(name))
}

/// A name without what was put behind it here.
fn stem(name: &str) -> &str {
    let bare = [LAYER, HEAD]
        .iter()
        .find_map(|ending| name.strip_suffix(ending));
    match bare.and_then(|bare| bare.rsplit_once('.')) {
        Some((stem, id)) if is_id(id) && !stem.is_empty() => stem,
        _ => name,
    }
}

/// The name of what is to become `path`.
pub(crate) fn draft(path: &Path, id: LayerId) -> PathBuf {
    let mut name = drafts_of(path.file_name().unwrap_or_default());
    name.push(format!("{id}{PARTIAL}"));
    path.with_file_name(name)
}

/// How the names of the drafts begin of what is to be called `name`: with that, or with its digest where it is too long.
fn drafts_of(name: &OsStr) -> OsString {
    let mut begin = OsString::from(".");
    begin.push(fitting(name, ID_DIGITS + PARTIAL.len() + 2));
    begin.push(".");
    begin
}

/// Removes the drafts of `path` that a crash has left: those that nobody has locked.
pub(crate) fn sweep(path: &Path) {
    let Some((directory, name)) = path.parent().zip(path.file_name()) else {
        return;
    };
    let Ok(entries) = std::fs::read_dir(directory) else {
        return;
    };
    let prefix = drafts_of(name);
    for entry in entries.flatten() {
        let found = entry.file_name();
        let middle = found
            .as_encoded_bytes()
            .strip_prefix(prefix.as_encoded_bytes());
        let id = middle.and_then(|middle| middle.strip_suffix(PARTIAL.as_bytes()));
        if id.and_then(|id| str::from_utf8(id).ok()).is_some_and(is_id) && is_left(&entry.path()) {
            discard(&entry.path());
        }
    }
}

/// Whether a file of that name is or was to be a layer, whatever is in it.
pub(crate) fn is_of_a_layer(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    [LAYER, HEAD, PARTIAL, KEPT]
        .iter()
        .any(|ending| name.ends_with(ending.as_bytes()))
}

/// Whether `path` is a second name of the layer `of`.
pub(crate) fn is_kept(path: &Path, of: &Path) -> bool {
    let own = fitting(of.file_name().unwrap_or_default(), KEPT_BYTES);
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    let rest = name.strip_prefix(own.as_encoded_bytes());
    rest.is_some_and(|rest| rest.starts_with(b".") && rest.ends_with(KEPT.as_bytes()))
        && path.parent() == of.parent()
}

/// The second names of the layer `path`.
pub(crate) fn all_kept(path: &Path) -> Vec<PathBuf> {
    let entries = path
        .parent()
        .and_then(|directory| std::fs::read_dir(directory).ok());
    let found = entries.into_iter().flatten().flatten();
    let found = found.map(|entry| entry.path());
    found.filter(|found| is_kept(found, path)).collect()
}

/// Whether nobody is at work on this draft.
fn is_left(draft: &Path) -> bool {
    File::open(draft).is_ok_and(|file| file.try_lock().is_ok())
}

/// Removes a file that nobody needs any more.
pub(crate) fn discard(path: &Path) {
    match std::fs::remove_file(path) {
        Ok(()) => {
            #[cfg(test)]
            crate::tape::removed(path);
        }
        Err(e) => tracing::warn!(path = %path.display(), "a file is left behind: {e}"),
    }
}

fn is_id(text: &str) -> bool {
    text.len() == ID_DIGITS && text.bytes().all(|digit| digit.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_grow() {
        let [one, two] = [1, 2].map(|n| LayerId([n; 16]));
        let layer = sealed(Path::new("/d/web.disk"), one).unwrap();
        assert_eq!(layer, Path::new(&format!("/d/web.disk.{one}.layer")));
        let head = head_on(&layer, two).unwrap();
        assert_eq!(head, Path::new(&format!("/d/web.disk.{two}.head")));
        assert_eq!(
            sealed(&head, two).unwrap(),
            Path::new(&format!("/d/web.disk.{two}.layer"))
        );
        assert_eq!(
            rebuilt(&layer, one, "monday").unwrap(),
            layer.file_name().unwrap()
        );
        // A user's own name is not taken apart.
        assert_eq!(stem("my.layer"), "my.layer");
        assert_eq!(stem(&format!(".{one}.layer")), format!(".{one}.layer"));
    }

    #[test]
    fn what_is_not_sealed_is_made_for_each_snapshot() {
        let [one, two] = [1, 2].map(|n| LayerId([n; 16]));
        let made = |path: &str, of| rebuilt(Path::new(path), one, of);
        for own in ["/d/tools".to_owned(), format!("/d/tools.{one}.head")] {
            let monday = made(&own, "monday").unwrap();
            assert_eq!(monday, *format!("tools.monday.{one}.layer"));
            assert_ne!(made(&own, "tuesday").unwrap(), monday);
            // A snapshot of a machine that goes on from it means this one.
            let again = rebuilt(Path::new(&monday), one, "tuesday").unwrap();
            assert_eq!(again, monday);
        }
        // A name that tells of another layer tells nothing of this one.
        let other = made(&format!("/d/tools.{two}.layer"), "monday").unwrap();
        assert_eq!(other, *format!("tools.monday.{one}.layer"));
        assert!(matches!(made("/", "monday"), Err(Error::Path { .. })));
        let long = made(&format!("/d/{}", "ä".repeat(127)), &"0".repeat(32)).unwrap();
        assert!(draft(Path::new(&long), one).as_os_str().len() <= 255);
    }
}
