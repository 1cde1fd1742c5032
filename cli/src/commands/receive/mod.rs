//! `fermata receive`.

mod callers;

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
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
use snapshot::{Caller, Keep, Place, Received};

use callers::Callers;

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
    /// The most GiB that the disks of a machine may have together whose snapshot is received.
    #[arg(long, value_name = "GIB", default_value_t = 4096)]
    max_disks: u64,
}

/// What snapshots are received with.
struct Host {
    key: Key,
    place: Kept,
    memory_bytes: u64,
    disk_bytes: u64,
    callers: Arc<Callers>,
    /// Who has shown that it has the key.
    senders: Arc<AtomicUsize>,
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
        disk_bytes: args.max_disks.saturating_mul(1 << 30),
        callers: Arc::default(),
        senders: Arc::default(),
    });
    let listener = TcpListener::bind(args.listen);
    let listener = listener.with_context(|| format!("cannot listen on {}", args.listen))?;
    let address = listener.local_addr()?;
    output::print(&format!("fermata receives on {address} into {where_to}\n"))?;
    loop {
        match listener.accept() {
            Ok((sender, from)) => host.serve(sender, from),
            // Who hangs up before it is heard holds nobody up.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                output::say(&format!("fermata: a sender could not be heard: {error}"));
                thread::sleep(SHORTAGE);
            }
        }
    }
}

impl Host {
    /// Greets who has connected, and receives from it, in a thread of its own.
    fn serve(self: &Arc<Self>, caller: TcpStream, from: SocketAddr) {
        let place = match self.callers.greet(&caller) {
            Ok(place) => place,
            Err(error) => return unheard(from, &error),
        };
        let host = Arc::clone(self);
        let receiving = move || {
            let said = match host.receive(caller, place) {
                Ok(received) => output::print(&said(&received, from)),
                Err(error) => Err(error),
            };
            if let Err(error) = said {
                output::say(&format!("fermata: from {from}: {error:#}"));
            }
        };
        let started = thread::Builder::new().name("receive".to_owned());
        if let Err(error) = started.spawn(receiving) {
            unheard(from, &error);
        }
    }

    /// `greeting` is the caller's place among those that have not shown yet that they have the key.
    fn receive(&self, caller: TcpStream, greeting: callers::Place) -> anyhow::Result<Received> {
        let caller = Caller::greet(caller, &self.key)?;
        drop(greeting);
        let Some(_place) = Taken::new(&self.senders, MAX_SENDERS) else {
            let reason = format!("{MAX_SENDERS} snapshots are being received already; try again");
            caller.refuse(&reason);
            bail!(reason);
        };
        let keep = |place| Keep {
            place,
            memory_bytes: self.memory_bytes,
            disk_bytes: self.disk_bytes,
        };
        let location = match &self.place {
            Kept::Directory(directory) => {
                return Ok(caller.receive(&keep(Place::Directory(directory)))?);
            }
            Kept::Store(location) => location,
        };
        let store = match at(location).open() {
            Ok(store) => store,
            Err(error) => {
                caller.refuse(&error.to_string());
                return Err(error.into());
            }
        };
        let place = Place::Store {
            store: &store,
            spool: &location.directory,
        };
        Ok(caller.receive(&keep(place))?)
    }
}

/// A place among those that are heard at once.
struct Taken(Arc<AtomicUsize>);

impl Taken {
    /// One of so many, if there is one.
    fn new(taken: &Arc<AtomicUsize>, of: usize) -> Option<Self> {
        let place = Self(Arc::clone(taken));
        let before = taken.fetch_add(1, Ordering::Relaxed);
        (before < of).then_some(place)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn unheard(from: SocketAddr, error: &io::Error) {
    output::say(&format!("fermata: {from} was not heard: {error}"));
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
