//! `fermata-vmm`: runs one machine.
//!
//! It is started by `fermata` and by the API server, never by hand: it is told what to do on its standard input,
//! a socket, and answers with one line on its standard output; see [`control::Errand`]. Its exit code says how the
//! machine ended; see [`control::Exit`].

mod log;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use control::{Exit, LOG_VARIABLE};
use rustix::stdio::{stdin, stdout};

use log::{Log, StandardError};

fn main() -> ExitCode {
    let asked = std::env::var(LOG_VARIABLE).ok();
    let log = Log::new(asked.as_deref(), StandardError);
    if tracing::subscriber::set_global_default(log).is_err() {
        // Nobody else can have set one.
        eprintln!("fermata-vmm: nothing will be said of what is done");
    }
    // As all that is said, it keeps nobody waiting.
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("without a name");
        let trace = std::backtrace::Backtrace::capture();
        vmm::terminal::say(&format!("fermata-vmm: thread {name}: {panic}\n{trace}\n"));
    }));
    let span = tracing::info_span!("vmm", pid = std::process::id());
    let _entered = span.enter();
    let (errand, with) = match control::receive(stdin()) {
        Ok(received) => received,
        Err(e) => {
            eprintln!(
                "fermata-vmm is told what to do on its standard input: {e}; use `fermata run`"
            );
            return ExitCode::from(Exit::Usage.code());
        }
    };
    let exit = vmm::run(errand, with, stdin(), stdout(), |launched| {
        // A parent that has gone away does not care.
        if let Ok(mut line) = serde_json::to_vec(launched) {
            line.push(b'\n');
            let _ = io::stdout().write_all(&line);
        }
    });
    vmm::terminal::finish();
    ExitCode::from(exit.code())
}
