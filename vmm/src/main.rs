//! `fermata-vmm`: runs one machine.
//!
//! It is started by `fermata` and by the API server, never by hand: it is told what to do on its standard input,
//! a socket, and answers with one line on its standard output; see [`control::Errand`]. Its exit code says how the
//! machine ended; see [`control::Exit`].

use std::{
    io::{self, Write},
    process::ExitCode,
};

use control::Exit;

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("FERMATA_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
    let span = tracing::info_span!("vmm", pid = std::process::id());
    let _entered = span.enter();
    let (errand, with) = match control::receive(io::stdin()) {
        Ok(received) => received,
        Err(e) => {
            eprintln!(
                "fermata-vmm is told what to do on its standard input: {e}; use `fermata run`"
            );
            return ExitCode::from(Exit::Usage.code());
        }
    };
    let exit = vmm::run(errand, with, io::stdin(), |launched| {
        // A parent that has gone away does not care.
        if let Ok(mut line) = serde_json::to_vec(launched) {
            line.push(b'\n');
            let _ = io::stdout().write_all(&line);
        }
    });
    ExitCode::from(exit.code())
}
