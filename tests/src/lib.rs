//! fermata as its users meet it: the programs as processes, HTTP, real guests.
//!
//! The tests are in `tests/`: `bare_metal` runs on any `/dev/kvm` with a few instructions for a guest,
//! `level3` with Linux guests where a stock kernel boots.

pub mod bare_metal;
pub mod cli;
pub mod console;
pub mod debian;
pub mod http;
pub mod huge_pages;
pub mod linux;
pub mod memory;
pub mod post_mortem;
pub mod programs;
pub mod server;
pub mod tap;
pub mod wait;
