//! A Unix socket that carries one Ethernet frame in each message: a switch's, or another process's.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, retry_on_intr},
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect,
        recv, send, socket_with, sockopt,
    },
};

use super::{
    Attachment, NetError,
    backend::{Backend, Refused},
    header::HEADER_BYTES,
};

/// A connected socket.
pub(super) struct Socket {
    attachment: Attachment,
    socket: OwnedFd,
    /// The connection has an end, which reads as a message of no bytes, and so does a message of no bytes.
    connected: bool,
}

impl Socket {
    /// Connects to the sequenced-packet socket at `path`, on which somebody must be listening.
    pub(super) fn connect(path: &str) -> Result<Self, NetError> {
        let failed = |errno: Errno| NetError::Socket {
            path: path.to_owned(),
            source: errno.into(),
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).map_err(failed)?;
        let address = SocketAddrUnix::new(Path::new(path)).map_err(failed)?;
        connect(&socket, &address).map_err(failed)?;
        Ok(Self {
            attachment: Attachment::Socket(path.to_owned()),
            socket,
            connected: true,
        })
    }

    /// On a socket that is connected already, of sequenced packets or of datagrams.
    pub(super) fn of(socket: OwnedFd) -> Result<Self, NetError> {
        let kind = sockopt::socket_type(&socket).map_err(|e| NetError::Descriptor(e.into()))?;
        let connected = match kind {
            SocketType::SEQPACKET => true,
            SocketType::DGRAM => false,
            _ => return Err(NetError::Descriptor(io::ErrorKind::InvalidInput.into())),
        };
        Ok(Self {
            attachment: Attachment::Descriptor,
            socket,
            connected,
        })
    }

    /// Whether nobody sends any more.
    fn has_ended(&self) -> bool {
        let mut socket = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        // An end is a hang-up, too, and nothing else is waited for. It cannot fail.
        retry_on_intr(|| poll(&mut socket, Some(&Timespec::default()))) != Ok(0)
    }
}

impl Backend for Socket {
    fn attachment(&self) -> Attachment {
        self.attachment.clone()
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn can_be_full(&self) -> bool {
        true
    }

    /// Frames go as they would on a wire: with checksums, and no longer than a wire takes.
    fn offloads(&self) -> u64 {
        0
    }

    fn accept(&mut self, _features: u64) {}

    fn receive(&mut self, buffer: &mut [u8]) -> Result<usize, Refused> {
        let Some((header, frame)) = buffer.split_at_mut_checked(HEADER_BYTES) else {
            return Err(Refused::Frame(io::ErrorKind::InvalidInput.into()));
        };
        header.fill(0);
        let received = retry_on_intr(|| recv(&self.socket, &mut *frame, RecvFlags::DONTWAIT));
        match received {
            Ok((0, _)) if self.connected && self.has_ended() => {
                Err(Refused::Gone(io::ErrorKind::UnexpectedEof.into()))
            }
            Ok((bytes, _)) => Ok(HEADER_BYTES + bytes),
            Err(errno) => Err(refused(errno)),
        }
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), Refused> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let frame = frame.get(HEADER_BYTES..).unwrap_or_default();
        retry_on_intr(|| send(&self.socket, frame, flags))
            .map(drop)
            .map_err(refused)
    }
}

fn refused(errno: Errno) -> Refused {
    match errno {
        Errno::AGAIN => Refused::Later,
        Errno::MSGSIZE | Errno::NOBUFS | Errno::NOMEM => Refused::Frame(errno.into()),
        _ => Refused::Gone(errno.into()),
    }
}
