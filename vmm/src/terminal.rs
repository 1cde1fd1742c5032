//! Standard error where it is the machine's terminal, to which its guest prints and its VMM speaks. Who reads there may be
//! slow, or gone for lunch: nothing of the machine waits for that.

use std::{
    fs::File,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// What is kept of what the guest has printed while the terminal takes none of it; the rest is lost.
const KEPT_BYTES: usize = 1 << 20;
/// More is kept of what the VMM says: a guest that floods the terminal does not displace it.
const SAID_BYTES: usize = 64 << 10;

/// What is written at once: a slow reader is so known from one who does not read.
const PIECE_BYTES: usize = 4 << 10;

/// How long the end of a machine waits for a terminal that takes nothing,
const STOPPED_BOUND: Duration = Duration::from_secs(1);
/// and for one that is slow: less than who stops a machine waits for it.
const END_BOUND: Duration = Duration::from_secs(5);

static OF_PROCESS: OnceLock<Terminal> = OnceLock::new();

/// Says a line on standard error.
pub fn say(line: &str) {
    // There is nobody left to tell if this fails.
    let _ = match OF_PROCESS.get() {
        Some(terminal) => terminal.say(line.as_bytes()),
        None => io::stderr().write_all(line.as_bytes()),
    };
}

/// Waits until the terminal has taken what was written to it, though not for long.
pub fn finish() {
    if let Some(terminal) = OF_PROCESS.get() {
        terminal.finish(STOPPED_BOUND, END_BOUND);
    }
}

/// Has `file`, which is what standard error is, written to as a terminal from now on, also by [`say`].
pub(crate) fn open(file: File) -> io::Result<Terminal> {
    let terminal = Terminal::start(file)?;
    Ok(OF_PROCESS.get_or_init(|| terminal).clone())
}

/// What goes to a terminal, by a thread that waits for it.
#[derive(Clone)]
pub(crate) struct Terminal(Arc<Shared>);

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    kept: Vec<u8>,
    /// The thread writes what it has taken from here.
    busy: bool,
    /// Pieces that the terminal has taken.
    pieces: u64,
    /// The terminal is gone.
    failed: bool,
}

impl Terminal {
    fn start(file: File) -> io::Result<Self> {
        let terminal = Self(Arc::default());
        let of_thread = terminal.clone();
        thread::Builder::new()
            .name("terminal".to_owned())
            .spawn(move || of_thread.pass_on(file))?;
        Ok(terminal)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes on what comes, until the terminal is gone.
    fn pass_on(&self, mut file: File) {
        loop {
            for piece in self.take().chunks(PIECE_BYTES) {
                let failed = file.write_all(piece).is_err();
                let mut queue = self.lock();
                queue.pieces += 1;
                queue.failed = failed;
                self.0.changed.notify_all();
                if failed {
                    return;
                }
            }
            self.lock().busy = false;
            self.0.changed.notify_all();
        }
    }

    /// Waits until there is something, and takes all of it.
    fn take(&self) -> Vec<u8> {
        let nothing = |queue: &mut Queue| queue.kept.is_empty();
        let waited = self.0.changed.wait_while(self.lock(), nothing);
        let mut queue = waited.unwrap_or_else(PoisonError::into_inner);
        queue.busy = true;
        std::mem::take(&mut queue.kept)
    }

    /// Keeps bytes as far as there is room for them within `bound`; tells how many.
    fn keep(&self, bytes: &[u8], bound: usize) -> io::Result<usize> {
        let mut queue = self.lock();
        if queue.failed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let kept = bytes.len().min(bound.saturating_sub(queue.kept.len()));
        if kept == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        queue.kept.extend_from_slice(&bytes[..kept]);
        self.0.changed.notify_all();
        Ok(kept)
    }

    fn say(&self, line: &[u8]) -> io::Result<()> {
        self.keep(line, KEPT_BYTES + SAID_BYTES).map(drop)
    }

    /// Waits until all is written, for no longer than `stopped` while nothing is taken, and than `bound` in all.
    fn finish(&self, stopped: Duration, bound: Duration) {
        let end = Instant::now() + bound;
        let unwritten = |queue: &Queue| !queue.failed && (queue.busy || !queue.kept.is_empty());
        let mut queue = self.lock();
        while unwritten(&queue) && Instant::now() < end {
            let pieces = queue.pieces;
            let same = |queue: &mut Queue| queue.pieces == pieces && unwritten(queue);
            let waited = self.0.changed.wait_timeout_while(queue, stopped, same);
            let (now, waited) = waited.unwrap_or_else(PoisonError::into_inner);
            // What it does not take by then is lost.
            if waited.timed_out() {
                return;
            }
            queue = now;
        }
    }
}

impl Write for Terminal {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.keep(bytes, KEPT_BYTES)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::fd::OwnedFd};

