//! Linux guests, by the programs that `cargo xtask test` names in the environment.
//!
//! The tests that begin with `elsewhere_` run on a second machine, on what the others left behind.

#![allow(clippy::unwrap_used)] // a test that cannot go on should stop

#[path = "level3/at_once.rs"]
mod at_once;
#[path = "level3/balloon.rs"]
mod balloon;
#[path = "level3/branching.rs"]
mod branching;
#[path = "level3/clocks.rs"]
mod clocks;
#[path = "level3/cpu.rs"]
mod cpu;
#[path = "level3/debian.rs"]
mod debian;
#[path = "level3/disk_limits.rs"]
mod disk_limits;
#[path = "level3/elsewhere.rs"]
mod elsewhere;
#[path = "level3/ends.rs"]
mod ends;
#[path = "level3/first_light.rs"]
mod first_light;
#[path = "level3/full_disk.rs"]
mod full_disk;
#[path = "level3/generation.rs"]
mod generation;
#[path = "level3/network.rs"]
mod network;
#[path = "level3/pause.rs"]
mod pause;
#[path = "level3/resize.rs"]
mod resize;
#[path = "level3/same_again.rs"]
mod same_again;
#[path = "level3/stored.rs"]
mod stored;
#[path = "level3/virtio_console.rs"]
mod virtio_console;
#[path = "level3/vsock.rs"]
mod vsock;
