//! Faults of guest memory that user space resolves (Documentation/admin-guide/mm/userfaultfd.rst).
//!
//! A [`Userfault`] is told of accesses to parts of guest memory, by vCPUs, by device threads and by the kernel on their
//! behalf, and whoever accessed waits until it has resolved them. What it does is within the machine's memory, by image
//! offset, whatever the numbers are that it is given.

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use rustix::{
    fs::{Mode as FileMode, OFlags},
    io::Errno,
    ioctl::{self, Opcode, Updater, opcode},
    mm::UserfaultfdFlags,
};

use crate::{PAGE_BYTES, host::Host};

/// The kernel's group of these ioctls.
const GROUP: u8 = 0xaa;
const API: Opcode = opcode::read_write::<ApiArgument>(GROUP, 0x3f);
const REGISTER: Opcode = opcode::read_write::<RegisterArgument>(GROUP, 0x00);
const UNREGISTER: Opcode = opcode::read::<HostRange>(GROUP, 0x01);
const WAKE: Opcode = opcode::read::<HostRange>(GROUP, 0x02);
const COPY: Opcode = opcode::read_write::<CopyArgument>(GROUP, 0x03);
const ZEROPAGE: Opcode = opcode::read_write::<ZeropageArgument>(GROUP, 0x04);
const WRITEPROTECT: Opcode = opcode::read_write::<WriteprotectArgument>(GROUP, 0x06);
/// Of `/dev/userfaultfd`: a new descriptor.
const NEW: Opcode = opcode::none(GROUP, 0x00);

const API_VERSION: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const REGISTER_MODE_MISSING: u64 = 1 << 0;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const EVENT_PAGEFAULT: u8 = 0x12;
const PAGEFAULT_FLAG_WP: u64 = 1 << 1;

/// Events that are read at a time.
const EVENTS: usize = 64;

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// A range of the process's addresses.
#[repr(C)]
#[derive(Clone, Copy)]
struct HostRange {
    start: u64,
    bytes: u64,
}

#[repr(C)]
struct RegisterArgument {
    range: HostRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArgument {
    to: u64,
    from: u64,
    bytes: u64,
    mode: u64,
    /// Bytes copied, or a negative error.
    copied: i64,
}

#[repr(C)]
struct ZeropageArgument {
    range: HostRange,
    mode: u64,
    zeroed: i64,
}

#[repr(C)]
struct WriteprotectArgument {
    range: HostRange,
    mode: u64,
}

/// An event as the kernel tells it.
#[repr(C)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    /// Of a fault: its flags, its address, and the thread.
    argument: [u64; 3],
}

/// What accesses are told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Watch {
    /// Accesses to pages that are not there.
    Missing,
    /// Writes to pages that were protected.
    Writes,
}

/// An access that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// The page, by its offset in the memory image.
    pub(crate) page: u64,
    /// What was found.
    pub(crate) watch: Watch,
}

/// Who is told of accesses to a machine's memory, and resolves them.
#[derive(Debug)]
pub(crate) struct Userfault {
    descriptor: OwnedFd,
    host: Host,
}

