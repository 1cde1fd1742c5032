//! A virtual machine monitor: one process, one machine.
//!
//! [`run`] makes the machine that a [`LaunchSpec`](control::LaunchSpec) describes, serves its control channel, and returns
//! how it ended. `ARCHITECTURE.md` draws the threads.

mod arriving_disks;
mod awake;
mod balloons;
mod beside;
mod boot;
mod console;
mod controller;
mod cpu;
mod device_set;
mod disks;
mod door;
mod error;
mod frame;
mod generation;
mod interrupt;
mod lifecycle;
mod limits;
mod live;
mod machine;
mod merging;
mod metrics;
mod nets;
mod place;
mod platform;
mod pre_copy;
mod process;
mod runs;
mod save;
mod service;
mod state;
mod stored_disks;
pub mod terminal;
mod urgent;
mod vcpu;
mod vcpus;
mod vmclock;
mod vsocks;
mod waiting;

pub use process::run;

/// The release of fermata that this is.
pub const RELEASE: &str = env!("CARGO_PKG_VERSION");
