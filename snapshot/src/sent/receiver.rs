//! The receiver's end: keeps what is sent, where it was told to.

use std::{
    net::TcpStream,
    path::{Path, PathBuf},
    sync::mpsc::{RecvTimeoutError, sync_channel},
    thread,
    time::Duration,
};

use dedup::{Key, Store};
use memory::Layout;
use peer::Stream;
use saved_state::SnapshotId;

use super::{
    line::PeerError,
    message::{Message, Why},
    reception::{Reception, Refusal},
};
use crate::{Destination, Error, Files, Published, StorePlace, begin};

/// How often the sender is told that its snapshot is worked on.
const WORKING: Duration = Duration::from_secs(2);
/// How long a sender that is still speaking is heard after it was told that this is in vain.
const FAREWELL: Duration = Duration::from_secs(5);

/// Where snapshots that come are kept, and up to which size.
#[derive(Clone, Copy)]
pub struct Keep<'a> {
    /// Where.
    pub place: Place<'a>,
    /// The most memory that a machine may have, in bytes.
    pub memory_bytes: u64,
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

/// Receives one snapshot from who has connected, and must have `key`. It is complete and durable when this returns, and the sender was told so; else there is nothing of it.
///
/// # Errors
///
/// The sender is lost, makes no sense, or sends what is not kept; or this host cannot keep it. The sender was told, if it could be.
pub fn receive(tcp: TcpStream, key: &Key, keep: &Keep<'_>) -> Result<Received, Error> {
    let greeted = Stream::accept(tcp, key.bytes());
    let mut stream = greeted.map_err(|error| Error::Sender(error.into()))?;
    let received = converse(&mut stream, keep);
    if let Err(refusal) = &received {
        let failed = Message::Failed {
            why: why(refusal),
            text: &refusal.to_string(),
        };
        // If it does not hear that, it notices by itself.
        let _ = failed.send(&mut stream, &always);
        stream.close(FAREWELL);
    }
    received.map_err(|refusal| match refusal {
        Refusal::Here(error) => error,
        Refusal::Peer(cause) => Error::Sender(cause),
        Refusal::State(reason) => Error::Refused(reason),
    })
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
    let mut reception = begin_reception(keep, id, memory_bytes, &name)?;
    let ready = Message::Ready {
        keeps_disks: matches!(keep.place, Place::Store { .. }),
    };
    ready.send(stream, &always)?;
    stream.flush(&always).map_err(PeerError::from)?;
    tracing::info!(memory_bytes, "a snapshot comes");
    while reception.take(&Message::receive(stream, &mut buffer, &always)?)? {}
    let published = finish(stream, reception)?;
    let received = match published {
        Published::InStore(saved) => Received {
            name,
            id: Some(*saved.id.as_bytes()),
            new_bytes: saved.pack_bytes + saved.snapshot_bytes,
        },
        _ => Received {
            name,
            id: None,
            new_bytes: 0,
        },
    };
    let saved = Message::Saved {
        new_bytes: received.new_bytes,
        id: received.id,
        name: &received.name,
    };
    // It is kept, whether the sender hears that or not.
    let told = saved
        .send(stream, &always)
        .and_then(|()| Ok(stream.flush(&always)?));
    if let Err(error) = told {
        tracing::warn!("the sender was not told that its snapshot is kept: {error}");
    }
    tracing::info!(new_bytes = received.new_bytes, "a snapshot was kept");
    Ok(received)
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
    dedup::check_name(name).map_err(Error::store(name))?;
    let file = |what: &str| directory.join(format!("{name}.{what}"));
    let (state, memory) = (file("state"), file("memory"));
    // Who replaces one removes it first.
    let is_there = |path: &PathBuf| path.symlink_metadata().is_ok();
    if is_there(&state) || is_there(&memory) {
        return Err(Error::NameTaken(name.to_owned()));
    }
    Ok((state, memory))
}

/// Makes the snapshot, while the sender is told that this is being done.
fn finish(stream: &mut Stream, reception: Reception<'_>) -> Result<Published, Refusal> {
    let (done, is_done) = sync_channel::<()>(0);
    thread::scope(|scope| {
        let making = thread::Builder::new().spawn_scoped(scope, move || {
            let _done = done;
            reception.finish()
        });
        let making = making.map_err(Error::Thread)?;
        let mut heard = true;
        while is_done.recv_timeout(WORKING) == Err(RecvTimeoutError::Timeout) {
            // It is made, whether the sender hears that or not.
            let working = Message::Working.send(stream, &always);
            heard = heard && working.is_ok() && stream.flush(&always).is_ok();
        }
        if !heard {
            tracing::warn!("the sender is lost");
        }
        making.join().unwrap_or_else(|_| {
            Err(Error::Refused("who made it panicked; please report this".to_owned()).into())
        })
    })
}

fn why(refusal: &Refusal) -> Why {
    use dedup::Error as Store;
    match refusal {
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
