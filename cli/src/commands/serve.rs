//! `fermata serve`.

use std::{net::IpAddr, path::PathBuf, process::ExitCode};

use anyhow::bail;
use api_server::{Defaults, Peers, ServerConfig};
use control::DiskConfig;
use rocket::{error::ErrorKind, fairing::AdHoc};

use crate::{disk, machine, output, peer_key::PeerKeyArgs, program, store::StoreArgs};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The address to listen on. There is no authentication: whoever reaches it can run machines.
    #[arg(long, default_value = "127.0.0.1")]
    address: IpAddr,
    /// The port to listen on; 0 for a free one.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// The directory tree in which every path of a request must lie. Stores, keys and the run directory must not.
    #[arg(long, default_value = ".", value_parser = machine::absolute())]
    root: PathBuf,
    /// The number of vCPUs for requests that do not say.
    #[arg(long, default_value_t = Defaults::default().vcpus)]
    vcpus: u32,
    /// The memory in MiB for requests that do not say.
    #[arg(long, default_value_t = Defaults::default().memory_mib)]
    memory: u64,
    /// The initial RAM disk for requests that do not say.
    #[arg(long, value_name = "FILE", value_parser = machine::absolute())]
    initrd: Option<PathBuf>,
    /// The kernel's command line for requests that do not say.
    #[arg(long, default_value_t = Defaults::default().cmdline)]
    cmdline: String,
    /// A disk for requests that do not say, as `fermata run` takes it.
    #[arg(long = "disk", value_name = "FILE[,OPTION…]", value_parser = disk::disk)]
    disks: Vec<DiskConfig>,
    /// How many VMM processes are prepared for forks and for restores on demand, so that these need not wait for their start. They are for
    /// machines of the size that was asked for last, and take some hundred KiB each. With any, the memory of the machine in two files that was forked last is kept, too,
    /// so that the next fork of it does not read them again, and processes are prepared for just that.
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pool: usize,
    /// A host on which `fermata receive` listens, to which machines may be sent; more than one may be named.
    #[arg(long = "peer", value_name = "HOST:PORT")]
    peers: Vec<String>,
    #[command(flatten)]
    peer_key: PeerKeyArgs,
    // Memory files are then small references to it; without one they are complete in themselves.
    #[command(flatten)]
    store: StoreArgs,
}

pub(crate) async fn serve(args: Args, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let peers = match args.peers.is_empty() {
        true => None,
        false => Some(Peers {
            key_file: args.peer_key.file()?,
            addresses: args.peers,
        }),
    };
    let config = ServerConfig {
        address: args.address,
        port: args.port,
        run_dir,
        store: args.store.named()?,
        peers,
        pool: args.pool,
        defaults: Defaults {
            vcpus: args.vcpus,
            memory_mib: args.memory,
            initrd: args.initrd,
            cmdline: args.cmdline,
            disks: args.disks,
        },
        ..ServerConfig::new(args.root, program::find()?)
    };
    let root = config.root.display().to_string();
    let announce = AdHoc::on_liftoff("announce", |rocket| {
        Box::pin(async move {
            let rocket::Config { address, port, .. } = rocket.config();
            let url = std::net::SocketAddr::new(*address, *port);
            let _ = output::print(&format!("fermata serves {root} at http://{url}\n"));
        })
    });
    // SIGINT and SIGTERM end it; the machines, in process groups of their own, live on.
    let ended = api_server::rocket(config)?.attach(announce).launch().await;
    let Err(error) = ended else {
        return Ok(ExitCode::SUCCESS);
    };
    match error.kind() {
        // Who is still waiting for an answer then has been given some seconds.
        ErrorKind::Shutdown(_, None) => Ok(ExitCode::SUCCESS),
        ErrorKind::Bind(_) => bail!("{error}; is the port in use by another server?"),
        _ => bail!("cannot serve: {error}"),
    }
}
