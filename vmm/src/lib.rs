//! A virtual machine monitor: one process, one machine.
//!
//! [`run`] makes the machine that a [`LaunchSpec`] describes, serves its control channel, and returns
//! how it ended. `ARCHITECTURE.md` draws the threads.

mod boot;
mod console;
mod controller;
mod device_set;
mod disks;
mod error;
mod generation;
mod interrupt;
mod lifecycle;
mod machine;
mod metrics;
mod nets;
mod place;
mod platform;
mod process;
mod service;
mod state;
mod vcpu;
mod vcpus;
mod vsocks;

pub use process::{read_spec, run};

/// The release of fermata that this is.
pub const RELEASE: &str = env!("CARGO_PKG_VERSION");
