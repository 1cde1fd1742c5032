//! `fermata receive`.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, bail};
use control::StoreLocation;
use dedup::Key;
use snapshot::{Keep, Place, Received};

use crate::{
    machine, output,
    peer_key::{PeerKeyArgs, read_or_make},
    store::{StoreArgs, at},
};

/// More are not received at once.
const MAX_SENDERS: usize = 64;
/// After the host had no descriptor or no memory for a sender, the next is waited for so long.
const SHORTAGE: Duration = Duration::from_millis(200);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where to listen; port 0 for a free one. Only who has the key is heard.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:7070")]
    listen: SocketAddr,
    #[command(flatten)]
    key: PeerKeyArgs,
    /// Keeps snapshots in this directory, each as the files NAME.state and NAME.memory, and no disks; else they go into a store, with
    /// disks that branch.
    #[arg(long, value_name = "DIR", value_parser = machine::absolute())]
    into: Option<PathBuf>,
    #[command(flatten)]
    store: StoreArgs,
    /// The most memory in MiB that a machine may have whose snapshot is received.
    #[arg(long, value_name = "MIB", default_value_t = 1 << 20)]
    max_memory: u64,
}

/// What snapshots are received with.
struct Host {
    key: Key,
    place: Kept,
    memory_bytes: u64,
    senders: AtomicUsize,
}

/// Where snapshots are kept.
enum Kept {
    Store(StoreLocation),
    Directory(PathBuf),
}

pub(crate) fn receive(args: &Args) -> anyhow::Result<ExitCode> {
    let place = match &args.into {
        Some(directory) if !directory.is_dir() => {
            bail!("{} is not a directory; make it first", directory.display())
        }
        Some(directory) => Kept::Directory(directory.clone()),
        None => Kept::Store(args.store.location_to_fill()?),
    };
    let where_to = match &place {
        Kept::Directory(directory) => directory.display().to_string(),
        Kept::Store(store) => {
            // What cannot be opened is said now, not to the first sender.
            at(store).open()?;
            format!("the store {}", store.directory.display())
        }
    };
    let host = Arc::new(Host {
        key: read_or_make(&args.key.file()?)?,
        place,
        memory_bytes: args.max_memory.saturating_mul(1 << 20),
        senders: AtomicUsize::new(0),
    });
    let listener = TcpListener::bind(args.listen);
    let listener = listener.with_context(|| format!("cannot listen on {}", args.listen))?;
    let address = listener.local_addr()?;
    output::print(&format!("fermata receives on {address} into {where_to}\n"))?;
    for sender in listener.incoming() {
        match sender.and_then(|sender| Ok((sender.peer_addr()?, sender))) {
            Ok((from, sender)) => host.serve(sender, from),
            Err(error) => {
                eprintln!("fermata: a sender could not be heard: {error}");
                thread::sleep(SHORTAGE);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl Host {
    /// Receives from `sender` in a thread of its own, unless there are too many.
    fn serve(self: &Arc<Self>, sender: TcpStream, from: SocketAddr) {
        let place = Taken::new(self);
        if self.senders.load(Ordering::Relaxed) > MAX_SENDERS {
            eprintln!("fermata: {from} was not heard: {MAX_SENDERS} snapshots come already");
            return;
        }
        let receiving = move || {
            let said = match place.0.receive(sender) {
                Ok(received) => output::print(&said(&received, from)),
                Err(error) => Err(error),
            };
            if let Err(error) = said {
                eprintln!("fermata: from {from}: {error:#}");
            }
        };
        let started = thread::Builder::new().name("receive".to_owned());
        if let Err(error) = started.spawn(receiving) {
            eprintln!("fermata: {from} was not heard: {error}");
        }
    }

    fn receive(&self, sender: TcpStream) -> anyhow::Result<Received> {
        let keep = |place| Keep {
            place,
            memory_bytes: self.memory_bytes,
        };
        let received = match &self.place {
            Kept::Directory(directory) => {
                snapshot::receive(sender, &self.key, &keep(Place::Directory(directory)))
            }
            Kept::Store(location) => {
                let (store, spool): (_, &Path) = (at(location).open()?, &location.directory);
                let place = Place::Store {
                    store: &store,
                    spool,
                };
                snapshot::receive(sender, &self.key, &keep(place))
            }
        };
        Ok(received?)
    }
}

/// A sender's place among those that are heard at once.
struct Taken(Arc<Host>);

impl Taken {
    fn new(host: &Arc<Host>) -> Self {
        host.senders.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(host))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.senders.fetch_sub(1, Ordering::Relaxed);
    }
}

fn said(received: &Received, from: SocketAddr) -> String {
    let Received {
        name,
        id,
        new_bytes,
    } = received;
    match id {
        None => format!("snapshot {name} is here, from {from}\n"),
        Some(_) => format!(
            "snapshot {name} is here, from {from}: {} new in the store\n",
            output::bytes(*new_bytes)
        ),
    }
}
