//! What a network device is attached to.

use std::{io, os::fd::BorrowedFd};

use super::Attachment;

/// Carries frames to and from somewhere. No call waits.
///
/// A frame is preceded by a header ([`super::header`]) in both directions.
pub(super) trait Backend: Send {
    /// What it is attached to.
    fn attachment(&self) -> Attachment;

    /// Becomes readable when there is a frame, and writable when there is room for one after
    /// [`Refused::Later`].
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// Whether [`Backend::send`] may answer [`Refused::Later`].
    fn can_be_full(&self) -> bool;

    /// Feature bits of the offloads that it can have.
    fn offloads(&self) -> u64;

    /// The driver has accepted `features`; with none it has gone.
    fn accept(&mut self, features: u64);

    /// Takes one frame into `buffer` and returns its length. Of a longer one the rest is lost.
    fn receive(&mut self, buffer: &mut [u8]) -> Result<usize, Refused>;

    /// Sends one frame.
    fn send(&mut self, frame: &[u8]) -> Result<(), Refused>;
}

/// Why a frame was not carried.
#[derive(Debug)]
pub(super) enum Refused {
    /// There is none, or no room for one: later.
    Later,
    /// Something is wrong with this frame.
    Frame(io::Error),
    /// It is not attached any more.
    Gone(io::Error),
}
