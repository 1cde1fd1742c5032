//! A real KVM for tests and benchmarks, also where the machine has none.
//!
//! [`session::Session`] runs commands where `/dev/kvm` can boot a stock Linux kernel: on this machine
//! if it has hardware virtualisation, else inside L1, a machine with an emulated AMD CPU and this
//! machine's own file system. [`guest`] builds what the virtual machines under test boot, from
//! Debian's own packages. [`environment`] is what programs run in a session are told.

#![forbid(unsafe_code)]

pub mod cache;
pub mod debian;
pub mod environment;
pub mod guest;
mod initramfs;
pub mod job;
mod kernel;
pub mod kvm;
pub mod l1;
mod modules;
mod qemu;
pub mod session;
pub mod setup;
mod tail;
