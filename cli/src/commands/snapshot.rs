//! `fermata snapshot`.

use std::{num::NonZeroU64, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, bail};
use control::{
    AfterSnapshot, Client, ClientError, Destination, MemoryCopy, Record, Registry,
    SNAPSHOT_BYTES_DONE, SNAPSHOT_BYTES_TOTAL, SnapshotReport, SnapshotRequest,
};

use tokio::signal::unix::{SignalKind, signal};

use crate::{machine, output, peer_key::PeerKeyArgs, progress::Progress, size, store::StoreArgs};

/// How often a machine is asked how far it is.
const POLL: Duration = Duration::from_millis(200);

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    vm: machine::Name,
    /// The snapshot's name in the store; or two paths: where the state file goes and where the memory file
    /// goes. Files that are there are replaced when the new ones are whole.
    #[arg(num_args = 1..=2, required = true, value_names = ["NAME or STATE", "MEMORY"])]
    to: Vec<String>,
    // With two paths, the memory file is a reference if --store is given.
    #[command(flatten)]
    store: StoreArgs,
    /// Sends the snapshot to the host on which `fermata receive` listens there, which keeps it under NAME.
    #[arg(long = "to", value_name = "HOST:PORT", conflicts_with_all = ["store", "key_file"])]
    peer: Option<String>,
    #[command(flatten)]
    peer_key: PeerKeyArgs,
    /// Ends the machine once it is saved.
    #[arg(long)]
    halt: bool,
    #[command(flatten)]
    clock: machine::Clock,
    /// How memory is saved. Without it: by copy-on-write, where the machine goes on and its memory permits it.
    #[arg(long, value_name = "WAY")]
    copy: Option<Way>,
    /// The most that is read of the machine in a second, like `100M`, so that its guest and others feel less of it. What the guest
    /// writes to before it is read takes the host's memory until the snapshot is complete.
    #[arg(long, value_name = "BYTES", value_parser = limit)]
    limit: Option<NonZeroU64>,
    /// The most milliseconds for which the guest may stand still for its memory to be read; if that would take longer, there is no
    /// snapshot, and it goes on. By pre-copy, memory is copied for as long as it takes to keep to that.
    #[arg(long, value_name = "MS")]
    max_downtime: Option<NonZeroU64>,
    /// Prints what was saved and how long it took as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Way {
    /// The guest stands still until all of it is written.
    StopAndCopy,
    /// The guest goes on at once; what it writes to is copied before it does.
    CopyOnWrite,
    /// Memory is copied while the guest runs, over and over what it wrote to meanwhile; it stands still when little is left.
    PreCopy,
}

impl Way {
    fn chosen(self) -> MemoryCopy {
        match self {
            Self::StopAndCopy => MemoryCopy::StopAndCopy,
            Self::CopyOnWrite => MemoryCopy::CopyOnWrite,
            Self::PreCopy => MemoryCopy::PreCopy,
        }
    }
}

pub(crate) async fn snapshot(args: Args, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let record = args.vm.find(&Registry::open(run_dir)?)?;
    let request = SnapshotRequest {
        to: destination(&args)?,
        then: if args.halt {
            AfterSnapshot::Halt
        } else {
            AfterSnapshot::Resume(args.clock.chosen())
        },
        copy: args.copy.map(Way::chosen),
        bytes_per_second: args.limit,
        downtime_limit_ms: args.max_downtime,
    };
    let report = control::saved(&record, request.then, save(&record, request)).await?;
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(&said(&report))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn destination(args: &Args) -> anyhow::Result<Destination> {
    let store = &args.store;
    if let Some(address) = &args.peer {
        return sent(&args.to, address, &args.peer_key);
    }
    match &args.to[..] {
        [name] if name.contains('/') => bail!(
            "{name} is no name for a snapshot in the store; for two files, name the memory file too"
        ),
        [name] => Ok(Destination::Stored {
            store: store.location_to_fill()?,
            name: name.clone(),
        }),
        [state, memory] => {
            let (state, memory) = (std::path::absolute(state)?, std::path::absolute(memory)?);
            Ok(match store.named()? {
                None => Destination::Files { state, memory },
                Some(store) => Destination::Referenced {
                    store,
                    state,
                    memory,
                },
            })
        }
        _ => bail!("name the snapshot, or two files"),
    }
}

/// With the peer at `address`.
fn sent(to: &[String], address: &str, key: &PeerKeyArgs) -> anyhow::Result<Destination> {
    let [name] = to else {
        bail!("name the snapshot that is sent; in which files it is kept says who receives it");
    };
    Ok(Destination::Peer {
        address: address.to_owned(),
        key_file: key.file()?,
        name: name.clone(),
    })
}

/// Has the machine saved, and shows how far that is.
async fn save(record: &Record, request: SnapshotRequest) -> anyhow::Result<SnapshotReport> {
    let client = machine::connect(record).await?;
    let watching = async {
        let mut progress = Progress::new("saving");
        loop {
            tokio::time::sleep(POLL).await;
            // A machine that does not answer this will not answer the request either, and that says why.
            if let Ok((done, total)) = saved_so_far(&client).await {
                progress.show(done, total);
            }
        }
    };
    tokio::select! {
        report = client.snapshot(request) => Ok(report?),
        never = watching => never,
        given_up = cancelled(&client) => given_up,
    }
}

/// Cancels the snapshot when this command is interrupted: the machine is not to go on saving what nobody waits for any more. Returns
/// when it is interrupted once more.
async fn cancelled(client: &Client) -> anyhow::Result<SnapshotReport> {
    let mut interrupts = signal(SignalKind::interrupt())?;
    interrupts.recv().await;
    let cancelling = async {
        if let Err(error) = client.cancel_snapshot().await {
            output::say(&format!("fermata: {error}"));
        }
        // The snapshot's own answer says what came of it.
        std::future::pending().await
    };
    tokio::select! {
        _ = interrupts.recv() => bail!("interrupted; the snapshot may still be taken, `fermata ps` says whether it is"),
        never = cancelling => never,
    }
}

fn limit(text: &str) -> anyhow::Result<NonZeroU64> {
    NonZeroU64::new(size::bytes(text)?).context("with a limit of 0 nothing would ever be saved")
}

async fn saved_so_far(client: &Client) -> Result<(u64, u64), ClientError> {
    let metrics = client.metrics().await?;
    let gauge = |name: &str| {
        let metric = metrics.iter().find(|metric| metric.name == name);
        metric.map_or(0, |metric| metric.value)
    };
    Ok((gauge(SNAPSHOT_BYTES_DONE), gauge(SNAPSHOT_BYTES_TOTAL)))
}

fn said(report: &SnapshotReport) -> String {
    let what = match (&report.stored, &report.sent) {
        (None, Some(sent)) => format!(
            "snapshot {} sent: {} in use of {}",
            sent.name,
            output::bytes(report.written_bytes),
            output::bytes(report.memory_bytes),
        ),
        (None, None) => format!(
            "snapshot {}: {} of {} written",
            report.id,
            output::bytes(report.written_bytes),
            output::bytes(report.memory_bytes),
        ),
        (Some(stored), _) => format!(
            "snapshot {}: {} in use of {}, {} new in the store",
            stored.name,
            output::bytes(report.written_bytes),
            output::bytes(report.memory_bytes),
            output::bytes(stored.new_bytes),
        ),
    };
    format!(
        "{what} in {:.1} ms; the guest stood still for {:.1} ms\n",
        report.total_us as f64 / 1000.0,
        report.downtime_us as f64 / 1000.0,
    )
}
