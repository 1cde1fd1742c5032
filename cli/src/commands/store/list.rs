//! What is in a store: `ls`, `log`, `diff`.

use std::{collections::HashMap, process::ExitCode};

use dedup::{Error, ImageDiff, Listing, LogEntry, Store, Unreadable};
use saved_state::Header;
use serde::Serialize;
use snapshot::WorkingSet;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::order::DAMAGED;
use crate::output;

pub(super) fn ls(store: &Store, json: bool) -> anyhow::Result<ExitCode> {
    let Listing {
        snapshots: log,
        unreadable,
    } = store.list()?;
    if json {
        output::print_json(&log)?;
        return Ok(complain(unreadable));
    }
    let chunk = u64::from(store.chunk_size());
    let rows: Vec<_> = log
        .iter()
        .map(|entry| {
            let images = &entry.facts.images;
            let new = images.iter().map(|image| image.new_chunks);
            [
                entry.name.clone(),
                short(entry),
                date(entry.facts.created_ms),
                output::bytes(total(images.iter().map(|image| image.size))),
                output::bytes(total(new).saturating_mul(chunk)),
                entry.tags.join(" "),
            ]
        })
        .collect();
    let heading = ["NAME", "ID", "CREATED", "SIZE", "NEW", "TAGS"];
    output::print(&output::table(heading, &rows))?;
    Ok(complain(unreadable))
}

/// Tells of snapshots that cannot be read, which is no reason not to show the others; gives the exit code.
fn complain(unreadable: Vec<Unreadable>) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for Unreadable { name, error } in unreadable {
        let error = anyhow::Error::from(error);
        output::say(&format!("{name} cannot be read: {error:#}"));
        code = ExitCode::from(DAMAGED);
    }
    code
}

/// A sum of what files say, which may be anything.
fn total(numbers: impl Iterator<Item = u64>) -> u64 {
    numbers.fold(0, u64::saturating_add)
}

/// A snapshot in a log, with what its state says of the machine.
#[derive(Serialize)]
struct Told {
    #[serde(flatten)]
    entry: LogEntry,
    /// Missing when the snapshot is not that of a machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    machine: Option<Machine>,
    /// Pages that the machine touches first, if they are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    working_set_pages: Option<usize>,
}

#[derive(Serialize)]
struct Machine {
    snapshot: String,
    release: String,
    vcpus: u32,
    memory_bytes: u64,
    cpu: String,
}

pub(super) fn log(store: &Store, from: Option<&str>, json: bool) -> anyhow::Result<ExitCode> {
    let Listing {
        snapshots: all,
        mut unreadable,
    } = store.list()?;
    let entries = match from {
        None => all,
        Some(from) => {
            unreadable.clear();
            lineage(store.show(from)?, all)
        }
    };
    let mut told = Vec::new();
    for entry in entries {
        let name = entry.name.clone();
        match tell(store, entry) {
            Ok(tale) => told.extend(tale),
            Err(error) => unreadable.push(Unreadable { name, error }),
        }
    }
    if json {
        output::print_json(&told)?;
    } else {
        let chunk = u64::from(store.chunk_size());
        let texts: Vec<_> = told.iter().map(|told| text(told, chunk)).collect();
        output::print(&texts.join("\n"))?;
    }
    Ok(complain(unreadable))
}

/// A snapshot, its parent, and so on, as far as they are there.
fn lineage(from: LogEntry, all: Vec<LogEntry>) -> Vec<LogEntry> {
    // An id is a digest of what holds its parent's, so that no snapshot is its own ancestor; but a file may lie, so each is taken once.
    let mut left: HashMap<_, _> = all.into_iter().map(|entry| (entry.id, entry)).collect();
    left.remove(&from.id);
    let mut parent = from.facts.parent;
    let mut line = vec![from];
    while let Some(entry) = parent.and_then(|id| left.remove(&id)) {
        parent = entry.facts.parent;
        line.push(entry);
    }
    line
}

/// `None` if it is gone since it was listed.
fn tell(store: &Store, entry: LogEntry) -> dedup::Result<Option<Told>> {
    // By its name, for which one file is opened; by its id, all would be.
    let snapshot = match store.snapshot(&entry.name) {
        Err(Error::NoSnapshot(_)) => return Ok(None),
        found => found?,
    };
    // Another has its name by now.
    if snapshot.id() != entry.id {
        return Ok(None);
    }
    let state = snapshot.manifest()?;
    // One that cannot be read is as none, and `fsck` tells of it.
    let working_set = WorkingSet::of(&snapshot).ok().flatten();
    let machine = Header::read(&state).ok().map(|header| Machine {
        snapshot: header.id.to_string(),
        release: header.release,
        vcpus: header.vcpus,
        memory_bytes: header.memory_bytes,
        cpu: header.host_cpu.brand,
    });
    Ok(Some(Told {
        entry,
        machine,
        working_set_pages: working_set.map(|set| set.pages().len()),
    }))
}

