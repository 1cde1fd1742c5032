//! Guest memory: its regions around the 32-bit hole, and what is behind them on the host.
//!
//! Two addresses of a byte of guest memory matter here. Its *guest-physical address* is where the
//! guest sees it. Its *image offset* is where it lies in a memory image: the regions one after the
//! other, without the hole. [`Layout`] translates between them.

mod abort;
mod arrivals;
mod backed;
mod discard;
mod host;
mod host_file;
mod layout;
mod live;
mod map;
mod original;
mod own_pages;
mod populated;
mod settled;
mod userfault;

pub use arrivals::Arrivals;
pub use discard::Discarder;
pub use host::{Error, HostPages, MachineMemory};
pub use host_file::host_file;
pub use layout::{HOLE_END, HOLE_START, InvalidSize, Layout, MIN_MEMORY_BYTES, Region};
pub use live::{Armed, AtCut, Elsewhere, GoOn, Outcome, Part, PartKind, Tracker};
pub use original::{BroughtBack, Original};

/// Bytes of a page, the unit in which memory is saved.
pub const PAGE_BYTES: u64 = 4096;

/// Guest memory as devices and the loader see it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
