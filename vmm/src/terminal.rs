//! Standard error where it is the machine's terminal, to which its guest prints and its VMM speaks. Who reads there may be
//! slow, or gone for lunch: nothing of the machine waits for that.

use std::{
    fs::File,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::Duration,
};

/// What is kept of what has been written while the terminal takes none of it; the rest is lost.
const KEPT_BYTES: usize = 1 << 20;

/// How long the end of a machine waits for its terminal.
const END_BOUND: Duration = Duration::from_secs(1);

static OF_PROCESS: OnceLock<Terminal> = OnceLock::new();

/// Says a line on standard error.
pub fn say(line: &str) {
    // There is nobody left to tell if this fails.
    let _ = match OF_PROCESS.get() {
        Some(terminal) => terminal.clone().write_all(line.as_bytes()),
        None => io::stderr().write_all(line.as_bytes()),
    };
}

/// Waits until the terminal has taken what was written to it, though not for long.
pub fn finish() {
    if let Some(terminal) = OF_PROCESS.get() {
        terminal.finish();
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
            let bytes = self.take();
            let failed = file.write_all(&bytes).is_err();
            let mut queue = self.lock();
            queue.busy = false;
            queue.failed = failed;
            self.0.changed.notify_all();
            if failed {
                return;
            }
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

    fn finish(&self) {
        let unwritten = |queue: &mut Queue| !queue.failed && (queue.busy || !queue.kept.is_empty());
        // What it does not take by then is lost.
        let changed = &self.0.changed;
        drop(changed.wait_timeout_while(self.lock(), END_BOUND, unwritten));
    }
}

impl Write for Terminal {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut queue = self.lock();
        if queue.failed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let taken = bytes.len().min(KEPT_BYTES - queue.kept.len());
        if taken == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        queue.kept.extend_from_slice(&bytes[..taken]);
        self.0.changed.notify_all();
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::fd::OwnedFd, time::Instant};

    use rustix::pipe::fcntl_setpipe_size;

    use super::*;

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
        let mut read = vec![0; written.len()];
        reader.read_exact(&mut read).unwrap();
        assert!(read == written);
        // It goes on as before.
        terminal.write_all(b"there is room").unwrap();
        terminal.finish();
        let mut rest = [0; 13];
        reader.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"there is room");
    }

    #[test]
    fn a_terminal_that_never_goes_on_holds_nobody_up_for_long() {
        let (mut terminal, reader) = terminal();
        terminal.write_all(&[b'x'; 10_000]).unwrap();
        let begun = Instant::now();
        terminal.finish();
        assert!(begun.elapsed() >= END_BOUND);
        drop(reader);
    }

    #[test]
    fn a_terminal_that_is_gone_says_so() {
        let (mut terminal, reader) = terminal();
        drop(reader);
        let refused = loop {
            match terminal.write_all(b"?") {
                Ok(()) => thread::yield_now(),
                Err(error) => break error,
            }
        };
        assert_eq!(refused.kind(), io::ErrorKind::BrokenPipe);
        terminal.finish();
    }
}
