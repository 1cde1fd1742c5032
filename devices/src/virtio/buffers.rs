//! The buffers of a descriptor chain.
//!
//! A driver may cut a request into descriptors as it likes (virtio 1.3, 2.7.4), so that devices see
//! runs of bytes here and never descriptors.

use memory::GuestMemory;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory as _, Permissions, VolatileSlice};

use super::DriverError;

/// The two runs of bytes that a chain is made of.
#[derive(Debug)]
pub(crate) struct Buffers<'m> {
    /// What the device may read.
    pub(crate) readable: Run<'m>,
    /// What the device may write.
    pub(crate) writable: Run<'m>,
}

impl<'m> Buffers<'m> {
    /// Walks `chain`, which may have at most `most` descriptors.
    pub(crate) fn of(
        chain: impl Iterator<Item = Descriptor>,
        memory: &'m GuestMemory,
        most: usize,
    ) -> Result<Self, DriverError> {
        let mut readable = Run::default();
        let mut writable = Run::default();
        // The iterator ends in the same way after the last descriptor and at one it cannot follow.
        let mut complete = false;
        for (count, descriptor) in chain.enumerate() {
            if count == most {
                return Err(DriverError::LongChain(most));
            }
            complete = !descriptor.has_next();
            let (run, access) = if descriptor.is_write_only() {
                (&mut writable, Permissions::Write)
            } else if writable.slices.is_empty() {
                (&mut readable, Permissions::Read)
            } else {
                return Err(DriverError::Order);
            };
            let outside = |_| DriverError::OutsideMemory {
                address: descriptor.addr().0,
                len: descriptor.len(),
            };
            let slices = memory
                .get_slices(descriptor.addr(), descriptor.len() as usize, access)
                .map_err(outside)?;
            for slice in slices {
                run.slices.push(slice.map_err(outside)?);
            }
        }
        if !complete {
            return Err(DriverError::BrokenChain);
        }
        Ok(Self { readable, writable })
    }
}

/// Bytes of guest memory, in order, in one or more places.
#[derive(Clone, Debug, Default)]
pub(crate) struct Run<'m> {
    slices: Vec<VolatileSlice<'m>>,
}

impl<'m> Run<'m> {
    /// Bytes in the run; a chain has at most 4 GiB.
    pub(crate) fn len(&self) -> u64 {
        self.slices.iter().map(|slice| slice.len() as u64).sum()
    }

    /// The places, in order.
    pub(crate) fn slices(&self) -> &[VolatileSlice<'m>] {
        &self.slices
    }

    /// Cuts the run after `at` bytes, or where it ends if that is earlier; returns what follows.
    pub(crate) fn split_off(&mut self, at: u64) -> Self {
        let mut rest = at;
        for index in 0..self.slices.len() {
            let slice = self.slices[index];
            let len = slice.len() as u64;
            if rest < len {
                let mut tail = self.slices.split_off(index);
                if let Ok((head, after)) = slice.split_at(rest as usize) {
                    self.slices.push(head);
                    tail[0] = after;
                }
                return Self { slices: tail };
            }
            rest -= len;
        }
        Self::default()
    }

    /// Takes `N` bytes off the front, if there are so many.
    pub(crate) fn take_front<const N: usize>(&mut self) -> Option<[u8; N]> {
        if self.len() < N as u64 {
            return None;
        }
        let tail = self.split_off(N as u64);
        let head = std::mem::replace(self, tail);
        let mut bytes = [0; N];
        let mut filled = 0;
        for slice in head.slices {
            filled += slice.copy_to(&mut bytes[filled..]);
        }
        Some(bytes)
    }

    /// Takes the last byte off, if there is one.
    pub(crate) fn take_last(&mut self) -> Option<Self> {
        let before = self.len().checked_sub(1)?;
        Some(self.split_off(before))
    }

    /// Fills it with zeros.
    pub(crate) fn zero(&self) {
        const ZEROS: &[u8] = &[0; 4096];
        for slice in &self.slices {
            let mut rest = *slice;
            while !rest.is_empty() {
                let now = rest.len().min(ZEROS.len());
                rest.copy_from(&ZEROS[..now]);
                match rest.offset(now) {
                    Ok(later) => rest = later,
                    Err(_) => break,
                }
            }
        }
    }

    /// Writes `bytes`, as many as there is room for, and returns how many.
    pub(crate) fn fill(&self, bytes: &[u8]) -> u32 {
        let mut rest = bytes;
        for slice in &self.slices {
            let (now, later) = rest.split_at(rest.len().min(slice.len()));
            slice.copy_from(now);
            rest = later;
        }
        (bytes.len() - rest.len()) as u32
    }

    /// Copies the first bytes of the run to `bytes`, and returns how many.
    pub(crate) fn copy_to(&self, bytes: &mut [u8]) -> usize {
        let mut copied = 0;
        for slice in &self.slices {
            copied += slice.copy_to(&mut bytes[copied..]);
        }
        copied
    }
}