impl Userfault {
    /// Of the memory at `host`. Nothing is watched yet.
    ///
    /// # Errors
    ///
    /// When the host does not permit it: who asks must be root, or have been given `/dev/userfaultfd`, for accesses
    /// by the kernel count too.
    pub(crate) fn new(host: Host) -> io::Result<Self> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: a new descriptor that watches nothing.
        #[allow(unsafe_code)]
        let asked = unsafe { rustix::mm::userfaultfd(flags) };
        let descriptor = match asked {
            Err(Errno::PERM) => from_device(flags)?,
            asked => asked?,
        };
        let new = Self { descriptor, host };
        new.ask::<API, _>(&mut ApiArgument {
            api: API_VERSION,
            features: FEATURE_PAGEFAULT_FLAG_WP,
            ioctls: 0,
        })?;
        Ok(new)
    }

    /// Begins to watch `image`.
    pub(crate) fn register(&self, image: &Range<u64>, watch: Watch) -> io::Result<()> {
        let mode = match watch {
            Watch::Missing => REGISTER_MODE_MISSING,
            Watch::Writes => REGISTER_MODE_WP,
        };
        self.ask::<REGISTER, _>(&mut RegisterArgument {
            range: self.host_range(image)?,
            mode,
            ioctls: 0,
        })
    }

    /// No longer watches `image`: nothing is protected there, and whoever waits goes on.
    pub(crate) fn unregister(&self, image: &Range<u64>) -> io::Result<()> {
        self.ask::<UNREGISTER, _>(&mut self.host_range(image)?)
    }

    /// From now on, whoever writes to a page of `image` that is there waits.
    pub(crate) fn protect(&self, image: &Range<u64>) -> io::Result<()> {
        self.write_protect(image, WRITEPROTECT_MODE_WP)
    }

    /// Has those who wrote to `image` go on, and lets others write.
    pub(crate) fn unprotect(&self, image: &Range<u64>) -> io::Result<()> {
        self.write_protect(image, 0)
    }

    fn write_protect(&self, image: &Range<u64>, mode: u64) -> io::Result<()> {
        let range = self.host_range(image)?;
        loop {
            // Another thread changes the process's mappings just then.
            match self.ask::<WRITEPROTECT, _>(&mut WriteprotectArgument { range, mode }) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
    }

    /// Puts `content`, whole pages, where nothing is yet, at `offset` of the image, and has those go on who wait for it. Gives
    /// how many bytes it put there: it ends before a page that is there already.
    pub(crate) fn copy(&self, offset: u64, content: &[u8]) -> io::Result<u64> {
        let bytes = content.len() as u64;
        let to = self.host_range(&(offset..offset.saturating_add(bytes)))?;
        let mut done = 0;
        while done < bytes {
            let mut argument = CopyArgument {
                to: to.start + done,
                from: content.as_ptr() as u64 + done,
                bytes: bytes - done,
                mode: 0,
                copied: 0,
            };
            let asked = self.ask::<COPY, _>(&mut argument);
            match go_on(asked, argument.copied)? {
                Some(copied) => done += copied,
                None => break,
            }
        }
        Ok(done)
    }

    /// Has `image` be zero where nothing is yet, and those go on who wait for it. Gives how many bytes it was: it ends before a
    /// page that is there already.
    pub(crate) fn zero(&self, image: &Range<u64>) -> io::Result<u64> {
        let range = self.host_range(image)?;
        let mut done = 0;
        while done < range.bytes {
            let mut argument = ZeropageArgument {
                range: HostRange {
                    start: range.start + done,
                    bytes: range.bytes - done,
                },
                mode: 0,
                zeroed: 0,
            };
            let asked = self.ask::<ZEROPAGE, _>(&mut argument);
            match go_on(asked, argument.zeroed)? {
                Some(zeroed) => done += zeroed,
                None => break,
            }
        }
        Ok(done)
    }

    /// Has those who wait for `image` look again.
    pub(crate) fn wake(&self, image: &Range<u64>) -> io::Result<()> {
        self.ask::<WAKE, _>(&mut self.host_range(image)?)
    }

    /// The accesses that wait and have not been told yet; none if there are none just now. A descriptor that can be read has
    /// some, or had some.
    #[allow(unsafe_code)]
    pub(crate) fn faults(&self) -> io::Result<Vec<Fault>> {
        const MESSAGE: usize = size_of::<Message>();
        let mut bytes = [0; EVENTS * MESSAGE];
        let read = match rustix::io::read(&self.descriptor, &mut bytes) {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Vec::new()),
            read => read?,
        };
        let (messages, _) = bytes[..read].as_chunks::<MESSAGE>();
        let messages = messages.iter().map(|bytes| {
            // SAFETY: a message is integers, which may be anything, and has no padding.
            unsafe { std::mem::transmute::<[u8; MESSAGE], Message>(*bytes) }
        });
        Ok(messages
            .filter(|message| message.event == EVENT_PAGEFAULT)
            .filter_map(|message| self.fault(&message))
            .collect())
    }

    fn fault(&self, message: &Message) -> Option<Fault> {
        let [flags, address, _] = message.argument;
        let offset = self.host.offset(address)?;
        Some(Fault {
            page: offset - offset % PAGE_BYTES,
            watch: match flags & PAGEFAULT_FLAG_WP {
                0 => Watch::Missing,
                _ => Watch::Writes,
            },
        })
    }

    fn host_range(&self, image: &Range<u64>) -> io::Result<HostRange> {
        let within = image.start <= image.end && image.end <= self.host.bytes();
        if !within {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(HostRange {
            start: self.host.at(image.start) as u64,
            bytes: image.end - image.start,
        })
    }

    fn ask<const OPCODE: Opcode, T>(&self, argument: &mut T) -> io::Result<()> {
        // SAFETY: each of the requests above has the argument that the kernel expects.
        #[allow(unsafe_code)]
        let request = unsafe { Updater::<OPCODE, T>::new(argument) };
        // SAFETY: each of them changes nothing but its argument and guest memory, which whoever reads or writes it takes for
        // something that can change at any time.
        #[allow(unsafe_code)]
        unsafe { ioctl::ioctl(&self.descriptor, request) }?;
        Ok(())
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// How many bytes more are there; `None` when the next page is there already.
fn go_on(asked: io::Result<()>, done: i64) -> io::Result<Option<u64>> {
    match asked {
        Ok(()) => Ok(Some(done as u64)),
        Err(e) => match Errno::from_io_error(&e) {
            Some(Errno::EXIST) => Ok(None),
            // Part of it, because another thread changes the process's mappings just then.
            Some(Errno::AGAIN) => Ok(Some(done.max(0) as u64)),
            _ => Err(e),
        },
    }
}

/// A descriptor for those who were given the device and may not ask the kernel itself.
fn from_device(flags: UserfaultfdFlags) -> io::Result<OwnedFd> {
    let open = OFlags::RDWR | OFlags::CLOEXEC;
    let device = rustix::fs::open("/dev/userfaultfd", open, FileMode::empty())?;
    // SAFETY: the request has no memory as its argument.
    #[allow(unsafe_code)]
    let new = unsafe { libc::ioctl(device.as_raw_fd(), NEW as _, flags.bits()) };
    if new < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is a new descriptor, and nobody else's.
    #[allow(unsafe_code)]
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}
