//! The client's side of the control channel.

use std::{
    io,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use tarpc::{client::RpcError, context::Context};
use tokio::{net::TcpStream, time::timeout};

use crate::{
    BalloonChange, BalloonStatus, DiskChange, DiskStatus, Failure, GuestClock, Metric, ResetReport,
    RunsReport, RunsRequest, Secret, SnapshotReport, SnapshotRequest, Status, VmmClient,
    wire::{self, HANDSHAKE_DEADLINE},
};

/// How long a VMM may take to answer anything but a snapshot: longer than its own bounds of a pause that
/// fails (half a minute for the vCPUs, as much for the devices, and the undoing), so that its error,
/// which names what hangs, comes first.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);

/// How long a snapshot may take: hundreds of GiB on a slow disk.
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(6 * 3600);

/// How long what is asked for may take where who asks knows how long that is: a snapshot that is slowed on purpose, or runs of a guest.
const KNOWN_DEADLINE: Duration = Duration::from_secs(30 * 24 * 3600);

/// Why there is no answer, or not the one that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing listens on the port.
    #[error("no VMM listens on port {port}; `fermata ps` lists those that run")]
    Connect {
        /// The port.
        port: u16,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The VMM is there, or what listens on its port is, and says nothing: a process that is frozen, or that is swapped out.
    #[error(
        "what listens on port {port} does not answer; if it is a VMM that is frozen, let it go on, or end it by `fermata stop`"
    )]
    Silent {
        /// The port.
        port: u16,
    },
    /// Something listens but did not complete the handshake.
    #[error("what listens on port {port} is not the VMM with this secret")]
    Handshake {
        /// The port.
        port: u16,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// The connection broke before the answer: as a rule because the VMM died.
    #[error("the VMM went away before it answered; its log says why")]
    Lost(#[source] RpcError),
    /// The VMM is there but did not answer in time.
    #[error("the VMM did not answer within {} s; `fermata stop` ends it", .0.as_secs())]
    Deadline(Duration),
    /// The VMM answered that it could not do it.
    #[error(transparent)]
    Refused(#[from] Failure),
}

/// A connection to a VMM. Requests carry deadlines that suit them.
#[derive(Clone, Debug)]
pub struct Client(VmmClient);

impl Client {
    /// Connects to the VMM on loopback port `port`.
    ///
    /// # Errors
    ///
    /// [`ClientError::Connect`], [`ClientError::Silent`] and [`ClientError::Handshake`].
    pub async fn connect(port: u16, secret: &Secret) -> Result<Self, ClientError> {
        let connecting = TcpStream::connect((Ipv4Addr::LOCALHOST, port));
        let mut stream = timeout(HANDSHAKE_DEADLINE, connecting)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|source| {
                silent(port, &source).unwrap_or(ClientError::Connect { port, source })
            })?;
        let handshake = async {
            stream.set_nodelay(true)?;
            wire::offer(&mut stream, secret).await
        };
        handshake.await.map_err(|source| {
            silent(port, &source).unwrap_or(ClientError::Handshake { port, source })
        })?;
        let config = tarpc::client::Config::default();
        Ok(Self(
            VmmClient::new(config, wire::transport(stream)).spawn(),
        ))
    }

    /// What the machine is and what it is doing.
    ///
    /// # Errors
    ///
    /// [`ClientError::Lost`] and [`ClientError::Deadline`].
    pub async fn status(&self) -> Result<Status, ClientError> {
        answer(ANSWER_DEADLINE, |context| self.0.status(context)).await
    }

    /// Holds the guest.
    ///
    /// # Errors
    ///
    /// Those of [`Client::status`], and [`ClientError::Refused`].
    pub async fn pause(&self) -> Result<(), ClientError> {
        Ok(answer(ANSWER_DEADLINE, |context| self.0.pause(context)).await??)
    }

    /// Lets the guest go on.
    ///
    /// # Errors
    ///
    /// Those of [`Client::status`], and [`ClientError::Refused`].
    pub async fn resume(&self, clock: GuestClock) -> Result<(), ClientError> {
        Ok(answer(ANSWER_DEADLINE, |context| self.0.resume(context, clock)).await??)
    }

    /// Has the machine be what it was when it was forked or restored.
    ///
    /// # Errors
    ///
    /// Those of [`Client::status`], and [`ClientError::Refused`].
    pub async fn reset(&self, clock: GuestClock) -> Result<ResetReport, ClientError> {
        Ok(answer(ANSWER_DEADLINE, |context| self.0.reset(context, clock)).await??)
    }

    /// Has the machine run from where it was forked or restored, so many times; returns when that has ended, one way or another.
    ///
    /// # Errors
    ///
    /// Those of [`Client::status`], and [`ClientError::Refused`].
    pub async fn runs(&self, request: RunsRequest) -> Result<RunsReport, ClientError> {
        Ok(answer(KNOWN_DEADLINE, |context| self.0.runs(context, request)).await??)
    }

    /// Saves the machine; returns when both files are durable, which may take long.
    ///
    /// # Errors
    ///
    /// Those of [`Client::status`], and [`ClientError::Refused`].
    pub async fn snapshot(&self, request: SnapshotRequest) -> Result<SnapshotReport, ClientError> {
        let deadline = match request.bytes_per_second {
            None => SNAPSHOT_DEADLINE,
            Some(_) => KNOWN_DEADLINE,
        };
        Ok(answer(deadline, |context| self.0.snapshot(context, request)).await??)
    }

    /// Has the snapshot that is being taken not be taken. The machine runs, or stays held if it was and has not been let go on by then.
    ///
    /// # Errors
    ///
    /// Those of [`Client::status`], and [`ClientError::Refused`] when none is being taken, or it is about to be complete and is kept.
    pub async fn cancel_snapshot(&self) -> Result<(), ClientError> {
        Ok(answer(ANSWER_DEADLINE, |context| self.0.cancel_snapshot(context)).await??)
    }

    /// Changes the disk of this number, from 0, and says what it is then.
    ///
    /// # Errors
    ///
    /// Those of [`Client::status`], and [`ClientError::Refused`]; the disk is as it was then.
    pub async fn change_disk(
        &self,
        disk: u32,
        change: DiskChange,
    ) -> Result<DiskStatus, ClientError> {
        Ok(answer(ANSWER_DEADLINE, |context| {
            self.0.change_disk(context, disk, change)
        })
        .await??)
    }

    /// Ends the machine and its process.
    ///
    /// # Errors
    ///
    /// Those of [`Client::status`], and [`ClientError::Refused`].
    pub async fn stop(&self) -> Result<(), ClientError> {
        Ok(answer(ANSWER_DEADLINE, |context| self.0.stop(context)).await??)
    }

    /// Changes the machine's balloon, if anything is to change, and says how it stands with it.
    ///
    /// # Errors
    ///
    /// Those of [`Client::status`], and [`ClientError::Refused`].
    pub async fn balloon(&self, change: BalloonChange) -> Result<BalloonStatus, ClientError> {
        Ok(answer(ANSWER_DEADLINE, |context| self.0.balloon(context, change)).await??)
    }

    /// Counters since the process began.
    ///
    /// # Errors
    ///
    /// Those of [`Client::status`].
    pub async fn metrics(&self) -> Result<Vec<Metric>, ClientError> {
        answer(ANSWER_DEADLINE, |context| self.0.metrics(context)).await
    }
}

/// The error of who was waited for in vain.
fn silent(port: u16, source: &io::Error) -> Option<ClientError> {
    (source.kind() == io::ErrorKind::TimedOut).then_some(ClientError::Silent { port })
}

async fn answer<T, F>(deadline: Duration, call: impl FnOnce(Context) -> F) -> Result<T, ClientError>
where
    F: Future<Output = Result<T, RpcError>>,
{
    let mut context = Context::current();
    context.deadline = Instant::now() + deadline;
    call(context).await.map_err(|error| match error {
        RpcError::DeadlineExceeded => ClientError::Deadline(deadline),
        other => ClientError::Lost(other),
    })
}
