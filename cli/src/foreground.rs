//! A machine whose console is on this terminal.

use std::{
    io::{self, IsTerminal},
    os::unix::process::ExitStatusExt,
    process::{ExitCode, ExitStatus},
    time::Duration,
};

use anyhow::{Context, bail};
use control::{Console, Exit, Log, Origin, Registry, spawn};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::sleep,
};

use crate::{
    machine::{self, Changes},
    output, program,
    terminal::{Pty, RawMode, show, type_into},
};

/// What the exit code of a command with a machine in the foreground means; see [`Exit`].
pub(crate) const EXIT_CODES: &str = "\
Ctrl-A x ends the machine; Ctrl-A a sends it a Ctrl-A.

Exit codes: 0 the guest powered off, 1 something failed, 10 the guest asked for a reset,
11 it had a triple fault, 12 it was saved and was not to go on, 13 it was stopped.";

/// How long what the guest wrote last may take to be shown when the machine is to end.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Runs a machine until it ends, or until the user or a signal ends it.
pub(crate) async fn run(
    registry: &Registry,
    origin: Origin,
    changes: Changes,
) -> anyhow::Result<ExitCode> {
    let program = program::find()?;
    let spec = machine::launch_spec(registry, origin, changes, Console::Terminal)?;
    let mut signals = Signals::catch()?;
    let Pty { ours, theirs } = Pty::open()?;
    if io::stdin().is_terminal() {
        output::say("Ctrl-A x ends the machine.");
    }
    // The guest may write before its VMM has said that it runs.
    let shown = show(ours.try_clone()?);
    let bound = machine::launch_bound(&spec.origin);
    let mut vmm = tokio::select! {
        // A machine that runs by now is stopped as one.
        biased;
        vmm = spawn(&program, &spec, Log::Terminal(theirs), bound) => vmm?,
        // The VMM finds that nobody waits for it, and has its machine not begin, or end.
        () = signals.any() => bail!("ended before the machine ran"),
    };
    let raw = match RawMode::enter() {
        Ok(raw) => raw,
        // In the background of its terminal, say. Nobody would see what the machine does, nor that there is one.
        Err(error) => {
            vmm.stop(&spec.secret, machine::STOP).await?;
            return Err(error).context(
                "the terminal cannot be used, and the machine was ended; start it in the foreground, or with its input from /dev/null",
            );
        }
    };
    let quit = type_into(ours);
    let ended = tokio::select! {
        status = vmm.child.wait() => Some(status?),
        _ = quit => None,
        () = signals.any() => None,
    };
    let (status, patience) = match ended {
        Some(status) => (status, Duration::MAX),
        None => (vmm.stop(&spec.secret, machine::STOP).await?, LAST_WORDS),
    };
    // What the guest wrote last is still to be shown, and ends with the VMM. Who reads it may be slow, or not read any more.
    let all_shown = tokio::select! {
        _ = shown => true,
        () = signals.any() => false,
        () = sleep(patience) => false,
    };
    drop(raw);
    let (said, exit) = conclude(status);
    if all_shown {
        output::say(&said);
    }
    Ok(exit)
}

/// The signals that would end this process and leave its terminal raw and its machine running.
struct Signals([Signal; 3]);

impl Signals {
    fn catch() -> io::Result<Self> {
        Ok(Self([
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        ]))
    }

    async fn any(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// How the machine ended, in words and as this process is to end.
fn conclude(status: ExitStatus) -> (String, ExitCode) {
    let exit = status.code().and_then(Exit::from_code);
    let said = match (exit, status.signal()) {
        (Some(Exit::PowerOff), _) => "the guest powered off".to_owned(),
        (Some(Exit::Reboot), _) => "the guest asked for a reset".to_owned(),
        (Some(Exit::TripleFault), _) => "the guest had a triple fault".to_owned(),
        (Some(Exit::Halted), _) => "the machine was saved".to_owned(),
        (Some(Exit::Stopped), _) => "the machine was stopped".to_owned(),
        (_, Some(signal)) => format!("the VMM was killed by signal {signal}"),
        (_, None) => format!("the VMM failed ({status})"),
    };
    let exit = exit.unwrap_or(Exit::Failed);
    (format!("fermata: {said}"), ExitCode::from(exit.code()))
}
