//! Each version of each saved state that can be read has a golden file, and nothing else has one.
//!
//! What is in the files, the crates test that read them, by the crate `golden`. Nothing lists the kinds of sections, so
//! that one was forgotten is seen in the sources.

#![allow(clippy::unwrap_used)] // a test that cannot go on should stop

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Those of formats that are no section's.
const OTHERS: &[&str] = &[
    "branch-disk/golden/disk-1.hex",
    "branch-disk/golden/disk-2.hex",
    "dedup/golden/encrypted-store-2.hex",
    "dedup/golden/store-2.hex",
    "snapshot/golden/memory-file-1.hex",
    "snapshot/golden/reference-1.hex",
    "snapshot/golden/state-file-1.hex",
];

#[test]
fn every_version_of_every_kind_has_a_golden_file_and_nothing_else_has() {
    let mut needed: BTreeSet<PathBuf> = OTHERS.iter().map(PathBuf::from).collect();
    let mut found = BTreeSet::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for package in entries(root) {
        let golden = Path::new(package.file_name().unwrap()).join("golden");
        for (kind, newest) in declared_in(&package.join("src")) {
            let names = (1..=newest).map(|version| format!("{kind}-{version}.hex"));
            needed.extend(names.map(|name| golden.join(name)));
        }
        let files = entries(&package.join("golden")).into_iter();
        let files = files.filter(|file| file.extension().is_some_and(|ending| ending == "hex"));
        found.extend(files.map(|file| golden.join(file.file_name().unwrap())));
    }
    assert!(
        found == needed,
        "missing: {:?}; of nothing that can be read: {:?}. The test of a saved type calls golden::check_sections, and \
         writes what is missing with FERMATA_WRITE_GOLDEN=1",
        &needed - &found,
        &found - &needed,
    );
}

/// What is in a directory, nothing if there is none.
fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// The kinds of sections that the sources in `directory` and below declare, each with its newest version.
fn declared_in(directory: &Path) -> Vec<(String, u16)> {
    let mut kinds = Vec::new();
    for path in entries(directory) {
        if path.is_dir() {
            kinds.extend(declared_in(&path));
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            kinds.extend(declared(&fs::read_to_string(path).unwrap()));
        }
    }
    kinds
}

/// The kinds that a source declares. As rustfmt sets it, an implementation that is not inside of a test begins a line,
/// and ends with the next brace that does.
fn declared(source: &str) -> impl Iterator<Item = (String, u16)> {
    let items = source.split("\nimpl").skip(1);
    let implementations = items.filter_map(|item| {
        let (head, rest) = item.split_once('\n')?;
        head.contains("SavedState for ").then_some(rest)
    });
    implementations.map(|rest| {
        let (body, _) = rest.split_once("\n}").unwrap();
        let kind = between(body, "const KIND: Kind = Kind(*b\"", "\")").unwrap();
        let version = between(body, "const VERSION: u16 = ", ";");
        let version = version.map_or(1, |version| version.parse().unwrap());
        (kind.trim_end().to_owned(), version)
    })
}

fn between<'a>(text: &'a str, start: &str, end: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(start)?;
    Some(rest.split_once(end)?.0)
}

#[test]
fn kinds_are_found_where_they_are_declared() {
    let source = r#"
impl SavedState for Lamp {
    const KIND: Kind = Kind(*b"LMP ");
}

impl saved_state::SavedState for Fan {
    const KIND: Kind = Kind(*b"VFAN");
    const VERSION: u16 = 12;
}

mod tests {
    impl SavedState for Other {
        const KIND: Kind = Kind(*b"TEST");
    }
}
"#;
    let kinds: Vec<_> = declared(source).collect();
    assert_eq!(kinds, [("LMP".to_owned(), 1), ("VFAN".to_owned(), 12)]);
}
