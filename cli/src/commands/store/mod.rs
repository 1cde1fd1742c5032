//! `fermata store`: one function per command, in the words of git.

mod copy;
mod list;
mod order;

use std::{path::PathBuf, process::ExitCode};

use clap::Subcommand;

use crate::{machine, store::StoreArgs};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) store: StoreArgs,
    /// Prints JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes a store; with --key-file, an encrypted one. A key file that is not there is made.
    Init {
        /// How hard the store compresses: from -50, the fastest, to 19, the smallest; 0 is not at all.
        #[arg(long, default_value_t = dedup::DEFAULT_LEVEL, allow_negative_numbers = true)]
        level: i32,
    },
    /// Counts what is in the store.
    Stat,
    /// Lists the snapshots, newest first.
    Ls,
    /// Tells of a snapshot, of what it came from, and so on; of all snapshots if none is named.
    Log {
        /// The snapshot's name, tag or id.
        snapshot: Option<String>,
    },
    /// Shows how much of the memory differs between two snapshots.
    Diff {
        /// The one snapshot's name, tag or id.
        old: String,
        /// The other's.
        new: String,
        /// Lists where they differ, too.
        #[arg(long)]
        ranges: bool,
    },
    /// Gives a snapshot a further name.
    Tag {
        /// The snapshot's name, tag or id.
        snapshot: String,
        /// The new name; a tag of this name moves.
        tag: String,
    },
    /// Removes a tag, or a snapshot with its tags. `gc` frees what only it needed.
    Rm {
        /// Its name.
        name: String,
    },
    /// Frees what no snapshot needs. Machines may be saved and restored meanwhile.
    Gc {
        /// Seconds until other hosts see a new file: on NFS, more than its attribute cache's time.
        #[arg(long, default_value_t = 0)]
        grace: u64,
    },
    /// Reads and checks every byte. The exit code is 2 when something is wrong, or was before the repair.
    Fsck {
        /// Repairs what can be, and moves what cannot be read into damaged/.
        #[arg(long)]
        repair: bool,
    },
    /// Writes a snapshot into a new state file and a new memory file.
    Export {
        /// The snapshot's name, tag or id.
        snapshot: String,
        /// Where the state file goes.
        #[arg(value_parser = machine::absolute())]
        state: PathBuf,
        /// Where the memory file goes.
        #[arg(value_parser = machine::absolute())]
        memory: PathBuf,
    },
    /// Takes a state file and a memory file into the store.
    Import {
        /// The snapshot's name.
        name: String,
        /// The state file.
        #[arg(value_parser = machine::absolute())]
        state: PathBuf,
        /// The memory file.
        #[arg(value_parser = machine::absolute())]
        memory: PathBuf,
    },
    /// Writes a snapshot's memory, its state or a disk's content to standard output.
    Cat {
        /// The snapshot's name, tag or id.
        snapshot: String,
        /// What of it: `memory` is the guest's, without the hole below 4 GiB; `state` is what a state file has; `disk0` is the
        /// first of the machine's disks, if it branches, and so on.
        #[arg(default_value = snapshot::MEMORY_IMAGE)]
        part: String,
    },
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let (store, json) = (&args.store, args.json);
    match &args.command {
        Command::Init { level } => order::init(store, *level, json),
        Command::Stat => order::stat(&store.open_for_order()?, json),
        Command::Ls => list::ls(&store.open_for_order()?, json),
        Command::Log { snapshot } => list::log(&store.open()?, snapshot.as_deref(), json),
        Command::Diff { old, new, ranges } => list::diff(&store.open()?, old, new, *ranges, json),
        Command::Tag { snapshot, tag } => order::tag(&store.open_for_order()?, snapshot, tag, json),
        Command::Rm { name } => order::rm(&store.open_for_order()?, name, json),
        Command::Gc { grace } => order::gc(&store.open_for_order()?, *grace, json),
        Command::Fsck { repair } => order::fsck(store, *repair, json),
        Command::Export {
            snapshot,
            state,
            memory,
        } => copy::export(&store.open()?, snapshot, state, memory, json),
        Command::Import {
            name,
            state,
            memory,
        } => copy::import(store, name, state, memory, json),
        Command::Cat { snapshot, part } => copy::cat(&store.open()?, snapshot, part),
    }
}
