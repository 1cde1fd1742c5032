//! The receiver's end: keeps what is sent, where it was told to.

use std::{
    net::TcpStream,
    path::{Path, PathBuf},
    sync::mpsc::{RecvTimeoutError, sync_channel},
    thread,
    time::{Duration, Instant},
};

use dedup::{Key, Store};
use memory::Layout;
use peer::Stream;
use saved_state::SnapshotId;

use super::{
    line::PeerError,
    message::{Message, Why},
    reception::{Reception, Refusal, Spools},
    reserved::Reserved,
};
use crate::{Destination, Error, Files, Saving, StorePlace, begin};

/// How often the sender is told that its snapshot is worked on.
const WORKING: Duration = Duration::from_secs(2);
/// How long a sender may say nothing: it may be slow on purpose, but not that slow.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long a sender that is still speaking is heard after it was told that this is in vain.
const FAREWELL: Duration = Duration::from_secs(5);

/// Where snapshots that come are kept, and up to which size.
#[derive(Clone, Copy)]
pub struct Keep<'a> {
    /// Where.
    pub place: Place<'a>,
    /// The most memory that a machine may have, in bytes.
    pub memory_bytes: u64,
    /// The most that all its disks may have together, in bytes.
    pub disk_bytes: u64,
}

/// Where snapshots that come are kept.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    /// In a store, whole: memory, state, and disks that branch. Memory is in this host's memory until all of it has come.
    Store {
        /// The store.
        store: &'a Store,
        /// Where disks are until all has come.
        spool: &'a Path,
    },
    /// In a directory, each as the files `<name>.state` and `<name>.memory`, which memory goes to as it comes. Disks are not kept.
    Directory(&'a Path),
}

/// A snapshot that a peer keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// Its name there.
    pub name: String,
    /// Its id in the peer's store, if it is in one.
    pub id: Option<[u8; 16]>,
    /// Bytes by which that has grown.
    pub new_bytes: u64,
}

/// Somebody who has connected, and has the key.
#[derive(Debug)]
pub struct Caller(Stream);

impl Caller {
    /// Greets who has connected.
    ///
    /// # Errors
    ///
    /// It has not the key, is no fermata, or says nothing in ten seconds.
    pub fn greet(tcp: TcpStream, key: &Key) -> Result<Self, Error> {
        let greeted = Stream::accept(tcp, key.bytes());
        let mut stream = greeted.map_err(|error| Error::Sender(error.into()))?;
        stream.set_patience(PATIENCE);
        Ok(Self(stream))
    }

    /// Receives one snapshot. It is complete and durable when this returns, and the sender was told so; else there is nothing of it.
    ///
    /// # Errors
    ///
    /// The sender is lost, makes no sense, or sends what is not kept; or this host cannot keep it. The sender was told, if it could be.
    pub fn receive(mut self, keep: &Keep<'_>) -> Result<Received, Error> {
        let refusal = match converse(&mut self.0, keep) {
            Ok(received) => return Ok(received),
            Err(refusal) => refusal,
        };
        self.tell(why(&refusal), &refusal.to_string());
        Err(match refusal {
            Refusal::Here(error) => error,
            Refusal::Peer(cause) => Error::Sender(cause),
            Refusal::State(reason) => Error::Refused(reason),
        })
    }

    /// Tells it that nothing is received, and why.
    pub fn refuse(self, reason: &str) {
        self.tell(Why::Other, reason);
    }

    fn tell(self, why: Why, reason: &str) {
        let Self(mut stream) = self;
        let text = reason.replace(char::is_control, " ");
        let failed = Message::Failed { why, text: &text };
        let until = Instant::now() + FAREWELL;
        // If it does not hear that, it notices by itself.
        let _ = failed.send(&mut stream, &|| Instant::now() < until);
        stream.close(FAREWELL);
    }
}

fn converse(stream: &mut Stream, keep: &Keep<'_>) -> Result<Received, Refusal> {
    let mut buffer = Vec::new();
    let Message::Begin {
        id,
        memory_bytes,
        name,
    } = Message::receive(stream, &mut buffer, &always)?
    else {
        return Err(PeerError::Nonsense.into());
    };
    let name = name.to_owned();
    let span = tracing::info_span!("received", name, %id);
    let _entered = span.enter();
    let _reserved = reserve(keep, &name)?;
    let mut reception = begin_reception(keep, id, memory_bytes, &name)?;
    let ready = Message::Ready {
        keeps_disks: matches!(keep.place, Place::Store { .. }),
    };
    say(stream, ready)?;
    tracing::info!(memory_bytes, "a snapshot comes");
    while reception.take(&Message::receive(stream, &mut buffer, &always)?)? {}
    let made = at_work(stream, |saving| reception.make(saving))?;
    say(stream, Message::Made)?;
    let Message::Keep = Message::receive(stream, &mut buffer, &always)? else {
        return Err(PeerError::Nonsense.into());
    };
    let published = at_work(stream, |_| Ok(made.publish()?))?;
    let (id, new_bytes) = match published.in_store() {
        Some(saved) => {
            let new_bytes = saved.pack_bytes + saved.snapshot_bytes;
            (Some(*saved.id.as_bytes()), new_bytes)
        }
        None => (None, 0),
    };
    let saved = Message::Saved {
        new_bytes,
        id,
        name: &name,
    };
    // It is kept, whether the sender hears that or not.
    if let Err(error) = say(stream, saved) {
        tracing::warn!("the sender was not told that its snapshot is kept: {error}");
    }
    tracing::info!(new_bytes, "a snapshot was kept");
    Ok(Received {
        name,
        id,
        new_bytes,
    })
}

