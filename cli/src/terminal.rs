//! The terminal that a foreground machine's console is shown on.
//!
//! The VMM is given one end of a pseudo-terminal of its own, and what passes between that and the user's
//! terminal is relayed here. So the user's terminal is restored whatever becomes of the VMM, and the
//! keys that end the machine are seen even when it hangs.

use std::{
    fs::File,
    io::{self, IsTerminal, Read, Write},
    os::fd::OwnedFd,
    thread,
};

use rustix::{
    fs::{Mode, OFlags, open},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{OptionalActions, Termios, tcgetattr, tcsetattr},
};
use tokio::sync::oneshot;

/// Ctrl-A: the next key is for fermata.
const ESCAPE: u8 = 0x01;

/// Both ends of a pseudo-terminal.
pub(crate) struct Pty {
    /// Our end.
    pub(crate) ours: File,
    /// The VMM's end, which passes every byte as it is.
    pub(crate) theirs: OwnedFd,
}

impl Pty {
    pub(crate) fn open() -> io::Result<Self> {
        // Neither may become the controlling terminal of this process.
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&ours)?;
        unlockpt(&ours)?;
        let name = ptsname(&ours, Vec::new())?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let theirs = open(name.as_c_str(), flags, Mode::empty())?;
        let mut attributes = tcgetattr(&theirs)?;
        attributes.make_raw();
        tcsetattr(&theirs, OptionalActions::Now, &attributes)?;
        Ok(Self {
            ours: ours.into(),
            theirs,
        })
    }
}

/// While it lives, the terminal on standard input hands over every key as it is pressed. Standard input
/// that is not a terminal is left alone.
pub(crate) struct RawMode(Option<Termios>);

impl RawMode {
    pub(crate) fn enter() -> io::Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self(None));
        }
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Flush, &raw)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // The terminal may be gone.
            let _ = tcsetattr(io::stdin(), OptionalActions::Flush, before);
        }
    }
}

/// Shows what the machine writes; resolves when all is shown and nobody has its end of the pseudo-terminal any more. Its thread
/// blocks on standard output, and ends with the process.
pub(crate) fn show(mut ours: File) -> oneshot::Receiver<()> {
    let (done, shown) = oneshot::channel();
    thread::spawn(move || {
        // Dropped when this ends, however it does.
        let _done = done;
        let mut buffer = [0; 4096];
        // Reading fails with EIO once the other end is closed everywhere.
        while let Ok(count @ 1..) = ours.read(&mut buffer) {
            let mut out = io::stdout().lock();
            // The machine goes on although nobody looks.
            let _ = out.write_all(&buffer[..count]).and_then(|()| out.flush());
        }
    });
    shown
}

/// Passes keys on to the machine from now on; resolves when the keys that end it are pressed. Its
/// thread blocks on standard input, and ends with the process.
pub(crate) fn type_into(mut ours: File) -> oneshot::Receiver<()> {
    let (pressed, quit) = oneshot::channel();
    thread::spawn(move || {
        let mut keys = Keys::default();
        let mut buffer = [0; 4096];
        let mut input = io::stdin().lock();
        loop {
            match input.read(&mut buffer) {
                Ok(0) | Err(_) => {
                    // No more keys, though no wish to end: `quit` must not resolve.
                    std::mem::forget(pressed);
                    return;
                }
                Ok(count) => {
                    let (passed, quit) = keys.take(&buffer[..count]);
                    if ours.write_all(&passed).is_err() || quit {
                        let _ = pressed.send(());
                        return;
                    }
                }
            }
        }
    });
    quit
}

/// Finds the keys meant for fermata among those meant for the machine: Ctrl-A x ends it, Ctrl-A Ctrl-A
/// and Ctrl-A a send it one Ctrl-A.
#[derive(Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    /// What of `typed` the machine gets, and whether it is to be ended.
    fn take(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::with_capacity(typed.len());
        for &key in typed {
            match (std::mem::take(&mut self.escaped), key) {
                (false, ESCAPE) => self.escaped = true,
                (false, key) => passed.push(key),
                (true, b'x' | b'X') => return (passed, true),
                (true, ESCAPE | b'a' | b'A') => passed.push(ESCAPE),
                (true, key) => passed.extend([ESCAPE, key]),
            }
        }
        (passed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_passed_except_those_for_fermata() {
        let mut keys = Keys::default();
        assert_eq!(
            keys.take(b"ls\r\x03\x1a"),
            (b"ls\r\x03\x1a".to_vec(), false)
        );
        assert_eq!(
            keys.take(b"1\x01\x012\x01a3\x01b"),
            (b"1\x012\x013\x01b".to_vec(), false)
        );
        assert_eq!(keys.take(b"4\x01"), (b"4".to_vec(), false));
        assert_eq!(keys.take(b"x5"), (vec![], true), "also across two reads");
    }

    #[test]
    fn the_pseudo_terminal_changes_nothing_in_either_direction() {
        let Pty { mut ours, theirs } = Pty::open().unwrap();
        let mut theirs = File::from(theirs);
        // Line ends, Ctrl-C and Ctrl-D, of which a terminal would make something else.
        let bytes = b"a\r\n\x03\x04\n";
        let mut read = [0; 6];
        ours.write_all(bytes).unwrap();
        theirs.read_exact(&mut read).unwrap();
        assert_eq!(&read, bytes);
        theirs.write_all(bytes).unwrap();
        ours.read_exact(&mut read).unwrap();
        assert_eq!(&read, bytes);
        drop(theirs);
        assert!(ours.read(&mut read).is_err(), "its end is noticed");
    }
}
