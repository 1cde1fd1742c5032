//! What every device has in common.

use std::{fmt, io, sync::Arc};

use saved_state::{Kind, Section};

use crate::{
    BusDevice,
    virtio::{block::DiskError, net::NetError, vsock::VsockError},
};

/// An edge-triggered interrupt line; implemented above this crate.
pub trait InterruptLine: Send + Sync + fmt::Debug {
    /// Sends one edge. Delivery may be asynchronous.
    ///
    /// # Errors
    ///
    /// Whatever keeps the edge from being sent; devices count it and go on.
    fn trigger(&self) -> io::Result<()>;
}

/// What the guest asks of its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestRequest {
    /// Turn the machine off.
    PowerOff,
    /// Start again from the firmware.
    Reset,
}

/// Called with what the guest asks for, on the vCPU's thread that asked; it must not block.
pub type OnGuestRequest = Arc<dyn Fn(GuestRequest) + Send + Sync>;

/// A device that has state.
pub trait Device: BusDevice {
    /// The kind of the section it saves.
    fn kind(&self) -> Kind;

    /// Saves the state as instance `instance`. The event loop must be quiesced and the vCPUs stopped.
    ///
    /// # Errors
    ///
    /// [`saved_state::Error::Encode`] when the state breaks a bound of the encoding.
    fn save(&self, instance: u32) -> Result<Section, saved_state::Error>;

    /// Takes over a saved state. `self` must have the backing that the saved device had, and be fresh or one that has taken over this
    /// state before and was in use since; guest memory must have its size, but need not have its content yet. The event
    /// loop must be quiesced and the vCPUs stopped.
    ///
    /// # Errors
    ///
    /// [`Error`], after which the device must not be used.
    fn restore(&mut self, section: &Section) -> Result<(), Error>;

    /// Called between [`Device::restore`], once the interrupt controllers are restored too, and the
    /// first instruction of the guest: sends an interrupt again that was pending. The snapshot may
    /// have caught the edge on its way to the interrupt controller; one edge too many is harmless.
    fn resume(&mut self);

    /// Counters, by name.
    fn metrics(&self) -> Vec<(&'static str, u64)>;
}

/// Why a device could not be made or restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The section could not be decoded.
    #[error(transparent)]
    Section(#[from] saved_state::Error),
    /// The section decodes to something the device can never have saved.
    #[error(
        "the saved state of device {kind} is impossible ({reason}); take another copy of the snapshot"
    )]
    Impossible {
        /// The section's kind.
        kind: Kind,
        /// What is impossible in it.
        reason: String,
    },
    /// The disk is not the one that was saved.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The network device cannot be attached, or not there.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The vsock device cannot listen.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The host has no eventfd left.
    #[error("no eventfd for a virtqueue; raise the limit of open files (ulimit -n)")]
    EventFd(#[source] io::Error),
    /// A device model offers a virtqueue of a size that cannot be.
    #[error("a virtqueue cannot have {0} entries; a power of two up to 32768 is needed")]
    QueueSize(u16),
}