fn text(told: &Told, chunk: u64) -> String {
    let Told {
        entry,
        machine,
        working_set_pages,
    } = told;
    let facts = &entry.facts;
    let mut text = format!("snapshot {}", entry.name);
    if !entry.tags.is_empty() {
        text += &format!(" ({})", entry.tags.join(", "));
    }
    text += &format!("\n  id       {}", entry.id);
    if let Some(parent) = facts.parent {
        text += &format!("\n  parent   {parent}");
    }
    text += &format!("\n  created  {} on {}", date(facts.created_ms), facts.host);
    if let Some(machine) = machine {
        text += &format!(
            "\n  machine  {} vCPUs, {}, fermata {}",
            machine.vcpus,
            output::bytes(machine.memory_bytes),
            machine.release,
        );
        if !machine.cpu.is_empty() {
            text += &format!(", {}", machine.cpu);
        }
    }
    if let Some(pages) = working_set_pages {
        text += &format!(
            "\n  first    {pages} pages, touched in the first second of a restore on demand"
        );
    }
    for image in &facts.images {
        text += &format!(
            "\n  {:<8} {}, {} zero, {} new",
            image.name,
            output::bytes(image.size),
            output::bytes(image.zero_chunks.saturating_mul(chunk).min(image.size)),
            output::bytes(image.new_chunks.saturating_mul(chunk).min(image.size)),
        );
    }
    text + "\n"
}

pub(super) fn diff(
    store: &Store,
    old: &str,
    new: &str,
    ranges: bool,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let diffs = store.diff(old, new)?;
    if json {
        output::print_json(&diffs)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    for diff in &diffs {
        text += &difference(diff);
        if ranges {
            for range in &diff.changed {
                text += &format!("  {:#014x} {:#014x}\n", range.start, range.end);
            }
        }
    }
    output::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn difference(diff: &ImageDiff) -> String {
    let name = &diff.name;
    match (diff.old_size, diff.new_size) {
        (Some(_), Some(size)) => format!(
            "{name}: {} of {} changed\n",
            output::bytes(diff.changed_bytes()),
            output::bytes(size)
        ),
        (Some(size), None) => format!("{name}: removed, {}\n", output::bytes(size)),
        (None, size) => format!("{name}: added, {}\n", output::bytes(size.unwrap_or(0))),
    }
}

fn short(entry: &LogEntry) -> String {
    entry.id.to_string().chars().take(12).collect()
}

fn date(unix_ms: u64) -> String {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(unix_ms) * 1_000_000)
        .ok()
        .and_then(|date| date.replace_nanosecond(0).ok()?.format(&Rfc3339).ok())
        .unwrap_or_else(|| format!("{unix_ms} ms after 1970"))
}

#[cfg(test)]
mod tests {
    use dedup::{CreateOptions, OpenOptions};
    use tempfile::TempDir;

    use super::*;

    fn store(dir: &TempDir) -> Store {
        let path = dir.path().join("store");
        Store::create_dir(path, &CreateOptions::default(), OpenOptions::default()).unwrap()
    }

    fn save(store: &Store, name: &str, parent: Option<&str>) {
        store.writer(name, parent).unwrap().commit().unwrap();
    }

    fn names(entries: &[LogEntry]) -> Vec<&str> {
        entries.iter().map(|entry| &*entry.name).collect()
    }

    #[test]
    fn what_is_gone_since_it_was_listed_is_not_told() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        for name in ["gone", "another", "same"] {
            save(&store, name, None);
        }
        let listed = store.list().unwrap().snapshots;
        assert_eq!(listed.len(), 3);
        store.rm("gone").unwrap();
        store.rm("another").unwrap();
        save(&store, "another", Some("same"));
        let told = listed.into_iter().map(|entry| tell(&store, entry).unwrap());
        let told: Vec<_> = told.flatten().map(|told| told.entry).collect();
        assert_eq!(names(&told), ["same"]);
    }

    #[test]
    fn a_lineage_has_each_ancestor_once_even_if_a_file_lies() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        for (name, parent) in [("a", None), ("b", Some("a")), ("c", Some("b")), ("d", None)] {
            save(&store, name, parent);
        }
        let mut all = store.list().unwrap().snapshots;
        let from = store.show("c").unwrap();
        let line = lineage(from.clone(), all.clone());
        assert_eq!(names(&line), ["c", "b", "a"]);
        for entry in &mut all {
            entry.facts.parent = entry.facts.parent.or(Some(from.id));
        }
        let line = lineage(from, all);
        assert_eq!(names(&line), ["c", "b", "a"]);
    }
}
