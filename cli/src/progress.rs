//! How long work is going on, on standard error: a bar on a terminal, a line now and then elsewhere.

use std::{
    io::IsTerminal,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use crate::output;

/// Nobody needs to be told of work that is done by then.
const SILENCE: Duration = Duration::from_secs(1);
/// How often a line is printed where there is no terminal.
const LINES: Duration = Duration::from_secs(10);

/// How often work is looked at.
const POLL: Duration = Duration::from_millis(100);

/// Does `work` and shows how far it is, by what it tells `progress`.
pub(crate) fn shown<T>(
    what: &'static str,
    progress: &snapshot::Progress,
    work: impl FnOnce() -> T,
) -> T {
    let (done, ended) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut shown = Progress::new(what);
            while ended.recv_timeout(POLL) == Err(RecvTimeoutError::Timeout) {
                shown.show(progress.done(), progress.total());
            }
        });
        let result = work();
        drop(done);
        result
    })
}

/// Shows the progress of one piece of work until it is dropped.
pub(crate) struct Progress {
    what: &'static str,
    /// On a terminal.
    bar: Option<ProgressBar>,
    next: Instant,
}

impl Progress {
    /// Shows how `what`, like `saving`, goes on.
    pub(crate) fn new(what: &'static str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template(
                "{msg} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
            );
            let bar = ProgressBar::no_length().with_message(what);
            match style {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        });
        Self {
            what,
            bar,
            next: Instant::now() + SILENCE,
        }
    }

    /// Tells that `done` of `total` bytes are done.
    pub(crate) fn show(&mut self, done: u64, total: u64) {
        if total == 0 || Instant::now() < self.next {
            return;
        }
        match &self.bar {
            Some(bar) => {
                bar.set_length(total);
                bar.set_position(done.min(total));
            }
            None => {
                self.next = Instant::now() + LINES;
                output::say(&line(self.what, done, total));
            }
        }
    }
}

fn line(what: &str, done: u64, total: u64) -> String {
    let percent = done.min(total) as f64 / total as f64 * 100.0;
    format!(
        "{what}: {percent:.0} %, {} of {}",
        output::bytes(done),
        output::bytes(total)
    )
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_much_is_done() {
        assert_eq!(
            line("saving", 512 << 20, 2 << 30),
            "saving: 25 %, 512 MiB of 2 GiB"
        );
    }
}
