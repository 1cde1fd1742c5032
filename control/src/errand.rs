//! What a VMM process is started for, and how it is told.
//!
//! Its standard input is a Unix socket, on which come a line of JSON, an [`Errand`], and with it a file descriptor, if it takes one.
//! A descriptor that is sent need not be inherited: no other process that is started meanwhile has it by accident, and a process
//! that was started before there was one can be given it. Each errand is answered by a line on its standard output, a
//! [`Launched`](crate::Launched), before the next one comes. Who is started and is told nothing more, because the other end of the
//! socket is closed, ends and leaves nothing behind, but for disks that it has made anew for a machine to be restored;
//! and so does, while its machine is made or has just begun, who finds that nobody reads its answers.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::UnixStream,
};

use crate::{Confinement, LaunchSpec, Shape, Source};

/// The longest that is read. It has a few paths, a command line and a CPU template.
const MAX_BYTES: usize = 1 << 20;

/// What a VMM process does.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Errand {
    /// It makes what machines of this size have in common, for the machine that comes next; with a hot image, what forks of that have.
    Prepare(Shape),
    /// It makes a machine and lets it run. With [`Origin::Fork`](crate::Origin::Fork) comes the hot image.
    Run(Box<LaunchSpec>),
    /// The same, but the machine stands still until [`Errand::Begin`] comes: others may have to be made before any of them runs.
    Make(Box<LaunchSpec>),
    /// The machine that was made runs.
    Begin,
    /// It makes a hot image of a saved machine in the memfd that comes with this, and ends.
    Image {
        /// The machine.
        of: Source,
        /// What it may have, if not everything that its state file asks for.
        confinement: Option<Confinement>,
    },
}

impl Errand {
    /// Whether another can follow.
    fn is_last(&self) -> bool {
        match self {
            Self::Prepare(_) | Self::Make(_) => false,
            Self::Run(_) | Self::Begin | Self::Image { .. } => true,
        }
    }
}

/// Gives `errand`, and `with` it if there is something, to the process behind `socket`.
pub(crate) async fn give(
    socket: &mut UnixStream,
    errand: &Errand,
    with: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut line = serde_json::to_vec(errand)?;
    line.push(b'\n');
    let mut sent = 0;
    if let Some(fd) = with {
        let send = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = [fd];
            control.push(SendAncillaryMessage::ScmRights(&fds));
            let bytes = [IoSlice::new(&line)];
            Ok(sendmsg(
                &*socket,
                &bytes,
                &mut control,
                SendFlags::NOSIGNAL,
            )?)
        };
        sent = socket.async_io(Interest::WRITABLE, send).await?;
    }
    socket.write_all(&line[sent..]).await?;
    if errand.is_last() {
        socket.shutdown().await?;
    }
    Ok(())
}

/// Reads an errand from `socket`, and what comes with it.
///
/// # Errors
///
/// When there is no socket, or something else comes.
pub fn receive(socket: impl AsFd) -> io::Result<(Errand, Option<OwnedFd>)> {
    let mut line = Vec::new();
    let mut with = None;
    let mut buffer = [0; 4096];
    while line.last() != Some(&b'\n') {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = rustix::io::retry_on_intr(|| {
            let into = &mut [IoSliceMut::new(&mut buffer)];
            recvmsg(&socket, into, &mut control, RecvFlags::CMSG_CLOEXEC)
        })?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                with = with.or(fds.into_iter().next());
            }
        }
        if message.bytes == 0 || line.len() > MAX_BYTES {
            break;
        }
        line.extend_from_slice(&buffer[..message.bytes]);
    }
    Ok((serde_json::from_slice(&line)?, with))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write, os::unix::fs::FileExt};

    use super::*;

    fn image() -> Errand {
        Errand::Image {
            of: Source::files("/s", "x".repeat(300_000)),
            confinement: None,
        }
    }

    async fn given(errand: Errand, with: Option<File>) -> io::Result<(Errand, Option<OwnedFd>)> {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let theirs = theirs.into_std().unwrap();
        theirs.set_nonblocking(false).unwrap();
        let receiver = std::thread::spawn(move || receive(theirs));
        give(&mut ours, &errand, with.as_ref().map(AsFd::as_fd))
            .await
            .unwrap();
        receiver.join().unwrap()
    }

    #[tokio::test]
    async fn an_errand_arrives_whole_and_with_what_belongs_to_it() {
        let (errand, with) = given(image(), None).await.unwrap();
        let Errand::Image { of, .. } = errand else {
            panic!("another errand");
        };
        assert_eq!(of, Source::files("/s", "x".repeat(300_000)));
        assert!(with.is_none());
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"hello", 0).unwrap();
        let (_, with) = given(image(), Some(file)).await.unwrap();
        let mut five = [0; 5];
        File::from(with.unwrap())
            .read_exact_at(&mut five, 0)
            .unwrap();
        assert_eq!(&five, b"hello");
    }

    #[test]
    fn what_is_no_errand_is_refused() {
        for bytes in [&b""[..], b"{", b"hello\n", b"{\"machine\": 1}\n"] {
            let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            ours.write_all(bytes).unwrap();
            drop(ours);
            assert!(receive(theirs).is_err());
        }
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let endless = std::thread::spawn(move || while ours.write_all(&[b' '; 4096]).is_ok() {});
        assert!(receive(theirs).is_err());
        endless.join().unwrap();
        assert!(receive(tempfile::tempfile().unwrap()).is_err());
    }
}
