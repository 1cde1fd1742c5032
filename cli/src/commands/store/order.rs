//! A store in order: `init`, `stat`, `tag`, `rm`, `gc`, `fsck`.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, bail};
use dedup::{GcOptions, Key, Problem, Report, Store, backend::LocalDir, repair_config};
use serde_json::json;

use crate::{
    output,
    progress::shown,
    store::{StoreArgs, at, create},
};

/// The exit code of a check that found something.
pub(super) const DAMAGED: u8 = 2;

pub(super) fn init(args: &StoreArgs, level: i32, json: bool) -> anyhow::Result<ExitCode> {
    let location = args.location()?;
    if at(&location).open().is_ok() {
        bail!(
            "there is a store in {} already",
            location.directory.display()
        );
    }
    if let Some(key_file) = location.key_file.as_deref().filter(|file| !file.exists()) {
        Key::create_file(key_file)?;
        output::say(&format!(
            "made the key file {}: keep a copy elsewhere, for without it the store is lost",
            key_file.display()
        ));
    }
    create(&location, level)?;
    let directory = location.directory.display().to_string();
    let encrypted = location.key_file.is_some();
    if json {
        output::print_json(&json!({ "store": directory, "encrypted": encrypted }))?;
    } else {
        let kind = if encrypted {
            "encrypted store"
        } else {
            "store"
        };
        output::print(&format!("made the {kind} {directory}\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn stat(store: &Store, json: bool) -> anyhow::Result<ExitCode> {
    let stat = store.stat()?;
    if json {
        output::print_json(&stat)?;
        return Ok(ExitCode::SUCCESS);
    }
    let images = stat.image_bytes;
    let stored = stat.stored_bytes();
    let mut text = format!(
        "{} snapshots of {}, {} of it zeros\n{} stored: {} in {} packs, {} of snapshots, {} of index\n",
        stat.snapshots,
        output::bytes(images),
        output::bytes(stat.zero_bytes),
        output::bytes(stored),
        output::bytes(stat.pack_bytes),
        stat.packs,
        output::bytes(stat.snapshot_bytes),
        output::bytes(stat.index_bytes),
    );
    if stored > 0 && images > 0 {
        text += &format!("1 to {:.1}\n", images as f64 / stored as f64);
    }
    if stat.unreadable > 0 {
        text += &format!(
            "{} snapshots cannot be read: run `fermata store fsck`\n",
            stat.unreadable
        );
    }
    output::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn tag(
    store: &Store,
    snapshot: &str,
    tag: &str,
    json: bool,
) -> anyhow::Result<ExitCode> {
    store.tag(snapshot, tag)?;
    let entry = store.show(tag)?;
    if json {
        output::print_json(&entry)?;
    } else {
        output::print(&format!("{tag} is {}\n", entry.name))?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn rm(store: &Store, name: &str, json: bool) -> anyhow::Result<ExitCode> {
    let meant = store.show(name);
    store.rm(name)?;
    let tagged = meant.ok().map(|entry| (entry.name, entry.id.to_string()));
    let tagged = tagged.filter(|(own, id)| own != name && id != name);
    if json {
        output::print_json(&json!({ "removed": name }))?;
    } else if let Some((snapshot, _)) = tagged {
        output::print(&format!("removed the tag {name}; {snapshot} stays\n"))?;
    } else {
        output::print(&format!(
            "removed {name}; `fermata store gc` frees its space\n"
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn gc(store: &Store, grace: u64, json: bool) -> anyhow::Result<ExitCode> {
    let grace = Duration::from_secs(grace);
    let done = shown("collecting", store.progress(), || {
        store.gc(&GcOptions { grace })
    })?;
    if json {
        output::print_json(&done)?;
    } else {
        output::print(&format!(
            "freed {}: of {} packs {} removed and {} shrunk\n",
            output::bytes(done.bytes_freed),
            done.packs,
            done.packs_removed,
            done.packs_shrunk
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn fsck(args: &StoreArgs, repair: bool, json: bool) -> anyhow::Result<ExitCode> {
    let report = match checked(args, repair) {
        // A store that a check cannot even open is one with something wrong.
        Err(error) if is_damage(&error) => {
            output::say(&format!("fermata: {error:#}"));
            return Ok(ExitCode::from(DAMAGED));
        }
        checked => checked?,
    };
    if json {
        output::print_json(&report)?;
    } else {
        let mut text = format!(
            "{} packs with {} chunks, {} snapshots: {} problems\n",
            report.packs,
            report.chunks,
            report.snapshots,
            report.problems.len()
        );
        for problem in &report.problems {
            text += &told(problem);
        }
        for repaired in &report.repaired {
            text += &format!("{repaired}\n");
        }
        if report.digests_only {
            text += "only digests were checked: for the content, name the key file\n";
        }
        if !report.problems.is_empty() && !repair {
            text += "`fermata store fsck --repair` keeps what is whole\n";
        }
        output::print(&text)?;
    }
    Ok(if report.problems.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(DAMAGED)
    })
}

/// What a check, or a repair, has to report.
fn checked(args: &StoreArgs, repair: bool) -> anyhow::Result<Report> {
    // Without its config a store cannot even be opened.
    let directory = args.location()?.directory;
    let restored = if repair {
        repair_config(&LocalDir::new(&directory))
            .with_context(|| directory.display().to_string())?
    } else {
        None
    };
    let was_restored = restored.is_some();
    let report = args.open_for_order().and_then(|store| {
        let report = shown("checking", store.progress(), || {
            if repair { store.repair() } else { store.fsck() }
        })?;
        Ok(report.after_config(restored))
    });
    if report.is_err() && was_restored {
        output::say("restored the store's config from a pack");
    }
    report
}

/// Whether a store, which may have been opened in either of two ways, is damaged.
fn is_damage(error: &anyhow::Error) -> bool {
    let cause = match error.downcast_ref() {
        Some(snapshot::Error::Store { cause, .. }) => Some(cause),
        _ => error.downcast_ref::<dedup::Error>(),
    };
    cause.is_some_and(dedup::Error::is_damage)
}

fn told(problem: &Problem) -> String {
    let hit = if problem.snapshots.is_empty() {
        "hits no snapshot".to_owned()
    } else {
        format!("hits {}", problem.snapshots.join(", "))
    };
    format!("{}: {} ({hit})\n", problem.file, problem.what)
}
