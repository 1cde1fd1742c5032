//! KVM's structures as bytes, and back.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::Error;

/// The bytes of a structure of the kernel's ABI.
pub(crate) fn to_bytes<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

/// A structure of the kernel's ABI from its saved bytes.
pub(crate) fn from_bytes<T: FromBytes>(what: &'static str, bytes: &[u8]) -> Result<T, Error> {
    T::read_from_bytes(bytes).map_err(|_| Error::SavedSize {
        what,
        found: bytes.len(),
        expected: size_of::<T>(),
    })
}

/// As many bytes as a structure of the kernel's has: one that got another size could not be read any more.
#[cfg(test)]
pub(crate) fn pattern<T>(first: u8) -> Vec<u8> {
    (0..size_of::<T>())
        .map(|at| first.wrapping_add(at as u8))
        .collect()
}
