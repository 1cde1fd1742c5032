//! A deduplicating, crash-safe store for images of machines: guest memories, disks, any file.
//!
//! A [`Store`] keeps snapshots of images in which no 4 KiB chunk is stored twice. Chunks of zeros take no space at all;
//! the others are found by a collision-resistant hash, compressed four at a time, and written to packs
//! that any number of processes may append to and read from at once. A snapshot whose save has returned survives
//! a killed process and a power cut. A store that is created with a [`Key`] is encrypted. `docs/store-format.md` specifies files, bytes and the order of writes.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use dedup::{CreateOptions, OpenOptions, Store};
//!
//! # let dir = tempfile::tempdir()?;
//! # let path = |name: &str| dir.path().join(name);
//! # std::fs::write(path("memory"), vec![7; 100_000])?;
//! let store = Store::create_dir(path("store"), &CreateOptions::default(), OpenOptions::default())?;
//! store.save_file("monday", path("memory"))?;
//! store.load_file("monday", path("again"))?;
//! assert_eq!(std::fs::read(path("memory"))?, std::fs::read(path("again"))?);
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod aligned;
mod annotation;
pub mod backend;
mod bytes;
mod config;
mod diff;
mod error;
mod facts;
mod frame;
mod fsck;
mod gc;
mod hash;
mod index;
mod key;
mod marks;
mod name;
mod pack;
mod progress;
mod protect;
mod read;
mod readable;
mod recipe;
mod refs;
mod seal;
mod snapshot;
mod stat;
mod store;
mod threads;
mod write;

pub use annotation::MAX_ANNOTATION_BYTES;
pub use config::{CreateOptions, DEFAULT_CHUNK_SIZE, DEFAULT_LEVEL};
pub use diff::ImageDiff;
pub use error::{Error, Result};
pub use facts::{Facts, ImageFacts, SnapshotId};
pub use fsck::{Problem, Report, repair_config};
pub use gc::{Collected, GcOptions};
pub use key::Key;
pub use name::check_name;
pub use progress::Progress;
pub use read::{Around, Decoded, ImageReader, PartReader, Piece, Zeros};
pub use stat::Stat;
pub use store::{FILE_IMAGE, Listing, LogEntry, OpenOptions, SnapshotReader, Store, Unreadable};
pub use write::{ImageStats, ImageWriter, Saved, Writer};
