//! Has the kernel bring parts of files into its page cache, many at once, by io_uring (Linux, io_uring(7)), while who asks for it goes
//! on.
//!
//! What is read goes nowhere: all reads have one buffer, at which nobody looks. So nothing of a machine changes while they are under
//! way, and who wants what they have brought reads it again.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    ptr::NonNull,
    time::{Duration, Instant},
};

use io_uring::{IoUring, opcode, squeue::Flags, types::Fd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The most reads that are under way at once: the longest request, in reads of the buffer's size.
pub(super) const ENTRIES: u32 = 256;

/// A read is no longer than this.
const SINK_BYTES: usize = 256 << 10;

/// Up to so many reads are handed to threads of the kernel's at once, which wake who waits for them once each. With more, it
/// costs less that the kernel interrupts the thread that asks, for several that are over (`docs/decisions/io-uring.md`).
const HANDED_OVER: usize = 2;

/// How often a kernel that does not say when a read is over is asked whether it is.
const ASK_AGAIN: Duration = Duration::from_millis(1);

/// A part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) file: RawFd,
    /// Where in the file it begins, in bytes.
    pub(super) offset: u64,
    /// Its length in bytes.
    pub(super) len: u64,
}

impl Part {
    /// How many reads bring it.
    pub(super) fn read_count(self) -> u64 {
        self.len.div_ceil(SINK_BYTES as u64)
    }

    /// Itself, in parts that one read brings.
    fn reads(self) -> impl Iterator<Item = Self> {
        let step = SINK_BYTES as u64;
        (0..self.len).step_by(SINK_BYTES).map(move |at| Self {
            offset: self.offset + at,
            len: step.min(self.len - at),
            ..self
        })
    }
}

/// An io_uring, and the buffer of its reads.
pub(super) struct Ring {
    uring: IoUring,
    sink: Sink,
    /// Reads that the kernel has taken and not said to be over.
    under_way: usize,
}

impl Ring {
    /// Asks the kernel for one that signals `ended`, an eventfd, whenever a read is over.
    ///
    /// # Errors
    ///
    /// What the kernel says. It may have none, or forbid it: the sysctl `kernel.io_uring_disabled`, or a filter of system
    /// calls.
    pub(super) fn new(ended: BorrowedFd<'_>) -> io::Result<Self> {
        let uring = IoUring::new(ENTRIES)?;
        uring.submitter().register_eventfd(ended.as_raw_fd())?;
        Ok(Self {
            uring,
            sink: Sink::new(),
            under_way: 0,
        })
    }

    /// One that takes nothing: the kernel fails every time that it is asked to.
    #[cfg(test)]
    pub(super) fn broken() -> Self {
        let mut disabled = IoUring::builder();
        Self {
            uring: disabled.setup_r_disabled().build(ENTRIES).unwrap(),
            sink: Sink::new(),
            under_way: 0,
        }
    }

