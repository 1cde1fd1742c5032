//! The REST front end. It spawns VMM processes, finds those that live, and translates between HTTP and
//! their control channel; what a machine is, it does not know.
//!
//! The server keeps nothing that a machine depends on: machines live on when it dies, and one that
//! starts later finds them through [`control::Registry`].

#![forbid(unsafe_code)]

mod catchers;
mod children;
mod config;
mod describe;
mod error;
mod forks;
mod machines;
mod openapi;
mod plan;
mod routes;
mod tree;
mod visitors;

pub use config::{Defaults, Limits, Peers, ServerConfig};
pub use describe::{balloon_of, describe, disk_of, reset_of, runs_of, status_of};
pub use openapi::document;
pub use plan::cpu_model;

use std::{
    io,
    path::{Path, PathBuf},
};

use control::{DiskConfig, DiskFormat, Registry, RegistryError};
use rocket::{
    Build, Rocket,
    config::{Ident, LogLevel},
    data::{Limits as DataLimits, ToByteUnit},
};

use crate::{machines::Machines, tree::Tree, visitors::Visitors};

/// The longest request body in KiB. The longest that is meant holds a command line, some disks and a CPU template.
const MAX_BODY_KIB: u32 = 256;

/// Why the server cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The tree is not a directory that can be read.
    #[error("cannot serve the tree {}; name an existing directory", root.display())]
    Tree {
        /// The directory.
        root: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The store, a key or the run directory lies in the tree, or the tree in one of them.
    #[error(
        "{} and the tree {} lie in each other, so that clients could reach what is not theirs; keep them apart",
        path.display(), root.display()
    )]
    InTree {
        /// The store's directory, a key file, or the run directory.
        path: PathBuf,
        /// The tree.
        root: PathBuf,
    },
    /// A disk that branches would get its layers where no restore may reach them.
    #[error(
        "the branching disk {} does not lie in the tree {}, so that no machine on it could be restored; put it there, with what it stands on",
        path.display(), root.display()
    )]
    BranchOutside {
        /// The disk.
        path: PathBuf,
        /// The tree.
        root: PathBuf,
    },
    /// No machine could be as requests have it that do not say.
    #[error("requests that do not say how large a machine is to be could not be served: {0}")]
    Defaults(String),
    /// The run directory cannot be used.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// The server, ready to be launched.
///
/// # Errors
///
/// [`SetupError`] when the defaults, the tree or the run directory cannot be used.
pub fn rocket(config: ServerConfig) -> Result<Rocket<Build>, SetupError> {
    let listen = rocket::Config {
        address: config.address,
        port: config.port,
        ident: Ident::none(),
        limits: DataLimits::new().limit("json", MAX_BODY_KIB.kibibytes()),
        // What happens is told through tracing.
        log_level: LogLevel::Off,
        cli_colors: false,
        ..rocket::Config::release_default()
    };
    let (defaults, limits) = (&config.defaults, &config.limits);
    plan::size(defaults.vcpus, defaults.memory_mib, limits)
        .map_err(|error| SetupError::Defaults(error.message))?;
    let tree = Tree::open(&config.root).map_err(|source| SetupError::Tree {
        root: config.root.clone(),
        source,
    })?;
    let store = config.store.iter();
    let store = store.flat_map(|store| [Some(&store.directory), store.key_file.as_ref()]);
    let peers = config.peers.iter().map(|peers| &peers.key_file);
    for path in store.flatten().chain(peers) {
        keep_apart(&tree, path)?;
    }
    for disk in &config.defaults.disks {
        within(&tree, disk)?;
    }
    // Not even made in the tree; and a path with `..` in it is known only once all of it is there.
    keep_apart(&tree, &config.run_dir)?;
    keep_apart(&tree, Registry::open(&config.run_dir)?.dir())?;
    let visitors = Visitors {
        loopback: config.address.is_loopback(),
    };
    let machines = Machines::new(config, tree)?;
    Ok(rocket::custom(listen)
        .manage(machines)
        .attach(visitors)
        .mount("/", routes::all())
        .mount("/", visitors::routes())
        .register("/", catchers::all()))
}

/// A machine's snapshot names a layer beside its disk, and a restore takes no file from outside the tree.
fn within(tree: &Tree, disk: &DiskConfig) -> Result<(), SetupError> {
    // One that is not there is refused when it is opened.
    let real = disk.path.canonicalize();
    let real = real.unwrap_or_else(|_| disk.path.clone());
    if disk.format == DiskFormat::Branch && !real.starts_with(tree.resolved()) {
        return Err(SetupError::BranchOutside {
            path: disk.path.clone(),
            root: tree.resolved().to_owned(),
        });
    }
    Ok(())
}

/// Clients name files in the tree to be read, written and attached: none of the store, no key, and nothing that tells of machines that
/// are not theirs, or of how these are reached, may be among them.
fn keep_apart(tree: &Tree, path: &Path) -> Result<(), SetupError> {
    let root = tree.resolved();
    let real = real(path);
    match real.starts_with(root) || root.starts_with(&real) {
        true => Err(SetupError::InTree {
            path: path.to_owned(),
            root: root.to_owned(),
        }),
        false => Ok(()),
    }
}

/// `path`, absolute and without links as far as there is something of that name.
fn real(path: &Path) -> PathBuf {
    // Only an empty one cannot be made absolute, and is refused one way or another.
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let there = path.ancestors().find_map(|ancestor| {
        let rest = path.strip_prefix(ancestor).ok()?;
        Some(ancestor.canonicalize().ok()?.join(rest))
    });
    there.unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use control::DiskLimits;

    use super::*;

    #[test]
    fn a_branching_disk_outside_the_tree_is_refused_and_a_raw_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("tree")).unwrap();
        let tree = Tree::open(&dir.path().join("tree")).unwrap();
        let check = |name: &str, format| {
            let path = dir.path().join(name);
            std::fs::write(&path, "").unwrap();
            let disk = DiskConfig {
                path,
                read_only: false,
                format,
                serial: None,
                limits: DiskLimits::default(),
            };
            within(&tree, &disk).is_ok()
        };
        assert!(check("tree/disk", DiskFormat::Branch));
        assert!(check("disk", DiskFormat::Raw));
        assert!(!check("disk", DiskFormat::Branch));
    }

    #[test]
    fn a_store_or_a_key_that_clients_could_reach_into_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["tree", "tree/store", "store", "store/tree"] {
            std::fs::create_dir(path(name)).unwrap();
        }
        std::fs::write(path("tree/key"), "").unwrap();
        let apart = |root: &str, other: &str| {
            keep_apart(&Tree::open(&path(root)).unwrap(), &path(other)).is_ok()
        };
        assert!(apart("tree", "store"));
        assert!(!apart("tree", "tree/store"));
        assert!(!apart("store/tree", "store"));
        assert!(!apart("tree", "tree/key"));
        // Nor one that is not there yet.
        std::os::unix::fs::symlink(path("tree"), path("link")).unwrap();
        assert!(apart("tree", "absent/store"));
        assert!(!apart("tree", "link/absent/store"));
    }
}
