//! Disks that branch: a read-only base and above it layers, each a sparse file of what was written while it was the
//! topmost.
//!
//! A [`Disk`] is opened by its topmost layer, its head, which alone is written to. [`Disk::cut`] seals the head and begins
//! the next in constant time; any number of disks can then stand on the sealed layer ([`Disk::branch`]). A read asks one
//! map, whatever the depth of the chain. A write reads nothing. What a flush has returned for survives a crash of the
//! process and of the host. `docs/disk-format.md` specifies files, bytes and the order of writes.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use branch_disk::{anything, Disk, Foundation, LayerRef};
//!
//! # let dir = tempfile::tempdir()?;
//! let path = dir.path().join("web.disk");
//! let mut disk = Disk::create(&path, Some(1 << 20), &Foundation::Nothing, &anything)?;
//! disk.write(4096, &mut &[7; 512][..])?;
//! let cut = disk.cut(disk.prepare()?)?;
//! let LayerRef { path: monday, id } = cut.finish()?;
//! disk.write(4096, &mut &[8; 512][..])?;
//!
//! let other = Disk::branch(&monday, Some(id), &anything)?;
//! let mut read = [0; 512];
//! other.read(4096, &mut &mut read[..])?;
//! assert_eq!(read, [7; 512]);
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]
#![allow(unexpected_cfgs, reason = "`fuzzing` is set by fuzzers alone")]

mod arrival;
mod bits;
mod chain;
mod check;
mod convert;
mod create;
mod disk;
mod error;
mod frozen;
mod header;
mod info;
mod io;
mod layer;
mod layout;
mod map;
mod media;
mod merge;
mod merged_away;
mod name;
mod page;
mod parts;
mod qcow2;
mod qcow2_whole;
mod rebuild;
mod seal;
mod stored_map;
#[cfg(test)]
mod tape;
#[cfg(test)]
mod tests;

/// Whether checksums are taken on trust, so that a fuzzer comes to what is behind them.
const FORGED: bool = cfg!(fuzzing);

pub use arrival::{Awaited, Origin};
pub use chain::{Mode, Rule, anything};
pub use check::{Checked, check};
pub use convert::{Copied, export_raw, import_raw};
pub use create::Foundation;
pub use disk::{Counts, Disk, ToKeep};
pub use error::Error;
pub use frozen::Frozen;
pub use header::LayerId;
pub use info::{BaseInfo, Info, LayerInfo};
pub use io::{Sink, Source, Space, discard_range, zero_range};
pub use layout::{MAX_BYTES, MAX_DEPTH, SECTOR_BYTES};
pub use merge::{Merge, Merged};
pub use merged_away::Rest;
pub use name::rebuilt as rebuilt_name;
pub use parts::{Kind, Part};
pub use qcow2::{export_qcow2, import_qcow2};
pub use rebuild::{Rebuild, rebuild};
pub use seal::{Cut, LayerRef, Next, Plan};
