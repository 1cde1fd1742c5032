//! What was typed and the guest has not taken yet.
//!
//! It is shared with who reads what is typed, on the event loop, which hears of it by an eventfd as of any other source.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Mutex,
};

use rustix::event::{EventfdFlags, eventfd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{InputPort, sync::lock, virtio::buffers::Run};

/// What is kept at most: the rest stays where it comes from.
pub(super) const TYPED_BYTES: usize = 4096;

/// It.
#[derive(Debug)]
pub(super) struct Typed {
    kept: Mutex<Kept>,
    /// Written to when there is something for the guest. Each time is an event (`EPOLLET`), so that nobody need read it.
    arrived: OwnedFd,
    /// Readable once there is room, for who found none.
    room: EventFd,
}

#[derive(Debug, Default)]
struct Kept {
    bytes: VecDeque<u8>,
    /// Somebody found no room.
    waits: bool,
}

impl Typed {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        Ok(Self {
            kept: Mutex::default(),
            arrived: eventfd(0, flags)?,
            room: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Has an event when there is something for the guest.
    pub(super) fn arrived(&self) -> BorrowedFd<'_> {
        self.arrived.as_fd()
    }

    /// Has the device look whether there is something for the guest.
    fn announce(&self) {
        // It fails only when its count is at the limit, and then it is readable anyway.
        let _ = rustix::io::write(&self.arrived, &1u64.to_ne_bytes());
    }

    pub(super) fn is_empty(&self) -> bool {
        lock(&self.kept).bytes.is_empty()
    }

    /// Moves as much to the guest's buffer as there is room for, and returns how much.
    pub(super) fn give(&self, room: &Run<'_>) -> u32 {
        let mut kept = lock(&self.kept);
        let given = room.fill(kept.bytes.make_contiguous());
        kept.bytes.drain(..given as usize);
        self.announce_room(&mut kept);
        given
    }

    /// All of it, in order.
    pub(super) fn to_vec(&self) -> Vec<u8> {
        lock(&self.kept).bytes.iter().copied().collect()
    }

    /// Has it be `bytes`, of which there are at most [`TYPED_BYTES`].
    pub(super) fn replace(&self, bytes: Vec<u8>) {
        let mut kept = lock(&self.kept);
        kept.bytes = bytes.into();
        // Who found no room in a console that was in use need not find this one full.
        self.announce_room(&mut kept);
    }

    fn announce_room(&self, kept: &mut Kept) {
        if kept.bytes.len() < TYPED_BYTES && std::mem::take(&mut kept.waits) {
            // As above.
            let _ = self.room.write(1);
        }
    }
}

impl InputPort for Typed {
    fn input_room(&self) -> usize {
        let mut kept = lock(&self.kept);
        let room = TYPED_BYTES - kept.bytes.len();
        // Under the same lock, so that the guest takes nothing in between.
        kept.waits |= room == 0;
        room
    }

    fn input(&self, bytes: &[u8]) -> usize {
        let mut kept = lock(&self.kept);
        let taken = bytes.len().min(TYPED_BYTES - kept.bytes.len());
        kept.bytes.extend(&bytes[..taken]);
        drop(kept);
        if taken > 0 {
            self.announce();
        }
        taken
    }

    fn room(&self) -> io::Result<EventFd> {
        self.room.try_clone()
    }
}