fn say(stream: &mut Stream, message: Message<'_>) -> Result<(), PeerError> {
    message.send(stream, &always)?;
    Ok(stream.flush(&always)?)
}

/// Has nobody else receive this name into a directory meanwhile: a store sees to that itself, when the snapshot is published.
fn reserve(keep: &Keep<'_>, name: &str) -> Result<Option<Reserved>, Error> {
    dedup::check_name(name).map_err(Error::store(name))?;
    match keep.place {
        Place::Store { .. } => Ok(None),
        Place::Directory(directory) => Reserved::new(directory, name).map(Some),
    }
}

fn begin_reception<'a>(
    keep: &Keep<'a>,
    id: SnapshotId,
    memory_bytes: u64,
    name: &str,
) -> Result<Reception<'a>, Refusal> {
    let possible = Layout::new(memory_bytes).map_err(|error| Error::Refused(error.to_string()))?;
    if possible.bytes() > keep.memory_bytes {
        return Err(Error::Refused(format!(
            "the machine has {} MiB of memory, and no more than {} MiB are received here; raise --max-memory",
            memory_bytes >> 20,
            keep.memory_bytes >> 20
        ))
        .into());
    }
    let (draft, spool) = match keep.place {
        Place::Store { store, spool } => {
            let place = StorePlace {
                store,
                parent: None,
            };
            let spool = Spools {
                directory: spool,
                bytes: keep.disk_bytes,
            };
            (begin(Destination::Stored { place, name }, id)?, Some(spool))
        }
        Place::Directory(directory) => {
            let (state, memory) = files(directory, name)?;
            let files = Files {
                state: &state,
                memory: &memory,
            };
            (begin(Destination::Files(files), id)?, None)
        }
    };
    Ok(Reception::begin(id, memory_bytes, draft, spool)?)
}

/// Where the files of a snapshot of this name are, of which there is none yet.
fn files(directory: &Path, name: &str) -> Result<(PathBuf, PathBuf), Error> {
    let file = |what: &str| directory.join(format!("{name}.{what}"));
    let (state, memory) = (file("state"), file("memory"));
    // Who replaces one removes it first.
    let is_there = |path: &PathBuf| path.symlink_metadata().is_ok();
    if is_there(&state) || is_there(&memory) {
        return Err(Error::NameTaken(name.to_owned()));
    }
    Ok((state, memory))
}

/// Does `work` while the sender is told that this is being done; if it is not there to be told, the work is not wanted any more.
fn at_work<T: Send>(
    stream: &mut Stream,
    work: impl FnOnce(&Saving) -> Result<T, Refusal> + Send,
) -> Result<T, Refusal> {
    let saving = Saving::default();
    let (done, is_done) = sync_channel::<()>(0);
    thread::scope(|scope| {
        let saving = &saving;
        let working = thread::Builder::new().spawn_scoped(scope, move || {
            let _done = done;
            work(saving)
        });
        let working = working.map_err(Error::Thread)?;
        while is_done.recv_timeout(WORKING) == Err(RecvTimeoutError::Timeout) {
            if !saving.is_cancelled() && say(stream, Message::Working).is_err() {
                saving.cancel();
            }
        }
        working.join().unwrap_or_else(|_| {
            let reason = "who made it panicked; please report this".to_owned();
            Err(Error::Refused(reason).into())
        })
    })
}

fn why(refusal: &Refusal) -> Why {
    use dedup::Error as Store;
    match refusal {
        Refusal::Peer(PeerError::Stream(_)) => Why::Other,
        Refusal::Peer(_) | Refusal::State(_) => Why::BadRequest,
        Refusal::Here(error) => match error {
            Error::NameTaken(_) => Why::NameTaken,
            Error::NoSpace { .. } => Why::NoSpace,
            Error::Refused(_) => Why::BadRequest,
            Error::Store { cause, .. } => match cause {
                Store::NameTaken(_) => Why::NameTaken,
                Store::NoSpace(_) => Why::NoSpace,
                Store::Name(_) => Why::BadRequest,
                _ => Why::Other,
            },
            _ => Why::Other,
        },
    }
}

fn always() -> bool {
    true
}
