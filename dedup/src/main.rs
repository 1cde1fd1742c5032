//! `dedup`: a store of files on the command line.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use dedup::backend::LocalDir;
use dedup::{
    CreateOptions, DEFAULT_CHUNK_SIZE, DEFAULT_LEVEL, FILE_IMAGE, GcOptions, ImageDiff, Key,
    OpenOptions, Report, Saved, Store,
};
use serde::Serialize;

/// Keeps files in a store in which nothing is stored twice.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    /// The store's directory.
    #[arg(
        long,
        short,
        env = "DEDUP_STORE",
        global = true,
        default_value = "dedup-store"
    )]
    store: PathBuf,
    /// The key file of an encrypted store: 64 hexadecimal digits, or 32 bytes, which only its owner may read.
    #[arg(long, env = "DEDUP_KEY_FILE", global = true)]
    key_file: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Create a store; with --key-file, an encrypted one. A key file that is not there is made.
    Init {
        /// Bytes in a chunk.
        #[arg(long, default_value_t = DEFAULT_CHUNK_SIZE)]
        chunk_size: u32,
        /// How hard to compress: from -50, the fastest, to 19, the smallest; 0 is not to.
        #[arg(long, default_value_t = DEFAULT_LEVEL, allow_negative_numbers = true)]
        level: i32,
    },
    /// Save a file, or several, as a snapshot.
    Save {
        /// The snapshot's name.
        name: String,
        /// The file, or a block device. Of several, each is kept by the last part of its path.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Load a snapshot.
    Load {
        /// The snapshot: its name, tag or id.
        snapshot: String,
        /// The file, which is replaced; of a snapshot of several, a directory for them.
        path: PathBuf,
    },
    /// List the snapshots, newest first.
    Ls,
    /// Give a snapshot a further name.
    Tag {
        /// The snapshot: its name, tag or id.
        snapshot: String,
        /// The new name; a tag of this name moves.
        tag: String,
    },
    /// Show where two snapshots differ.
    Diff {
        /// The first: its name, tag or id.
        old: String,
        /// The second.
        new: String,
    },
    /// Remove a snapshot with its tags, or a tag.
    Rm {
        /// Its name.
        name: String,
    },
    /// Count what is in the store.
    Stat,
    /// Free what no snapshot refers to; without the key of an encrypted store, only whole packs.
    Gc {
        /// Seconds until other hosts see a new file: on NFS, more than its attribute cache's time.
        #[arg(long, default_value_t = 0)]
        grace: u64,
    },
    /// Check every byte; without the key of an encrypted store, only digests. Exit code 2 when something is wrong, or was
    /// before the repair.
    Fsck {
        /// Repair what can be, and move what cannot be read into damaged/.
        #[arg(long)]
        repair: bool,
    },
}

