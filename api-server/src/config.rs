//! What an operator decides.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    time::Duration,
};

use control::{DiskConfig, Registry, StoreLocation};

/// How to serve.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// The address to listen on; loopback unless asked otherwise, for there is no authentication.
    pub address: IpAddr,
    /// The port to listen on; 0 for a free one.
    pub port: u16,
    /// The directory tree in which every path of a request must lie.
    pub root: PathBuf,
    /// The VMM program.
    pub vmm_binary: PathBuf,
    /// The directory of [`Registry`].
    pub run_dir: PathBuf,
    /// Where the memory of snapshots goes, so that memory files are small references to it, and where
    /// such references lead. Without a store, memory files are complete in themselves.
    pub store: Option<StoreLocation>,
    /// Where machines may be saved besides.
    pub peers: Option<Peers>,
    /// How many VMM processes are prepared for forks and for restores on demand. With any, the hot image of the saved machine that was forked last is kept, too.
    pub pool: usize,
    /// What a machine gets when the request does not say.
    pub defaults: Defaults,
    /// What a request may ask for.
    pub limits: Limits,
}

impl ServerConfig {
    /// Serves the tree `root` with the VMM program `vmm_binary` on a free loopback port.
    pub fn new(root: impl Into<PathBuf>, vmm_binary: impl Into<PathBuf>) -> Self {
        Self {
            address: Ipv4Addr::LOCALHOST.into(),
            port: 0,
            root: root.into(),
            vmm_binary: vmm_binary.into(),
            run_dir: Registry::default_dir(),
            store: None,
            peers: None,
            pool: 0,
            defaults: Defaults::default(),
            limits: Limits::default(),
        }
    }
}

/// Other hosts, on which `fermata receive` listens.
#[derive(Clone, Debug)]
pub struct Peers {
    /// The file with the key that all of them have; absolute.
    pub key_file: PathBuf,
    /// Where they listen, like `host:7070`.
    pub addresses: Vec<String>,
}

/// What a machine gets when the request does not say. The paths are the operator's and need not lie in
/// the tree.
#[derive(Clone, Debug)]
pub struct Defaults {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Disks.
    pub disks: Vec<DiskConfig>,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            vcpus: 2,
            memory_mib: 256,
            initrd: None,
            cmdline: "console=ttyS0 reboot=k panic=-1 quiet".to_owned(),
            disks: Vec::new(),
        }
    }
}

/// What a request may ask for.
#[derive(Clone, Debug)]
pub struct Limits {
    /// How many machines may live at once.
    pub vms: usize,
    /// How many vCPUs one may have, up to the VMM's own 32.
    pub vcpus: u32,
    /// How much memory one may have, in MiB.
    pub memory_mib: u64,
    /// How long a VMM may take until a kernel boots.
    pub launch: Duration,
    /// How long a VMM may take until a saved machine runs again: it reads all of its memory first.
    pub restore: Duration,
    /// How long a VMM may take to stop before it is killed.
    pub stop: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            vms: 512,
            vcpus: 32,
            memory_mib: 1 << 20,
            launch: Duration::from_secs(120),
            restore: Duration::from_secs(6 * 3600),
            stop: Duration::from_secs(10),
        }
    }
}
