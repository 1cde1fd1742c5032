//! The sender's end: who speaks, and hears only why that is in vain, until all is said.

use std::{
    io,
    time::{Duration, Instant},
};

use peer::Stream;

use super::message::{Message, Why};

/// A receiver is at work all the time and says so; one that has not moved for so long is of no use.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often the peer is told something at least. It gives up who says nothing for ten times as long.
const SPOKEN: Duration = Duration::from_secs(60);

/// Who has hung up has said why before, or does not say it any more.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Why a snapshot is not with the peer.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// It cannot be spoken to.
    #[error(transparent)]
    Stream(#[from] peer::Error),
    /// It does not keep it.
    #[error("does not keep the snapshot: {text}")]
    Refused {
        /// Why.
        why: Why,
        /// Why, in a sentence.
        text: String,
    },
    /// It was told to keep what it has made, and does not say that it has.
    #[error(
        "does not say whether it has kept the snapshot, which is whole there if it is there; look there"
    )]
    Undecided,
    /// It says what makes no sense.
    #[error("said what makes no sense here; use one release on both hosts")]
    Nonsense,
}

impl From<PeerError> for io::Error {
    fn from(error: PeerError) -> Self {
        Self::other(error)
    }
}

/// Who is spoken to.
#[derive(Debug)]
pub(crate) struct Line {
    stream: Stream,
    heard: Vec<u8>,
    /// When what was said last went out for certain.
    flushed: Instant,
}

impl Line {
    pub(crate) fn new(mut stream: Stream) -> Self {
        stream.set_patience(PATIENCE);
        Self {
            stream,
            heard: Vec::new(),
            flushed: Instant::now(),
        }
    }

    /// Whether it is time to say something, though it be of no news.
    pub(crate) fn is_quiet(&self) -> bool {
        self.flushed.elapsed() > SPOKEN
    }

    /// Says `message`. It goes out with what is said next, or when the peer is waited for.
    pub(crate) fn say(
        &mut self,
        message: Message<'_>,
        wanted: &dyn Fn() -> bool,
    ) -> Result<(), PeerError> {
        // Until all is said, who hears of anything hears that it is in vain.
        let said = match self.stream.has_come()? {
            true => Err(peer::Error::Closed.into()),
            false => message.send(&mut self.stream, wanted),
        };
        let said = said.and_then(|()| match self.is_quiet() {
            true => self.flush(wanted),
            false => Ok(()),
        });
        said.map_err(|error| self.reason(error))
    }

    /// Waits for what the peer says next.
    pub(crate) fn hear(&mut self, wanted: &dyn Fn() -> bool) -> Result<Message<'_>, PeerError> {
        if let Err(error) = self.flush(wanted) {
            return Err(self.reason(error));
        }
        match Message::receive(&mut self.stream, &mut self.heard, wanted)? {
            Message::Failed { why, text } => Err(refused(why, text)),
            message => Ok(message),
        }
    }

    fn flush(&mut self, wanted: &dyn Fn() -> bool) -> Result<(), PeerError> {
        self.stream.flush(wanted)?;
        self.flushed = Instant::now();
        Ok(())
    }

    /// Why the peer is not spoken to any more: what it said before it hung up, if it did.
    fn reason(&mut self, error: PeerError) -> PeerError {
        if !matches!(error, PeerError::Stream(peer::Error::Closed)) {
            return error;
        }
        let until = Instant::now() + LAST_WORDS;
        let wanted = || Instant::now() < until;
        match Message::receive(&mut self.stream, &mut self.heard, &wanted) {
            Ok(Message::Failed { why, text }) => refused(why, text),
            _ => error,
        }
    }
}

fn refused(why: Why, text: &str) -> PeerError {
    PeerError::Refused {
        why,
        text: text.to_owned(),
    }
}
