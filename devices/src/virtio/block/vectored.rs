//! Reading and writing files straight from and to guest memory, without a copy in between.
//!
//! Here and in [`super::ring`] is the unsafe code of block devices: the safe wrappers of `preadv` and `pwritev`
//! want Rust slices, and guest memory may not be one, since the guest changes it at any time.

use std::{fs::File, io, os::fd::AsRawFd};

use libc::{c_int, iovec, off_t};
use vm_memory::VolatileSlice;

/// Linux takes no more in one call (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;

type Call = unsafe extern "C" fn(c_int, *const iovec, c_int, off_t) -> isize;

/// Fills `slices` from `file` at `offset`.
///
/// # Errors
///
/// What the host says; `UnexpectedEof` when the file has become shorter.
pub(super) fn read_exact_at(
    file: &File,
    slices: &[VolatileSlice<'_>],
    offset: u64,
) -> io::Result<()> {
    transfer(libc::preadv, file, slices, offset)
}

/// Writes all of `slices` to `file` at `offset`.
///
/// # Errors
///
/// What the host says.
pub(super) fn write_all_at(
    file: &File,
    slices: &[VolatileSlice<'_>],
    offset: u64,
) -> io::Result<()> {
    transfer(libc::pwritev, file, slices, offset)
}

/// Fills `slices` from `file` at `offset` if that need not wait, as from the page cache; else what is in them is
/// undefined.
///
/// # Errors
///
/// `WouldBlock` when it has to wait, or what is there is less; `Unsupported` when the file cannot tell.
#[allow(unsafe_code)]
pub(super) fn read_without_waiting(
    file: &File,
    slices: &[VolatileSlice<'_>],
    offset: u64,
) -> io::Result<()> {
    let vectors = vectors(slices);
    let at = off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    if vectors.len() > MAX_VECTORS {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    let (vector, count) = (vectors.as_ptr(), vectors.len() as c_int);
    // SAFETY: as in `transfer`.
    let done = unsafe { libc::preadv2(file.as_raw_fd(), vector, count, at, libc::RWF_NOWAIT) };
    let bytes: usize = vectors.iter().map(|vector| vector.iov_len).sum();
    match usize::try_from(done) {
        Ok(done) if done == bytes => Ok(()),
        Ok(_) => Err(io::ErrorKind::WouldBlock.into()),
        Err(_) => {
            let error = io::Error::last_os_error();
            Err(match error.raw_os_error() {
                // Of file systems that cannot, and of kernels that never heard of it.
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => {
                    io::ErrorKind::Unsupported.into()
                }
                // Who reads again finds out what else it is.
                _ => io::ErrorKind::WouldBlock.into(),
            })
        }
    }
}

/// The places of `slices` as the kernel takes them.
fn vectors(slices: &[VolatileSlice<'_>]) -> Vec<iovec> {
    let slices = slices.iter().filter(|slice| !slice.is_empty());
    slices
        .map(|slice| iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
        .collect()
}

#[allow(unsafe_code)]
fn transfer(
    call: Call,
    file: &File,
    slices: &[VolatileSlice<'_>],
    mut offset: u64,
) -> io::Result<()> {
    let mut vectors = vectors(slices);
    let mut rest = vectors.as_mut_slice();
    while !rest.is_empty() {
        let count = rest.len().min(MAX_VECTORS);
        let at = off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the first `count` vectors describe guest memory that `slices` borrow, so that it
        // stays mapped, readable and writable during the call. Nothing in Rust refers to that memory
        // as a slice; that the guest may change it meanwhile is the kernel's business, which copies
        // bytes and believes none of them. `at` is not negative.
        let done = unsafe { call(file.as_raw_fd(), rest.as_ptr(), count as c_int, at) };
        match usize::try_from(done) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => {
                offset += done as u64;
                rest = advance(rest, done);
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// What remains of `vectors` after their first `done` bytes.
fn advance(vectors: &mut [iovec], mut done: usize) -> &mut [iovec] {
    let mut whole = 0;
    for vector in vectors.iter() {
        if done < vector.iov_len {
            break;
        }
        done -= vector.iov_len;
        whole += 1;
    }
    let rest = &mut vectors[whole..];
    if let Some(first) = rest.first_mut() {
        first.iov_base = first.iov_base.cast::<u8>().wrapping_add(done).cast();
        first.iov_len -= done;
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_slices_than_one_call_takes_are_transferred_in_order() {
        let file = tempfile::tempfile().unwrap();
        let mut written: Vec<u8> = (0..3000u32).map(|i| (i * 31 / 7) as u8).collect();
        let mut read = vec![0; 3000];
        fn slices(bytes: &mut [u8]) -> Vec<VolatileSlice<'_>> {
            bytes.chunks_mut(2).map(VolatileSlice::from).collect()
        }
        write_all_at(&file, &slices(&mut written), 10).unwrap();
        read_exact_at(&file, &slices(&mut read), 10).unwrap();
        assert_eq!(read, written);
        let error = read_exact_at(&file, &slices(&mut read), 11).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_short_transfer_goes_on_in_the_middle_of_a_slice() {
        let mut bytes = [0u8; 10];
        let base = bytes.as_mut_ptr();
        let vector = |at: usize, iov_len| iovec {
            iov_base: base.wrapping_add(at).cast(),
            iov_len,
        };
        let mut vectors = [vector(0, 4), vector(4, 1), vector(5, 5)];
        let rest = advance(&mut vectors, 6);
        assert_eq!(rest.len(), 1);
        assert_eq!(rest[0].iov_base, base.wrapping_add(6).cast());
        assert_eq!(rest[0].iov_len, 4);
        assert!(advance(&mut [vector(0, 4)], 4).is_empty());
    }
}
