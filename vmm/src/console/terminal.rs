//! A terminal as a console: its user may stop it (`Ctrl-S`) and go home, and no part of the machine waits for that.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use rustix::event::{EventfdFlags, eventfd};

/// What is kept of what the guest writes, while the terminal does not take it.
const KEPT_BYTES: usize = 1 << 20;

/// How long the end of a machine waits for its terminal.
const END_BOUND: Duration = Duration::from_secs(1);

/// What goes to a terminal, by a thread that waits for it. Dropped, it lets that end.
pub(super) struct Terminal(Arc<Shared>);

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Added to when there is room for somebody who was told that there was none.
    room: OwnedFd,
}

#[derive(Default)]
struct Queue {
    kept: Vec<u8>,
    /// The thread writes what it has taken from here.
    busy: bool,
    /// Somebody was told that there is no room.
    wanted: bool,
    /// Nothing more comes.
    ended: bool,
    /// The terminal is gone.
    failed: bool,
}

impl Terminal {
    /// Starts the thread that writes to `file`.
    pub(super) fn start(file: File) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            changed: Condvar::new(),
            room: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        let of_thread = Arc::clone(&shared);
        thread::Builder::new()
            .name("console".to_owned())
            .spawn(move || of_thread.pass_on(file))?;
        Ok(Self(shared))
    }

    /// An eventfd that is added to when there is room again, after a write that failed with `WouldBlock`.
    pub(super) fn room(&self) -> io::Result<OwnedFd> {
        self.0.room.as_fd().try_clone_to_owned()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes on what comes, until nothing more does.
    fn pass_on(&self, mut file: File) {
        while let Some(bytes) = self.next() {
            let result = file.write_all(&bytes);
            let mut queue = self.lock();
            queue.busy = false;
            if let Err(error) = result {
                tracing::debug!(%error, "the terminal takes no output");
                queue.failed = true;
                return self.changed.notify_all();
            }
            self.changed.notify_all();
        }
    }

    /// Waits for what is kept, and takes it; `None` once that is all.
    fn next(&self) -> Option<Vec<u8>> {
        let idle = |queue: &mut Queue| queue.kept.is_empty() && !queue.ended;
        let mut queue = self
            .changed
            .wait_while(self.lock(), idle)
            .unwrap_or_else(PoisonError::into_inner);
        let bytes = std::mem::take(&mut queue.kept);
        queue.busy = !bytes.is_empty();
        if std::mem::take(&mut queue.wanted) {
            // It fails only when its count is at the limit, and then it is readable anyway.
            let _ = rustix::io::write(&self.room, &1u64.to_ne_bytes());
        }
        queue.busy.then_some(bytes)
    }
}

impl Write for Terminal {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut queue = self.0.lock();
        if queue.failed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let taken = bytes.len().min(KEPT_BYTES - queue.kept.len());
        if taken == 0 && !bytes.is_empty() {
            queue.wanted = true;
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

impl Drop for Terminal {
    /// Waits until all is written, though not for long: a terminal that was stopped may never go on.
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.ended = true;
        self.0.changed.notify_all();
        let unwritten = |queue: &mut Queue| !queue.failed && (queue.busy || !queue.kept.is_empty());
        let waited = self
            .0
            .changed
            .wait_timeout_while(queue, END_BOUND, unwritten);
        if waited.is_ok_and(|(_, waited)| waited.timed_out()) {
            tracing::warn!("the terminal does not take the last of what the guest has written");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rustix::{io::Errno, pipe::fcntl_setpipe_size};

    use super::*;

    /// A terminal that takes a page, and the end where it is read.
    fn terminal() -> (Terminal, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        fcntl_setpipe_size(&writer, 4096).unwrap();
        let terminal = Terminal::start(File::from(OwnedFd::from(writer))).unwrap();
        (terminal, reader)
    }

    fn told(room: &OwnedFd) -> bool {
        match rustix::io::read(room, &mut [0; 8]) {
            Err(Errno::AGAIN) => false,
            other => other.unwrap() == 8,
        }
    }

    #[test]
    fn who_writes_to_a_stopped_terminal_is_told_when_there_is_room_and_nothing_is_lost() {
        let (mut terminal, mut reader) = terminal();
        let room = terminal.room().unwrap();
        let mut written = Vec::new();
        let mut blocked = 0;
        // The thread may take what is kept once, and a page of that goes into the pipe.
        while blocked < 2 {
            let bytes = vec![written.len() as u8; 30_011];
            match terminal.write(&bytes) {
                Ok(taken) => written.extend_from_slice(&bytes[..taken]),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    blocked += usize::from(!told(&room));
                    thread::sleep(Duration::from_millis(1));
                }
            }
            assert!(written.len() <= 2 * KEPT_BYTES);
        }
        let expected = written.len();
        let reads = thread::spawn(move || {
            let mut read = vec![0; expected];
            reader.read_exact(&mut read).unwrap();
            (read, reader)
        });
        while !told(&room) {
            thread::yield_now();
        }
        assert_eq!(terminal.write(b"there is room").unwrap(), 13);
        let (read, mut reader) = reads.join().unwrap();
        assert!(read == written);
        drop(terminal);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "there is room");
    }

    #[test]
    fn a_terminal_that_never_goes_on_holds_nobody_up_for_long() {
        let (mut terminal, reader) = terminal();
        terminal.write_all(&[b'x'; 10_000]).unwrap();
        let begun = std::time::Instant::now();
        drop(terminal);
        assert!(begun.elapsed() >= END_BOUND);
        drop(reader);
    }

    #[test]
    fn a_terminal_that_is_gone_says_so() {
        let (mut terminal, reader) = terminal();
        drop(reader);
        while terminal.write(b"?").is_ok() {
            thread::yield_now();
        }
        let error = terminal.write(b"?").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
