//! `fermata-vmm`: runs one machine.
//!
//! It is started by `fermata` and by the API server, never by hand: it reads a launch spec in JSON from
//! its standard input and answers with one line on its standard output. Its exit code says how the
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
    let spec = match vmm::read_spec(io::stdin().lock()) {
        Ok(spec) => spec,
        Err(e) => {
            eprintln!(
                "fermata-vmm wants a launch spec on its standard input: {e}; use `fermata run`"
            );
            return ExitCode::from(Exit::Usage.code());
        }
    };
    let exit = vmm::run(spec, |launched| {
        // A parent that has gone away does not care.
        if let Ok(mut line) = serde_json::to_vec(launched) {
            line.push(b'\n');
            let _ = io::stdout().write_all(&line);
        }
    });
    ExitCode::from(exit.code())
}
