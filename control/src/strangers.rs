//! Who has connected and has not shown yet that it knows the secret: any user of the host, for all that is known.

use std::collections::BTreeMap;

use futures::{
    StreamExt,
    future::{AbortHandle, Abortable, BoxFuture},
    stream::FuturesUnordered,
};
use tokio::net::TcpStream;
use tracing::debug;

use crate::{Secret, wire};

/// More are not greeted at once; each has five seconds.
pub(crate) const MAX_STRANGERS: usize = 64;

/// A greeting's number, and the connection if its client has shown the secret.
type Greeted = (u64, Option<TcpStream>);

/// Those that are being greeted. Who is one too many takes the place of who has been there longest: who knows the secret shows
/// it within milliseconds, and to keep it out takes as many new strangers in that time.
pub(crate) struct Strangers<'s> {
    secret: &'s Secret,
    greetings: FuturesUnordered<Abortable<BoxFuture<'s, Greeted>>>,
    /// By the order in which they came.
    ends: BTreeMap<u64, AbortHandle>,
    next: u64,
}

impl<'s> Strangers<'s> {
    pub(crate) fn new(secret: &'s Secret) -> Self {
        Self {
            secret,
            greetings: FuturesUnordered::new(),
            ends: BTreeMap::new(),
            next: 0,
        }
    }

    /// Gives who has connected a place, and hangs up on who has had one longest if there is none left.
    pub(crate) fn greet(&mut self, stream: TcpStream) {
        if self.ends.len() >= MAX_STRANGERS
            && let Some((_, longest)) = self.ends.pop_first()
        {
            longest.abort();
        }
        let number = self.next;
        self.next += 1;
        let (end, registration) = AbortHandle::new_pair();
        self.ends.insert(number, end);
        let greeting = greet(number, self.secret, stream);
        self.greetings
            .push(Abortable::new(Box::pin(greeting), registration));
    }

    /// The next that shows the secret. Pending where there is nobody.
    pub(crate) async fn known(&mut self) -> TcpStream {
        loop {
            match self.greetings.next().await {
                Some(Ok((number, stream))) => {
                    self.ends.remove(&number);
                    if let Some(stream) = stream {
                        return stream;
                    }
                }
                // One that was hung up on.
                Some(Err(_)) => {}
                None => std::future::pending().await,
            }
        }
    }
}

async fn greet(number: u64, secret: &Secret, mut stream: TcpStream) -> Greeted {
    // An answer is one small write: there is nothing to wait for.
    let _ = stream.set_nodelay(true);
    match wire::demand(&mut stream, secret).await {
        Ok(()) => (number, Some(stream)),
        Err(error) => {
            debug!(%error, "a control connection was refused");
            (number, None)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use futures::FutureExt;
    use tokio::{io::AsyncReadExt, net::TcpListener};

    use super::*;

    #[tokio::test]
    async fn who_is_one_too_many_takes_the_place_of_who_has_been_there_longest() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let secret = Secret::random().unwrap();
        let mut strangers = Strangers::new(&secret);
        let mut callers = Vec::new();
        for _ in 0..=MAX_STRANGERS {
            callers.push(TcpStream::connect(address).await.unwrap());
            strangers.greet(listener.accept().await.unwrap().0);
        }
        assert!(strangers.known().now_or_never().is_none());
        assert_eq!(strangers.greetings.len(), MAX_STRANGERS);
        assert_eq!(callers[0].read(&mut [0]).await.unwrap(), 0);
    }
}