/// The exit code of a check that found something.
const DAMAGED: u8 = 2;

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("dedup: {}", printable(&format!("{error:#}")));
            // A store that a check cannot even open is one with something wrong.
            let is_damage = |cause: &dedup::Error| cause.is_damage();
            match args.command {
                Command::Fsck { .. } if error.downcast_ref().is_some_and(is_damage) => {
                    ExitCode::from(DAMAGED)
                }
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(args: &Args) -> Result<ExitCode> {
    let options = OpenOptions {
        key: read_key(args)?,
        ..OpenOptions::default()
    };
    let open = || {
        let opened = if options.key.is_none() && args.command.can_do_without_key() {
            Store::open_dir_without_key(&args.store, options.clone())
        } else {
            Store::open_dir(&args.store, options.clone())
        };
        opened.with_context(|| args.store.display().to_string())
    };
    let say = |value: &dyn ErasedJson, plain: String| {
        let text = if args.json {
            value.json()
        } else {
            printable(&plain)
        };
        match writeln!(std::io::stdout(), "{text}") {
            // A reader that has seen enough, like `head`.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            printed => printed.context("cannot print"),
        }
    };
    match &args.command {
        Command::Init { chunk_size, level } => {
            let create = CreateOptions {
                chunk_size: *chunk_size,
                level: *level,
                key: options.key.clone(),
            };
            let store = Store::create_dir(&args.store, &create, options.clone())?;
            say(&store.stat()?, format!("created {}", args.store.display()))?;
        }
        Command::Save { name, files } => {
            let saved = match files.as_slice() {
                [file] => open()?.save_file(name, file)?,
                files => save_files(&open()?, name, files)?,
            };
            let stored = saved.pack_bytes + saved.snapshot_bytes;
            let size: u64 = saved.images.iter().map(|image| image.size).sum();
            say(
                &saved,
                format!(
                    "saved {name}: {} in {}, id {}",
                    bytes(size),
                    bytes(stored),
                    saved.id
                ),
            )?;
        }
        Command::Load { snapshot, path } => {
            let store = open()?;
            load(&store, snapshot, path)?;
            say(
                &store.show(snapshot)?,
                format!("loaded {snapshot} into {}", path.display()),
            )?;
        }
        Command::Ls => {
            let listing = open()?.list()?;
            let lines: Vec<String> = listing.snapshots.iter().map(line).collect();
            say(&listing.snapshots, lines.join("\n"))?;
            if listing.unreadable.is_empty() {
                return Ok(ExitCode::SUCCESS);
            }
            for unreadable in listing.unreadable {
                let why = anyhow::Error::from(unreadable.error);
                let why = format!("{} cannot be read: {why:#}", unreadable.name);
                eprintln!("{}", printable(&why));
            }
            return Ok(ExitCode::from(DAMAGED));
        }
        Command::Tag { snapshot, tag } => {
            let store = open()?;
            store.tag(snapshot, tag)?;
            say(
                &store.show(tag)?,
                format!("{tag} is {}", store.show(tag)?.name),
            )?;
        }
        Command::Diff { old, new } => {
            let diff = open()?.diff(old, new)?;
            let lines: Vec<String> = diff.iter().map(difference).collect();
            say(&diff, lines.join("\n"))?;
        }
        Command::Rm { name } => {
            open()?.rm(name)?;
            say(&name, format!("removed {name}"))?;
        }
        Command::Stat => {
            let stat = open()?.stat()?;
            let plain = format!(
                "{} snapshots of {} ({} zeros)\n{} stored: {} in {} packs, {} of snapshots, {} of index",
                stat.snapshots,
                bytes(stat.image_bytes),
                bytes(stat.zero_bytes),
                bytes(stat.stored_bytes()),
                bytes(stat.pack_bytes),
                stat.packs,
                bytes(stat.snapshot_bytes),
                bytes(stat.index_bytes),
            );
            say(&stat, plain)?;
        }
        Command::Gc { grace } => {
            let done = open()?.gc(&GcOptions {
                grace: Duration::from_secs(*grace),
            })?;
            let plain = format!(
                "freed {}: {} of {} packs removed, {} shrunk",
                bytes(done.bytes_freed),
                done.packs_removed,
                done.packs,
                done.packs_shrunk
            );
            say(&done, plain)?;
        }
        Command::Fsck { repair } => {
            let restored = if *repair {
                dedup::repair_config(&LocalDir::new(&args.store))?
            } else {
                None
            };
            let was_restored = restored.is_some();
            let report = open().and_then(|store| {
                let report = if *repair {
                    store.repair()?
                } else {
                    store.fsck()?
                };
                Ok(report.after_config(restored))
            });
            if report.is_err() && was_restored {
                eprintln!("restored the store's config from a pack");
            }
            let report = report?;
            say(&report, told(&report))?;
            if !report.problems.is_empty() {
                return Ok(ExitCode::from(DAMAGED));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What a check found, and what a repair did.
fn told(report: &Report) -> String {
    let mut lines = vec![format!(
        "{} packs with {} chunks, {} snapshots: {} problems",
        report.packs,
        report.chunks,
        report.snapshots,
        report.problems.len()
    )];
    if report.digests_only {
        lines.push("only digests were checked: for the content, give the key file".into());
    }
    for problem in &report.problems {
        let hit = if problem.snapshots.is_empty() {
            "none".into()
        } else {
            problem.snapshots.join(" ")
        };
        lines.push(format!(
            "{}: {} (snapshots hit: {hit})",
            problem.file, problem.what
        ));
    }
    lines.extend(report.repaired.iter().cloned());
    lines.join("\n")
}

/// What differs in an image.
fn difference(diff: &ImageDiff) -> String {
    let name = &diff.name;
    match (diff.old_size, diff.new_size) {
        (Some(_), Some(size)) => format!(
            "{name}: {} of {} changed",
            bytes(diff.changed_bytes()),
            bytes(size)
        ),
        (Some(size), None) => format!("{name}: removed, {}", bytes(size)),
        (None, size) => format!("{name}: added, {}", bytes(size.unwrap_or(0))),
    }
}

/// Anything that can be printed as JSON.
trait ErasedJson {
    fn json(&self) -> String;
}

impl<T: Serialize> ErasedJson for T {
    fn json(&self) -> String {
        // Maps of names and numbers always have a JSON form.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }
}

impl Command {
    /// Whether it does something useful for an encrypted store whose key is not at hand.
    fn can_do_without_key(&self) -> bool {
        match self {
            Command::Ls
            | Command::Tag { .. }
            | Command::Rm { .. }
            | Command::Stat
            | Command::Gc { .. } => true,
            Command::Fsck { repair } => !repair,
            Command::Init { .. }
            | Command::Save { .. }
            | Command::Load { .. }
            | Command::Diff { .. } => false,
        }
    }
}

/// The key in the key file, if there is one; `init` makes it.
fn read_key(args: &Args) -> Result<Option<Key>> {
    let Some(path) = &args.key_file else {
        return Ok(None);
    };
    if matches!(args.command, Command::Init { .. }) && !path.try_exists()? {
        let key = Key::create_file(path)?;
        let path = path.display();
        eprintln!("made the key file {path}: keep a copy elsewhere, the store is lost without it");
        return Ok(Some(key));
    }
    Ok(Some(Key::read_file(path)?))
}

fn line(entry: &dedup::LogEntry) -> String {
    let size: u64 = entry.facts.images.iter().map(|image| image.size).sum();
    let tags = if entry.tags.is_empty() {
        String::new()
    } else {
        format!(" ({})", entry.tags.join(", "))
    };
    let id = entry.id.to_string();
    format!("{}  {:>10}  {}{tags}", &id[..12], bytes(size), entry.name)
}

/// Text with what would steer a terminal shown, but for the ends of lines: names of files may have anything in them.
fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() && character != '\n' {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

/// A number of bytes for people.
fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (bytes.max(1).ilog2() / 10).min(UNITS.len() as u32 - 1);
    if unit == 0 {
        return format!("{bytes} B");
    }
    format!(
        "{:.1} {}",
        bytes as f64 / f64::from(1u32 << 10).powi(unit as i32),
        UNITS[unit as usize]
    )
}

/// Saves files, each as an image that is called as it is.
fn save_files(store: &Store, name: &str, files: &[PathBuf]) -> Result<Saved> {
    let named: Option<Vec<(&str, &Path)>> = files
        .iter()
        .map(|file| Some((file.file_name()?.to_str()?, file.as_path())))
        .collect();
    let named =
        named.context("a file has no name, or one that is not UTF-8: copy it to another")?;
    let mut writer = store.writer(name, None)?;
    writer.images_from_files(&named)?;
    Ok(writer.commit()?)
}

/// Loads the file of a snapshot, or all of them into a directory.
fn load(store: &Store, snapshot: &str, path: &Path) -> Result<()> {
    let snapshot = store.snapshot(snapshot)?;
    if snapshot.images().eq([FILE_IMAGE]) {
        return Ok(snapshot.image(FILE_IMAGE)?.load_file(path)?);
    }
    std::fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
    for image in snapshot.images() {
        snapshot.image(image)?.load_file(&path.join(image))?;
    }
    Ok(())
}
