//! `fermata fork`.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, ensure};
use api_types::CreateAnswer;
use control::{
    Console, HotImage, NetChange, Origin, Record, Registry, Spawned, VsockChange,
    fork as fork_machine, of_their_own,
};
use futures::future::join_all;
use tokio::process::Command;

use crate::{
    commands::restore,
    machine::{self, Changes},
    net, output, program,
    store::StoreArgs,
    vsock,
};

/// As many as a server has at once unless it is told otherwise.
const MAX_FORKS: i64 = 512;

/// What the environment of a hook tells of its machine.
const NUMBER: &str = "FERMATA_FORK_NUMBER";
const PID: &str = "FERMATA_FORK_PID";
const PORT: &str = "FERMATA_FORK_PORT";
const CONSOLE: &str = "FERMATA_FORK_CONSOLE";

#[derive(clap::Args)]
#[command(after_help = "\
Forks have what the machine had at one instant, and share what they do not write. Each has a generation, a MAC address and a vsock
context ID of its own, and a layer of its own of each disk that branches. An n in braces, in a name, stands for the fork's number, from 0.")]
pub(crate) struct Args {
    /// The process id or the port of a machine, which goes on; or a snapshot in the store, by its name, tag or id; or the state
    /// file and the memory file.
    #[arg(num_args = 1..=2, required = true, value_names = ["VM or NAME or STATE", "MEMORY"])]
    of: Vec<String>,
    /// How many machines there are to be.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_FORKS))]
    count: u32,
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    clock: machine::Clock,
    /// What the next network device has instead of what the machine had: `tap=NAME` or `socket=PATH`, and `mac=ADDRESS`; or
    /// `saved`. A TAP device is one machine's: it must be named.
    #[arg(long = "net", value_name = "KEY=VALUE,...", value_parser = net::change)]
    nets: Vec<NetChange>,
    /// What the vsock device has instead of a context ID that is the number of the machine's process, and of a socket named as that
    /// of the machine it is forked of with a dot and this number behind, in place of its number if that is a fork itself:
    /// `cid=NUMBER`, `path=SOCKET`, or both.
    #[arg(long, value_name = "KEY=VALUE,...", value_parser = vsock::change)]
    vsock: Option<VsockChange>,
    /// A program that is run for each fork once it runs, with its number from 0, its process id, the port of its control service
    /// and the file of its console in $FERMATA_FORK_NUMBER, _PID, _PORT and _CONSOLE.
    #[arg(long, value_name = "PROGRAM", value_parser = machine::absolute())]
    hook: Option<PathBuf>,
    /// Prints the new machines' process ids and ports as JSON.
    #[arg(long)]
    json: bool,
}

/// One of the new machines.
struct Forked {
    number: u32,
    machine: Spawned,
    console: PathBuf,
}

pub(crate) async fn fork(args: Args, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let registry = Registry::open(run_dir)?;
    let program = program::find()?;
    let vsock = args.vsock.clone().unwrap_or_default();
    of_their_own(&args.nets, &vsock, args.count)?;
    let image = match running(&args, &registry)? {
        Some(record) => {
            let (image, _) = HotImage::of_machine(&record, args.clock.chosen()).await?;
            image
        }
        None => {
            let source = restore::source(&args.of, &args.store)?;
            HotImage::of_saved(&program, registry.dir(), source, None, machine::READ_ALL).await?
        }
    };
    let consoles = (0..args.count).map(|_| registry.new_console());
    let consoles = consoles.collect::<Result<Vec<_>, _>>()?;
    let specs = (0..).zip(&consoles).map(|(number, console)| {
        let origin = Origin::Fork(image.parent().clone());
        let changes = args.changes(number);
        machine::launch_spec(&registry, origin, changes, Console::File(console.clone()))
    });
    let specs = specs.collect::<anyhow::Result<_>>()?;
    let machines = fork_machine(&program, &image, specs, machine::READ_ALL).await?;
    let forks: Vec<_> = ((0..).zip(machines).zip(consoles))
        .map(|((number, machine), console)| Forked {
            number,
            machine,
            console,
        })
        .collect();
    args.report(&forks)?;
    if let Some(hook) = args.hook {
        join_all(forks.iter().map(|fork| run_hook(&hook, fork)))
            .await
            .into_iter()
            .collect::<anyhow::Result<()>>()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The machine that is meant, if it is one that runs. A number names a snapshot only where no machine has it.
fn running(args: &Args, registry: &Registry) -> anyhow::Result<Option<Record>> {
    let [one] = &args.of[..] else {
        return Ok(None);
    };
    let Ok(number) = one.parse() else {
        return Ok(None);
    };
    let found = machine::find(number, registry);
    // A snapshot may have a number for its name.
    let is_stored = || args.store.open().is_ok_and(|store| store.show(one).is_ok());
    match found {
        Err(_) if is_stored() => Ok(None),
        found => found.map(Some),
    }
}

impl Args {
    /// What the fork of this number has that the machine had not.
    fn changes(&self, number: u32) -> Changes {
        let nets = self.nets.iter().map(|net| net.of_fork(number));
        let vsock = self.vsock.as_ref();
        Changes {
            clock: self.clock.chosen(),
            nets: nets.collect(),
            vsock: vsock.map_or_else(VsockChange::default, |vsock| vsock.of_fork(number)),
            ..Changes::default()
        }
    }

    fn report(&self, forks: &[Forked]) -> anyhow::Result<()> {
        if self.json {
            let answer = |fork: &Forked| CreateAnswer {
                pid: fork.machine.pid,
                port: fork.machine.port,
            };
            return output::print_json(&forks.iter().map(answer).collect::<Vec<_>>());
        }
        let line = |fork: &Forked| {
            format!(
                "machine {} runs, with its control service on port {} and its console in {}\n",
                fork.machine.pid,
                fork.machine.port,
                fork.console.display()
            )
        };
        output::print(&forks.iter().map(line).collect::<String>())
    }
}

/// Has the hook do for a fork what there is to do.
async fn run_hook(hook: &PathBuf, fork: &Forked) -> anyhow::Result<()> {
    let status = Command::new(hook)
        .env(NUMBER, fork.number.to_string())
        .env(PID, fork.machine.pid.to_string())
        .env(PORT, fork.machine.port.to_string())
        .env(CONSOLE, &fork.console)
        .status()
        .await
        .with_context(|| format!("the hook {} cannot be run", hook.display()))?;
    ensure!(
        status.success(),
        "the hook failed for fork {} ({status}), which runs on as machine {}",
        fork.number,
        fork.machine.pid
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use clap::Parser;
    use control::NetAttachment;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn each_fork_has_what_is_named_with_its_number() {
        let words = [
            "fork",
            "1",
            "--net",
            "tap=t{n}",
            "--net",
            "saved",
            "--vsock",
            "path=/v{n}",
        ];
        let args = Line::try_parse_from(words).unwrap().args;
        for number in [0, 12] {
            let changes = args.changes(number);
            let [tap, saved] = changes.nets.try_into().unwrap();
            assert_eq!(
                tap.attachment,
                Some(NetAttachment::Tap(format!("t{number}")))
            );
            assert_eq!(saved, NetChange::default());
            let path = changes.vsock.path.unwrap();
            assert_eq!(path, PathBuf::from(format!("/v{number}")));
        }
    }

    #[test]
    fn no_forks_are_refused() {
        assert!(Line::try_parse_from(["fork", "1", "--count", "0"]).is_err());
    }
}