    /// Begins to bring `parts`, as many as can be under way at once; none may be already. Says whether the end of any will be signalled.
    /// Their files have to stay open until none is: the kernel may not look for them at once.
    ///
    /// # Errors
    ///
    /// What the kernel says. The ring is to be dropped then, with what it has not taken.
    pub(super) fn begin(&mut self, parts: &[Part]) -> io::Result<bool> {
        let reads = parts.iter().flat_map(|part| part.reads());
        let reads: Vec<Part> = reads.take(ENTRIES as usize).collect();
        let flags = match reads.len() {
            0..=HANDED_OVER => Flags::ASYNC,
            _ => Flags::empty(),
        };
        for read in reads {
            self.push(read, flags);
        }
        while !self.uring.submission().is_empty() {
            match self.uring.submit() {
                Ok(0) => return Err(io::ErrorKind::WouldBlock.into()),
                Ok(taken) => self.under_way += taken,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.under_way > 0)
    }

    #[allow(unsafe_code)]
    fn push(&mut self, part: Part, flags: Flags) {
        let entry = opcode::Read::new(Fd(part.file), self.sink.0.as_ptr(), part.len as u32)
            .offset(part.offset)
            .build()
            .flags(flags);
        // SAFETY: the buffer has `SINK_BYTES`, which no read of `Part::reads` is longer than, and is given back only when nothing is
        // under way (`Drop`). Nothing in Rust refers to it as a slice, and nobody reads it, so that it does not matter that
        // several reads write there at once. A file that is not open would be an error of the read.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        // There is room for `ENTRIES`, and nothing was there before.
        debug_assert!(pushed.is_ok());
    }

    /// Whether a read is under way.
    pub(super) fn is_under_way(&mut self) -> bool {
        let over = self.uring.completion().count();
        self.under_way = self.under_way.saturating_sub(over);
        self.under_way > 0
    }

    /// Waits until none is under way; says whether that is so by `deadline`.
    #[allow(unsafe_code)]
    pub(super) fn wait_until(&mut self, deadline: Instant) -> bool {
        while self.is_under_way() {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(bound) = Timespec::try_from(left) else {
                return false;
            };
            if left.is_zero() {
                return false;
            }
            // SAFETY: it is the ring's own, which lives on.
            let ring = unsafe { BorrowedFd::borrow_raw(self.uring.as_raw_fd()) };
            let polled = poll(&mut [PollFd::new(&ring, PollFlags::IN)], Some(&bound));
            if polled.is_err_and(|error| error != rustix::io::Errno::INTR) {
                std::thread::sleep(ASK_AGAIN.min(left));
            }
        }
        true
    }
}

impl Drop for Ring {
    /// The kernel may be at reads still, of a disk that hangs: then it keeps their buffer.
    fn drop(&mut self) {
        if !self.is_under_way() {
            self.sink.free();
        }
    }
}

/// Where reads put what they have read.
struct Sink(NonNull<u8>);

// SAFETY: it is a place in memory, like what `Box` has, and nobody looks at it.
#[allow(unsafe_code)]
unsafe impl Send for Sink {}

impl Sink {
    fn new() -> Self {
        let bytes: Box<[u8]> = vec![0; SINK_BYTES].into_boxed_slice();
        Self(NonNull::from(Box::leak(bytes)).cast())
    }

    /// Gives it back; once, when nobody writes there any more.
    #[allow(unsafe_code)]
    fn free(&mut self) {
        let bytes = NonNull::slice_from_raw_parts(self.0, SINK_BYTES);
        // SAFETY: it is what `new` leaked, and `Ring::drop`, which alone calls this, does so once.
        drop(unsafe { Box::from_raw(bytes.as_ptr()) });
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Write, pipe},
        os::fd::AsFd,
        time::Duration,
    };

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;
    use crate::conformance::PATIENCE;

    fn part(file: &impl AsRawFd, len: u64) -> Part {
        Part {
            file: file.as_raw_fd(),
            offset: 0,
            len,
        }
    }

    fn soon() -> Instant {
        Instant::now() + PATIENCE
    }

    #[test]
    fn a_part_is_read_in_reads_that_the_buffer_has_room_for() {
        let whole = Part {
            file: 7,
            offset: 100,
            len: 2 * SINK_BYTES as u64 + 1,
        };
        let reads: Vec<_> = whole.reads().map(|read| (read.offset, read.len)).collect();
        let sink = SINK_BYTES as u64;
        let expected = [(100, sink), (100 + sink, sink), (100 + 2 * sink, 1)];
        assert_eq!(reads, expected);
        assert_eq!(whole.read_count(), 3);
        let nothing = Part { len: 0, ..whole };
        assert_eq!((nothing.reads().count(), nothing.read_count()), (0, 0));
    }

    #[test]
    fn what_the_kernel_does_not_take_is_not_waited_for() {
        let file = tempfile::tempfile().unwrap();
        let mut ring = Ring::broken();
        let error = ring.begin(&[part(&file, 8)]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADFD));
        assert!(!ring.is_under_way());
    }

    #[test]
    fn it_is_known_when_all_are_over() {
        let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let mut ring = Ring::new(ended.as_fd()).unwrap();
        assert!(!ring.is_under_way());
        let (reader, mut writer) = pipe().unwrap();
        let empty = File::open("/dev/null").unwrap();
        let parts = [part(&reader, 4), part(&empty, 9), part(&reader, 4)];
        assert!(!ring.begin(&[]).unwrap());
        assert!(ring.begin(&parts).unwrap());
        assert!(ring.is_under_way());
        assert!(!ring.wait_until(Instant::now() + Duration::from_millis(20)));
        writer.write_all(b"once").unwrap();
        assert!(!ring.wait_until(Instant::now() + Duration::from_millis(20)));
        writer.write_all(b"more").unwrap();
        assert!(ring.wait_until(soon()));
        assert!(!ring.is_under_way());
        let mut signalled = [0; 8];
        rustix::io::read(&ended, &mut signalled).unwrap();
        assert_eq!(u64::from_ne_bytes(signalled), 3);
    }
}