    use rustix::pipe::fcntl_setpipe_size;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// A terminal that has room for a page, and the end where it is read.
    fn terminal() -> (Terminal, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        fcntl_setpipe_size(&writer, 4096).unwrap();
        let terminal = Terminal::start(File::from(OwnedFd::from(writer))).unwrap();
        (terminal, reader)
    }

    #[test]
    fn what_a_stopped_terminal_does_not_take_is_kept_up_to_a_bound() {
        let (mut terminal, mut reader) = terminal();
        let mut written: Vec<u8> = Vec::new();
        let refused = loop {
            let bytes = [(written.len() % 251) as u8; 30_011];
            match terminal.write(&bytes) {
                Ok(taken) => written.extend(&bytes[..taken]),
                Err(error) => break error,
            }
            // What the thread has taken, too.
            assert!(written.len() <= 2 * KEPT_BYTES);
        };
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        // What the VMM says then is not lost.
        terminal.say(b"the last word").unwrap();
        written.extend(b"the last word");
        let mut read = vec![0; written.len()];
        reader.read_exact(&mut read).unwrap();
        assert!(read == written);
        // It goes on as before.
        terminal.write_all(b"there is room").unwrap();
        terminal.finish(PATIENCE, PATIENCE);
        let mut rest = [0; 13];
        reader.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"there is room");
    }

    #[test]
    fn a_terminal_that_never_goes_on_holds_nobody_up_for_long() {
        let (mut terminal, reader) = terminal();
        terminal.write_all(&[b'x'; 10_000]).unwrap();
        let begun = Instant::now();
        terminal.finish(STOPPED_BOUND, PATIENCE);
        assert!((STOPPED_BOUND..PATIENCE).contains(&begun.elapsed()));
        drop(reader);
    }

    #[test]
    fn a_terminal_that_is_slow_gets_all_of_what_it_was_written() {
        // Whole seconds, for a thread that sleeps may wake up late.
        const STOPPED: Duration = Duration::from_secs(4);
        let (mut terminal, mut reader) = terminal();
        terminal.write_all(&[b'x'; 20_000]).unwrap();
        let reads = thread::spawn(move || {
            let mut pieces = 0;
            let mut page = [0; 4096];
            // Longer in all than one that takes nothing is waited for.
            while pieces < 20_000 {
                thread::sleep(STOPPED / 4);
                pieces += reader.read(&mut page).unwrap();
            }
        });
        terminal.finish(STOPPED, PATIENCE);
        assert!(terminal.lock().kept.is_empty() && !terminal.lock().busy);
        reads.join().unwrap();
    }

    #[test]
    fn a_terminal_that_is_gone_says_so() {
        let (mut terminal, reader) = terminal();
        drop(reader);
        terminal.write_all(b"?").unwrap();
        let refused = loop {
            match terminal.write_all(b"") {
                Ok(()) if !terminal.lock().failed => thread::yield_now(),
                _ => break terminal.write_all(b"?").unwrap_err(),
            }
        };
        assert_eq!(refused.kind(), io::ErrorKind::BrokenPipe);
        terminal.finish(PATIENCE, PATIENCE);
    }
}
