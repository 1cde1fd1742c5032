//! Several reads under way at once, by io_uring (Linux, io_uring(7)).
//!
//! All of them are over when [`Ring::read`] returns: between two calls nothing is under way.

use std::{io, os::fd::RawFd, time::Duration};

use io_uring::{IoUring, opcode, types::Fd};
use libc::iovec;

use super::vectored::{MAX_VECTORS, vectors};
use crate::virtio::buffers::Run;

/// The most that are under way at once; as many as a round over a queue has requests.
const ENTRIES: u32 = 64;

/// How often a kernel that does not say when a read is over is asked whether it is.
const ASK_AGAIN: Duration = Duration::from_millis(1);

/// A piece of a file, and where in guest memory it belongs.
#[derive(Debug)]
pub(super) struct Piece<'m> {
    /// Open for as long as the piece is to be read.
    pub(super) file: RawFd,
    /// Where in the file it begins, in bytes.
    pub(super) offset: u64,
    pub(super) data: Run<'m>,
}

impl Piece<'_> {
    /// The same once more.
    pub(super) fn again(&self) -> Piece<'_> {
        Piece {
            file: self.file,
            offset: self.offset,
            data: self.data.clone(),
        }
    }
}

/// An io_uring.
pub(super) struct Ring(IoUring);

impl Ring {
    /// Asks the kernel for one.
    ///
    /// # Errors
    ///
    /// What the kernel says. It may have none, or forbid it: the sysctl `kernel.io_uring_disabled`, or a filter of system
    /// calls.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(IoUring::new(ENTRIES)?))
    }

    /// One that takes nothing: the kernel fails every time that it is asked to.
    #[cfg(test)]
    pub(super) fn broken() -> Self {
        Self(
            IoUring::builder()
                .setup_r_disabled()
                .build(ENTRIES)
                .unwrap(),
        )
    }

    /// Reads `pieces`, several at once, and says of each whether all of it has been read; if not, it is to be read in
    /// another way. `Err` when the ring is of no more use; then nothing is under way either.
    pub(super) fn read(&mut self, pieces: &[Piece<'_>]) -> Result<Vec<bool>, io::Error> {
        let mut complete = vec![false; pieces.len()];
        let vectors: Vec<Vec<iovec>> = pieces
            .iter()
            .map(|piece| vectors(piece.data.slices()))
            .collect();
        let mut next = 0;
        while next < pieces.len() {
            let wave = next..pieces.len().min(next + ENTRIES as usize);
            next = wave.end;
            let mut waiting = 0;
            for index in wave {
                waiting += usize::from(self.push(index, &pieces[index], &vectors[index]));
            }
            self.finish(waiting, |index, read| {
                let whole = pieces.get(index).map(|piece| piece.data.len());
                if let Some(complete) = complete.get_mut(index) {
                    *complete = u64::try_from(read).ok() == whole;
                }
            })?;
        }
        Ok(complete)
    }

    /// Puts one into the submission queue, unless it is not one that the kernel would take.
    #[allow(unsafe_code)]
    fn push(&mut self, index: usize, piece: &Piece<'_>, vectors: &[iovec]) -> bool {
        if vectors.is_empty() || vectors.len() > MAX_VECTORS {
            return false;
        }
        let entry = opcode::Readv::new(Fd(piece.file), vectors.as_ptr(), vectors.len() as u32)
            .offset(piece.offset)
            .build()
            .user_data(index as u64);
        // SAFETY: `finish` returns only when the kernel is done with every entry that it has taken, and until then `vectors` and
        // the guest memory that they describe, which `piece` borrows, stay where they are. Nothing in Rust refers to
        // that memory as a slice. A file that is not open would be an error of the read.
        unsafe { self.0.submission().push(&entry) }.is_ok()
    }

    /// Waits until `waiting` reads are over; tells `done` of each its number and what came of it.
    fn finish(&mut self, mut waiting: usize, mut done: impl FnMut(usize, i32)) -> io::Result<()> {
        let mut broken = None;
        while waiting > 0 {
            let outcome = match &broken {
                None => self.0.submit_and_wait(1).map(drop),
                Some(_) => {
                    std::thread::sleep(ASK_AGAIN);
                    Ok(())
                }
            };
            match outcome {
                Ok(()) => {}
                Err(error) if is_passing(&error) => {}
                Err(error) => {
                    // What the kernel has not taken it never will.
                    waiting = waiting.saturating_sub(self.0.submission().len());
                    broken = Some(error);
                }
            }
            for completion in self.0.completion() {
                waiting = waiting.saturating_sub(1);
                done(completion.user_data() as usize, completion.result());
            }
        }
        broken.map_or(Ok(()), Err)
    }
}

/// Whether it is worth while to try again: a signal, or no room until completions have been taken.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Write, pipe},
        os::fd::AsRawFd,
    };

    use super::*;

    #[test]
    fn what_the_kernel_does_not_take_is_not_waited_for() {
        let file = tempfile::tempfile().unwrap();
        let mut bytes = [7; 8];
        let piece = Piece {
            file: file.as_raw_fd(),
            offset: 0,
            data: Run::of_bytes(&mut bytes),
        };
        let error = Ring::broken().read(&[piece]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADFD));
        assert_eq!(bytes, [7; 8]);
    }

    #[test]
    #[allow(unsafe_code)]
    fn what_the_kernel_has_taken_is_waited_for_when_the_ring_breaks() {
        let mut ring = Ring::new().unwrap();
        let (reader, mut writer) = pipe().unwrap();
        let mut bytes = [[0; 4]; 2];
        let pieces = bytes.each_mut().map(|bytes| Piece {
            file: reader.as_raw_fd(),
            offset: 0,
            data: Run::of_bytes(bytes),
        });
        let vectors = pieces.each_ref().map(|piece| vectors(piece.data.slices()));
        // The kernel takes one, which waits for what is not in the pipe yet, and not the other.
        assert!(ring.push(0, &pieces[0], &vectors[0]));
        assert_eq!(ring.0.submit().unwrap(), 1);
        assert!(ring.push(1, &pieces[1], &vectors[1]));
        let other = File::open("/dev/null").unwrap();
        // SAFETY: the ring lives on, for its queues are mapped; its descriptor becomes one of another file, which is closed
        // with it.
        let replaced = unsafe { libc::dup2(other.as_raw_fd(), ring.0.as_raw_fd()) };
        assert_ne!(replaced, -1);

        let written = std::thread::spawn(move || {
            std::thread::sleep(20 * ASK_AGAIN);
            writer.write_all(b"late").unwrap();
        });
        let mut done = Vec::new();
        let error = ring.finish(2, |index, read| done.push((index, read)));
        assert_eq!(error.unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP));
        assert_eq!(done, [(0, 4)]);
        drop(pieces);
        assert_eq!(bytes, [*b"late", [0; 4]]);
        written.join().unwrap();
    }
}
