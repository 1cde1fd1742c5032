//! Into a store and out of it: `export`, `import`, `cat`.

use std::{
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use dedup::Store;
use serde::Serialize;
use snapshot::{Destination, Files, Snapshot, Source, StorePlace};

use crate::{
    output,
    progress::shown,
    store::{StoreArgs, at},
};

/// Bytes of an image that are read at a time.
const PIECE: u64 = 4 << 20;

/// What [`cat`] calls a machine's state, which is no image.
const STATE: &str = "state";

pub(super) fn export(
    store: &Store,
    name: &str,
    state: &Path,
    memory: &Path,
    json: bool,
) -> anyhow::Result<ExitCode> {
    for path in [state, memory] {
        vacant(path)?;
    }
    let saved = Snapshot::open(Source::Stored { store, name })?;
    let to = Destination::Files(Files { state, memory });
    let copied = copy(&saved, to, "exporting")?;
    if json {
        output::print_json(&copied)?;
    } else {
        output::print(&format!(
            "{name} is in {} and {}\n",
            state.display(),
            memory.display()
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Fails if there is anything at `path`: whoever names a file by mistake may name a disk.
fn vacant(path: &Path) -> anyhow::Result<()> {
    let found = path.symlink_metadata();
    anyhow::ensure!(
        found.is_err(),
        "{} exists; name others, or remove it",
        path.display()
    );
    Ok(())
}

pub(super) fn import(
    args: &StoreArgs,
    name: &str,
    state: &Path,
    memory: &Path,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let location = args.location_to_fill()?;
    let store = args.open()?;
    let files = Files { state, memory };
    let saved = Snapshot::open(Source::Files {
        files,
        store: Some(at(&location)),
    })?;
    let place = StorePlace {
        store: &store,
        parent: None,
    };
    let copied = copy(&saved, Destination::Stored { place, name }, "importing")?;
    if json {
        output::print_json(&copied)?;
    } else {
        let new = output::bytes(copied.new_bytes.unwrap_or(0));
        output::print(&format!("{name}: {new} new in the store\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What was copied.
#[derive(Serialize)]
struct Copied {
    /// The id of the machine's snapshot.
    snapshot: String,
    memory_bytes: u64,
    /// Bytes of memory that are not zero.
    written_bytes: u64,
    /// Bytes by which the store has grown, if it is there that the snapshot went.
    #[serde(skip_serializing_if = "Option::is_none")]
    new_bytes: Option<u64>,
}

/// Saves a machine again, as it is, elsewhere.
fn copy(saved: &Snapshot, to: Destination<'_>, what: &'static str) -> anyhow::Result<Copied> {
    let memory = saved.load()?;
    let saving = snapshot::Saving::default();
    let unpublished = shown(what, saving.progress(), || {
        snapshot::write(to, &saved.state, &memory, &saving)
    })?;
    let written = unpublished.written;
    let stored = unpublished.publish()?.in_store();
    Ok(Copied {
        snapshot: saved.state.header.id.to_string(),
        memory_bytes: written.memory_bytes,
        written_bytes: written.data_bytes,
        new_bytes: stored.map(|stored| stored.pack_bytes + stored.snapshot_bytes),
    })
}

pub(super) fn cat(store: &Store, name: &str, part: &str) -> anyhow::Result<ExitCode> {
    let written = match part {
        STATE => write_out(&store.manifest(name)?),
        image => {
            let image = store.image(name, image)?;
            let mut piece = Vec::new();
            (0..image.size())
                .step_by(PIECE as usize)
                .try_for_each(|at| {
                    piece.resize((image.size() - at).min(PIECE) as usize, 0);
                    image.read_at(at, &mut piece)?;
                    write_out(&piece)
                })
        }
    };
    match written {
        // A reader that has seen enough is no error.
        Err(e) if is_broken_pipe(&e) => Ok(ExitCode::SUCCESS),
        written => written.map(|()| ExitCode::SUCCESS),
    }
}

fn write_out(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    Ok(out.flush()?)
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}
