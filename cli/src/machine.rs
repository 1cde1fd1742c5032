//! Machines as the command line names them, and how it starts them.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, bail};
use clap::builder::{PathBufValueParser, TypedValueParser};
use control::{
    Client, Console, GuestClock, LaunchSpec, NetChange, Origin, Parent, Record, Registry, Secret,
    Source, UseWorkingSet, VsockChange,
};

/// How long a VMM may take until its machine runs: a kernel boots in seconds, but a restore reads all memory.
pub(crate) fn launch_bound(origin: &Origin) -> Duration {
    match origin {
        Origin::Boot(_) => Duration::from_secs(120),
        Origin::Restore(_) | Origin::Fork(_) => READ_ALL,
    }
}

/// How long it may take to read all of a machine's memory, from a slow disk.
pub(crate) const READ_ALL: Duration = Duration::from_secs(6 * 3600);

/// How long a VMM may take to stop before it is killed.
pub(crate) const STOP: Duration = Duration::from_secs(10);

/// Names a machine.
#[derive(Clone, Copy, clap::Args)]
pub(crate) struct Name {
    /// The process id or the port of the machine, as `fermata ps` lists them.
    #[arg(value_name = "VM", value_parser = number)]
    number: u32,
}

impl Name {
    /// The machine of that name.
    pub(crate) fn find(self, registry: &Registry) -> anyhow::Result<Record> {
        find(self.number, registry)
    }
}

fn number(text: &str) -> anyhow::Result<u32> {
    text.parse()
        .context("a machine is named by its process id or its port, as `fermata ps` lists them")
}

/// The machine with process id or port `number`. A process id counts before a port.
pub(crate) fn find(number: u32, registry: &Registry) -> anyhow::Result<Record> {
    if let Some(record) = registry.find_pid(number)? {
        return Ok(record);
    }
    if let Ok(port) = u16::try_from(number)
        && let Some(record) = registry.find_port(port)?
    {
        return Ok(record);
    }
    bail!("no machine has process id or port {number}; `fermata ps` lists those that run")
}

/// What the guest's clocks have done while it stood still.
#[derive(Clone, Copy, clap::Args)]
pub(crate) struct Clock {
    /// What the guest's clocks have done meanwhile.
    #[arg(long, value_enum, default_value_t = ClockWord::StandStill, hide_default_value = true)]
    clock: ClockWord,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum ClockWord {
    /// They stood still: the guest sees no time pass [default].
    StandStill,
    /// They followed the host's: the guest sees the time pass all at once.
    Follow,
}

impl Clock {
    pub(crate) fn chosen(self) -> GuestClock {
        match self.clock {
            ClockWord::StandStill => GuestClock::StandStill,
            ClockWord::Follow => GuestClock::Follow,
        }
    }
}

/// Speaks to a machine.
pub(crate) async fn connect(record: &Record) -> anyhow::Result<Client> {
    Ok(Client::connect(record.port, &record.secret).await?)
}

/// What a restored machine has otherwise than it was saved with.
#[derive(Default)]
pub(crate) struct Changes {
    /// What its clocks have done meanwhile.
    pub(crate) clock: GuestClock,
    /// Its network devices, in their order.
    pub(crate) nets: Vec<NetChange>,
    pub(crate) vsock: VsockChange,
    /// Whether its memory is made of huge pages that the host has reserved: it may have been of others.
    pub(crate) hugepages: bool,
    /// Whether its memory comes when it is touched.
    pub(crate) on_demand: bool,
    /// What is done with its working set, then.
    pub(crate) working_set: UseWorkingSet,
    /// Where disks are made that are not here.
    pub(crate) disk_directory: Option<PathBuf>,
}

/// What a VMM is told that is started from here.
pub(crate) fn launch_spec(
    registry: &Registry,
    origin: Origin,
    changes: Changes,
    console: Console,
) -> anyhow::Result<LaunchSpec> {
    Ok(LaunchSpec {
        secret: Secret::random()?,
        origin,
        console,
        registry: registry.dir().to_owned(),
        hugepages: changes.hugepages,
        on_demand: changes.on_demand,
        working_set: changes.working_set,
        paused: false,
        clock: changes.clock,
        confinement: None,
        net_changes: changes.nets,
        vsock_change: changes.vsock,
        disk_directory: changes.disk_directory,
    })
}

/// Parses a path and makes it absolute, for the VMM works elsewhere.
pub(crate) fn absolute() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(std::path::absolute)
}

/// Where a machine came from, in short.
pub(crate) fn origin(origin: &Origin) -> String {
    let name = |source: &Source| match source {
        Source::Files { state, .. } => state.display().to_string(),
        Source::Stored { name, .. } => name.clone(),
    };
    match origin {
        Origin::Boot(machine) => machine.kernel.display().to_string(),
        Origin::Restore(source) => format!("restored from {}", name(source)),
        Origin::Fork(Parent::Machine { pid }) => format!("forked from {pid}"),
        Origin::Fork(Parent::Saved(source)) => format!("forked from {}", name(source)),
    }
}
