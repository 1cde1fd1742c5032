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
mod machines;
mod openapi;
mod plan;
mod routes;
mod tree;

pub use config::{Defaults, Limits, ServerConfig};
pub use describe::{describe, status_of};
pub use openapi::document;

use std::io;

use control::RegistryError;
use rocket::{
    Build, Rocket,
    config::{Ident, LogLevel},
    data::{Limits as DataLimits, ToByteUnit},
};

use crate::{machines::Machines, tree::Tree};

/// The longest request body in KiB. The longest that is meant holds a command line and some disks.
const MAX_BODY_KIB: u32 = 256;

/// Why the server cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The tree is not a directory that can be read.
    #[error("cannot serve the tree {}; name an existing directory", root.display())]
    Tree {
        /// The directory.
        root: std::path::PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The run directory cannot be used.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// The server, ready to be launched.
///
/// # Errors
///
/// [`SetupError`] when the tree or the run directory cannot be used.
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
    let tree = Tree::open(&config.root).map_err(|source| SetupError::Tree {
        root: config.root.clone(),
        source,
    })?;
    let machines = Machines::new(config, tree)?;
    Ok(rocket::custom(listen)
        .manage(machines)
        .mount("/", routes::all())
        .register("/", catchers::all()))
}
