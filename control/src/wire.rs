//! What goes over the loopback connection: a handshake, then tarpc messages as JSON in frames of a
//! bounded length.

use std::{io, time::Duration};

use tarpc::{
    serde_transport::{self, Transport},
    tokio_serde::formats::Json,
    tokio_util::codec::LengthDelimitedCodec,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{Secret, secret::SECRET_BYTES};

/// First bytes of both directions. The last is the version of what follows.
const MAGIC: [u8; 8] = *b"FERMCTL\x01";

/// The longest message. Requests hold two paths, answers some hundred metrics.
const MAX_FRAME_BYTES: usize = 1 << 20;

/// How long either side waits for the other's half of the handshake.
pub(crate) const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);

/// Client's half: shows the secret, waits for the server's magic.
pub(crate) async fn offer(stream: &mut TcpStream, secret: &Secret) -> io::Result<()> {
    within_deadline(async {
        let mut hello = [0; MAGIC.len() + SECRET_BYTES];
        let (magic, offered) = hello.split_at_mut(MAGIC.len());
        magic.copy_from_slice(&MAGIC);
        offered.copy_from_slice(secret.as_bytes());
        stream.write_all(&hello).await?;
        let mut answer = [0; MAGIC.len()];
        stream.read_exact(&mut answer).await?;
        if answer == MAGIC {
            Ok(())
        } else {
            Err(io::Error::other("the peer is not a fermata VMM"))
        }
    })
    .await
}

/// Server's half: reads the secret and answers only when it is the right one.
pub(crate) async fn demand(stream: &mut TcpStream, secret: &Secret) -> io::Result<()> {
    within_deadline(async {
        let mut magic = [0; MAGIC.len()];
        let mut offered = [0; SECRET_BYTES];
        stream.read_exact(&mut magic).await?;
        stream.read_exact(&mut offered).await?;
        if magic != MAGIC {
            return Err(io::Error::other("the peer is not a fermata client"));
        }
        if !secret.matches(&offered) {
            return Err(io::Error::other("the peer does not know the secret"));
        }
        stream.write_all(&MAGIC).await
    })
    .await
}

async fn within_deadline(half: impl Future<Output = io::Result<()>>) -> io::Result<()> {
    timeout(HANDSHAKE_DEADLINE, half)
        .await
        .map_err(|_| io::ErrorKind::TimedOut)?
}

/// Makes a tarpc transport of a stream whose handshake is done.
pub(crate) fn transport<In, Out>(stream: TcpStream) -> Transport<TcpStream, In, Out, Json<In, Out>>
where
    In: for<'de> serde::Deserialize<'de>,
    Out: serde::Serialize,
{
    let framed = LengthDelimitedCodec::builder()
        .max_frame_length(MAX_FRAME_BYTES)
        .new_framed(stream);
    serde_transport::new(framed, Json::default())
}
