//! `fermata restore`.

use std::{path::PathBuf, process::ExitCode};

use anyhow::bail;
use api_types::CreateAnswer;
use control::{
    Console, Log, NetChange, Origin, Registry, Source, UseWorkingSet, VsockChange, spawn,
};

use crate::{
    foreground,
    machine::{self, Changes},
    net, output, program,
    store::StoreArgs,
    vsock,
};

#[derive(clap::Args)]
#[command(after_help = format!("With --foreground: {}", foreground::EXIT_CODES))]
pub(crate) struct Args {
    /// The snapshot in the store, by its name, tag or id; or the state file and the memory file.
    #[arg(num_args = 1..=2, required = true, value_names = ["NAME or STATE", "MEMORY"])]
    from: Vec<String>,
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    clock: machine::Clock,
    /// What the next network device has instead of what it was saved with: `tap=NAME` or `socket=PATH`, and
    /// `mac=ADDRESS`; or `saved`.
    #[arg(long = "net", value_name = "KEY=VALUE,...", value_parser = net::change)]
    nets: Vec<NetChange>,
    /// What the vsock device has instead of what it was saved with: `cid=NUMBER`, `path=SOCKET`, or both.
    #[arg(long, value_name = "KEY=VALUE,...", value_parser = vsock::change)]
    vsock: Option<VsockChange>,
    /// Has its memory made of huge pages that the host has reserved, whatever it was made of before.
    #[arg(long)]
    hugepages: bool,
    /// Has the machine run at once: its memory, and with `--disks` what is not here of its disks, comes from the store when it is
    /// touched, and what nobody touches by the way. The store has to stay until all is there.
    #[arg(long, conflicts_with = "hugepages")]
    on_demand: bool,
    /// What is done with the pages that the machine touches in its first second, which are kept beside the snapshot: `bring` has
    /// them come first, and recorded if they are not known; `record` has them recorded anew; `ignore` does neither.
    #[arg(
        long,
        value_name = "HOW",
        value_enum,
        default_value_t,
        requires = "on_demand"
    )]
    working_set: WorkingSet,
    /// Where disks that branch are made, as the snapshot in the store has them, that are not where they were.
    #[arg(long, value_name = "DIRECTORY", value_parser = machine::absolute())]
    disks: Option<PathBuf>,
    /// Has the machine's console on this terminal, and its exit code for one's own.
    #[arg(long)]
    foreground: bool,
    /// Prints the new machine's process id and port as JSON.
    #[arg(long, conflicts_with = "foreground")]
    json: bool,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum WorkingSet {
    #[default]
    Bring,
    Record,
    Ignore,
}

impl From<WorkingSet> for UseWorkingSet {
    fn from(how: WorkingSet) -> Self {
        match how {
            WorkingSet::Bring => Self::Bring,
            WorkingSet::Record => Self::Record,
            WorkingSet::Ignore => Self::Ignore,
        }
    }
}

pub(crate) async fn restore(args: Args, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let registry = Registry::open(run_dir)?;
    let origin = Origin::Restore(source(&args.from, &args.store)?);
    let changes = Changes {
        clock: args.clock.chosen(),
        nets: args.nets,
        vsock: args.vsock.unwrap_or_default(),
        hugepages: args.hugepages,
        on_demand: args.on_demand,
        working_set: args.working_set.into(),
        disk_directory: args.disks,
    };
    if args.foreground {
        return foreground::run(&registry, origin, changes).await;
    }
    let console = registry.new_console()?;
    let terminal = Console::File(console.clone());
    let spec = machine::launch_spec(&registry, origin, changes, terminal)?;
    let bound = machine::launch_bound(&spec.origin);
    let vmm = spawn(&program::find()?, &spec, Log::File, bound).await?;
    let (pid, port) = (vmm.pid, vmm.port);
    if args.json {
        output::print_json(&CreateAnswer { pid, port })?;
    } else {
        output::print(&format!(
            "machine {pid} runs, with its control service on port {port} and its console in {}\n",
            console.display()
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The saved machine that is meant.
pub(crate) fn source(from: &[String], store: &StoreArgs) -> anyhow::Result<Source> {
    match from {
        [name] if name.contains('/') => {
            bail!(
                "{name} is no name of a snapshot in the store; for two files, name the memory file too"
            )
        }
        [name] => Ok(Source::Stored {
            store: store.location()?,
            name: name.clone(),
        }),
        [state, memory] => {
            Ok(Source::Files {
                state: std::path::absolute(state)?,
                memory: std::path::absolute(memory)?,
                // Only a reference needs it, and only then must it be there.
                store: store.location().ok(),
            })
        }
        _ => bail!("name the snapshot, or two files"),
    }
}
