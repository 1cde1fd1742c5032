//! Who has connected and has not shown yet that it has the key: a stranger, for all that is known.

use std::{
    collections::BTreeMap,
    io,
    net::{Shutdown, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// More are not greeted at once: each has ten seconds.
const MAX_CALLERS: usize = 256;

/// Those that are being greeted. Who is one too many takes the place of who has been there longest: who has the key shows it
/// within milliseconds, and to keep it out takes as many new strangers in that time.
#[derive(Default)]
pub(super) struct Callers(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    /// By the order in which they came.
    streams: BTreeMap<u64, TcpStream>,
    next: u64,
}

/// A caller's place. Dropped, it is free.
pub(super) struct Place {
    callers: Arc<Callers>,
    number: u64,
}

impl Callers {
    /// Gives a caller a place, and hangs up on who has had one longest if there is none left.
    ///
    /// # Errors
    ///
    /// The host has no descriptor left.
    pub(super) fn greet(self: &Arc<Self>, stream: &TcpStream) -> io::Result<Place> {
        let stream = stream.try_clone()?;
        let mut waiting = self.lock();
        if waiting.streams.len() >= MAX_CALLERS
            && let Some((_, longest)) = waiting.streams.pop_first()
        {
            // It fails when it has hung up itself. Its thread ends either way.
            let _ = longest.shutdown(Shutdown::Both);
        }
        let number = waiting.next;
        waiting.next += 1;
        waiting.streams.insert(number, stream);
        Ok(Place {
            callers: Arc::clone(self),
            number,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.callers.lock().streams.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, net::TcpListener, time::Duration};

    use super::*;

    /// The two ends of a connection.
    fn connection(listener: &TcpListener) -> (TcpStream, TcpStream) {
        let caller = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (caller, listener.accept().unwrap().0)
    }

    #[test]
    fn who_is_one_too_many_takes_the_place_of_who_has_been_there_longest() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let callers = Arc::new(Callers::default());
        let enter = || {
            let (caller, stream) = connection(&listener);
            let place = callers.greet(&stream).unwrap();
            (caller, stream, place)
        };
        let mut all: Vec<_> = (0..MAX_CALLERS).map(|_| enter()).collect();
        // One has shown that it has the key: its place is free, and nobody hangs up on it.
        let (sender, senders_stream, place) = all.remove(100);
        drop(place);
        all.push(enter());
        all.push(enter());
        // Before the others are looked at, so that an end of theirs would be there, too.
        let mut first = &all[0].0;
        let patience = Duration::from_secs(60);
        first.set_read_timeout(Some(patience)).unwrap();
        assert_eq!(first.read(&mut [0]).unwrap(), 0);
        for mut caller in all[1..].iter().map(|(caller, ..)| caller).chain([&sender]) {
            caller.set_nonblocking(true).unwrap();
            let heard = caller.read(&mut [0]).unwrap_err();
            assert_eq!(heard.kind(), io::ErrorKind::WouldBlock);
        }
        drop((senders_stream, all));
        assert!(callers.lock().streams.is_empty());
    }
}
