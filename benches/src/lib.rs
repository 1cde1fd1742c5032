//! Measurements of fermata, and of QEMU beside it in the same run.
//!
//! `cargo xtask bench` runs the programs in `src/bin`; `docs/benchmarks.md` says what each row means.

mod attached;
pub mod chain;
mod chronometer;
mod console;
mod cycle;
mod dirtier;
mod elf;
pub mod elsewhere;
mod fermata;
mod filler;
pub mod forks;
mod full;
pub mod images;
pub mod instant;
pub mod io;
pub mod linux_instant;
pub mod native;
pub mod on_demand;
pub mod pre_copy;
pub mod qemu;
mod receiver;
pub mod report;
pub mod resets;
mod row;
pub mod store;
mod toucher;

pub use console::Console;
pub use cycle::{Files, LinuxGuest, Machine, Monitor, Saved, measure};
pub use fermata::Fermata;
pub use row::{Bench, Figures, Row, Samples, System};

/// Guest memory of the machines that are measured, in MiB.
pub const MEMORY_MIB: [u64; 3] = [256, 512, 1024];

/// vCPUs of the machines that run Linux.
pub const VCPUS: u32 = 2;
