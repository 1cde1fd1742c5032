//! The store beside other programs that store alike things once.
//!
//! `docs/benchmarks.md` says what each row means, and at which settings the peers run.

mod borg;
mod bound;
mod casync;
mod chunk_sizes;
mod fermata;
mod figures;
mod in_memory;
mod pages;
mod race;
mod reads;
mod restic;
mod rustic;
mod subject;

pub use borg::Borg;
pub use bound::Bounds;
pub use casync::Casync;
pub use chunk_sizes::{ChunkSize, sweep};
pub use fermata::{Fermata, SETTINGS, SMALLEST, Task};
pub use figures::draw;
pub use in_memory::{InMemory, MemoryRates};
pub use race::Race;
pub use restic::Restic;
pub use rustic::Rustic;
pub use subject::{Place, Subject};
