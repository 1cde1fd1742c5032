//! The control channel over a real loopback connection.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests may do what tests may"
)]

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use control::{
    AfterSnapshot, BalloonChange, BalloonStatus, Client, ClientError, Console, Destination,
    DiskChange, DiskStatus, Failure, FailureKind, GuestClock, MachineState, Metric, Origin,
    ProcessId, Record, ResetReport, RunsReport, RunsRequest, Secret, SnapshotReport,
    SnapshotRequest, Source, Status, Stopped, Vmm,
};
use tarpc::context::Context;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    sync::Notify,
    task::JoinHandle,
    time::timeout,
};

/// Far more than anything here takes.
const BOUND: Duration = Duration::from_secs(60);

#[derive(Clone, Default)]
struct Service {
    entered: Arc<Notify>,
    shutdown: Arc<Notify>,
    dropped: Arc<Notify>,
}

struct OnDrop(Arc<Notify>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl Vmm for Service {
    async fn status(self, _: Context) -> Status {
        Status {
            pid: 7,
            release: "0.0.0".to_owned(),
            state: MachineState::Running,
            vcpus: 2,
            memory_mib: 256,
            uptime_ms: 1,
            disks: Vec::new(),
            lost_memory: None,
        }
    }

    async fn pause(self, _: Context) -> Result<(), Failure> {
        Err(Failure {
            kind: FailureKind::WrongState,
            message: "it is being saved".to_owned(),
        })
    }

    /// Never answers, and tells when it is dropped.
    async fn resume(self, _: Context, _: GuestClock) -> Result<(), Failure> {
        let _dropped = OnDrop(Arc::clone(&self.dropped));
        self.entered.notify_one();
        std::future::pending().await
    }

    async fn reset(self, _: Context, _: GuestClock) -> Result<ResetReport, Failure> {
        Ok(ResetReport {
            dirty_pages: 64,
            total_us: 130,
        })
    }

    /// As if the first had not been done.
    async fn runs(self, _: Context, request: RunsRequest) -> Result<RunsReport, Failure> {
        Ok(RunsReport {
            done: 0,
            ended: control::RunsEnd::Limit,
            last: request.first,
            result: None,
            dirty_pages: 0,
            reset_us: 0,
            total_us: 0,
        })
    }

    /// Reports the time it was given.
    async fn snapshot(
        self,
        context: Context,
        _: SnapshotRequest,
    ) -> Result<SnapshotReport, Failure> {
        let left = context.deadline - std::time::Instant::now();
        Ok(SnapshotReport {
            id: "00".to_owned(),
            state_bytes: 0,
            memory_bytes: 0,
            written_bytes: 0,
            copy: control::MemoryCopy::StopAndCopy,
            rounds: 0,
            copied_bytes: 0,
            last_round_bytes: 0,
            downtime_us: 0,
            total_us: left.as_micros() as u64,
            stored: None,
            sent: None,
        })
    }

    async fn cancel_snapshot(self, _: Context) -> Result<(), Failure> {
        Err(Failure {
            kind: FailureKind::WrongState,
            message: "none is being taken".to_owned(),
        })
    }

    async fn change_disk(
        self,
        _: Context,
        disk: u32,
        change: DiskChange,
    ) -> Result<DiskStatus, Failure> {
        Err(Failure {
            kind: FailureKind::NotFound,
            message: format!("{disk} {change:?}"),
        })
    }

    async fn stop(self, _: Context) -> Result<(), Failure> {
        self.shutdown.notify_one();
        Ok(())
    }

    async fn balloon(self, _: Context, _: BalloonChange) -> Result<BalloonStatus, Failure> {
        Err(Failure {
            kind: FailureKind::NotFound,
            message: "it has none".to_owned(),
        })
    }

    async fn metrics(self, _: Context) -> Vec<Metric> {
        panic!("a service with a fault");
    }
}

struct Running {
    port: u16,
    secret: Secret,
    service: Service,
    server: JoinHandle<()>,
}

async fn serve() -> Running {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let secret = Secret::random().unwrap();
    let service = Service::default();
    let server = tokio::spawn({
        let (secret, service) = (secret.clone(), service.clone());
        async move {
            let shutdown = service.shutdown.clone();
            control::serve(listener, secret, service, shutdown.notified()).await;
        }
    });
    Running {
        port,
        secret,
        service,
        server,
    }
}

#[tokio::test]
async fn requests_are_answered_and_refusals_arrive() {
    let vmm = serve().await;
    let client = Client::connect(vmm.port, &vmm.secret).await.unwrap();
    assert_eq!(client.status().await.unwrap().pid, 7);
    let refused = client.pause().await.unwrap_err();
    assert!(
        matches!(&refused, ClientError::Refused(failure) if failure.kind == FailureKind::WrongState),
        "{refused}"
    );
}

#[tokio::test]
async fn a_snapshot_has_hours() {
    let vmm = serve().await;
    let client = Client::connect(vmm.port, &vmm.secret).await.unwrap();
    let request = SnapshotRequest::new(
        Destination::files("/s", "/m"),
        AfterSnapshot::Resume(GuestClock::StandStill),
    );
    let given = client.snapshot(request).await.unwrap().total_us;
    assert!(given > 3_600_000_000, "{given} us");
}

#[tokio::test]
async fn who_does_not_know_the_secret_is_not_served() {
    let vmm = serve().await;
    let refused = Client::connect(vmm.port, &Secret::random().unwrap()).await;
    assert!(matches!(refused, Err(ClientError::Handshake { .. })));
    let mut stranger = TcpStream::connect((Ipv4Addr::LOCALHOST, vmm.port))
        .await
        .unwrap();
    stranger.write_all(&[b'G'; 40]).await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(BOUND, stranger.read_to_end(&mut answer))
        .await
        .expect("the connection is closed");
    assert_eq!(answer, b"");
    Client::connect(vmm.port, &vmm.secret).await.unwrap();
}

#[tokio::test]
async fn peers_that_say_nothing_are_hung_up_on_and_keep_nobody_out() {
    let vmm = serve().await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        let peer = TcpStream::connect((Ipv4Addr::LOCALHOST, vmm.port)).await;
        silent.push(peer.unwrap());
    }
    let client = Client::connect(vmm.port, &vmm.secret).await.unwrap();
    assert_eq!(client.status().await.unwrap().pid, 7);
    for mut peer in silent {
        let heard = timeout(BOUND, peer.read(&mut [0])).await;
        // Nothing, or that there is nobody any more.
        assert_eq!(heard.expect("it is hung up on").unwrap_or(0), 0);
    }
    assert_eq!(client.status().await.unwrap().pid, 7);
}

#[tokio::test]
async fn who_does_not_answer_is_not_taken_for_dead() {
    let frozen = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = frozen.local_addr().unwrap().port();
    let silent = Client::connect(port, &Secret::random().unwrap()).await;
    assert!(matches!(silent, Err(ClientError::Silent { .. })));
}

#[tokio::test]
async fn nobody_listens_on_a_closed_port() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let refused = Client::connect(port, &Secret::random().unwrap()).await;
    assert!(matches!(refused, Err(ClientError::Connect { .. })));
}

#[tokio::test]
async fn a_vmm_that_dies_is_noticed_by_who_waits_for_its_answer() {
    let vmm = serve().await;
    let client = Client::connect(vmm.port, &vmm.secret).await.unwrap();
    let entered = vmm.service.entered.clone();
    let waiting = tokio::spawn(async move { client.resume(GuestClock::StandStill).await });
    timeout(BOUND, entered.notified()).await.unwrap();
    vmm.server.abort();
    let answer = timeout(BOUND, waiting).await.unwrap().unwrap();
    assert!(matches!(answer, Err(ClientError::Lost(_))), "{answer:?}");
}

#[tokio::test]
async fn a_panic_ends_one_connection_only() {
    let vmm = serve().await;
    let client = Client::connect(vmm.port, &vmm.secret).await.unwrap();
    assert!(matches!(client.metrics().await, Err(ClientError::Lost(_))));
    let client = Client::connect(vmm.port, &vmm.secret).await.unwrap();
    client.status().await.unwrap();
}

#[tokio::test]
async fn the_answer_to_stop_arrives_although_the_server_ends() {
    let vmm = serve().await;
    let client = Client::connect(vmm.port, &vmm.secret).await.unwrap();
    let _idle = Client::connect(vmm.port, &vmm.secret).await.unwrap();
    client.stop().await.unwrap();
    timeout(BOUND, vmm.server).await.unwrap().unwrap();
}

/// The record of the process `child`, which says that its service is that of `vmm`.
fn record_of(child: &Child, vmm: &Running) -> Record {
    Record {
        process: ProcessId::alive(child.id().unwrap()).unwrap().unwrap(),
        port: vmm.port,
        secret: vmm.secret.clone(),
        origin: Origin::Restore(Source::files("/s", "/m")),
        console: Console::Terminal,
        vcpus: 2,
        memory_mib: 256,
    }
}

fn sleep(seconds: &str) -> Child {
    Command::new("sleep").arg(seconds).spawn().unwrap()
}

#[tokio::test]
async fn a_vmm_that_does_not_stop_when_asked_is_killed() {
    let vmm = serve().await;
    // A process that lives on although its service, which is not in it, says that it stops.
    let mut child = sleep("1000");
    let record = record_of(&child, &vmm);
    let stopped = control::stop(&record, Duration::from_millis(200)).await;
    assert_eq!(stopped.unwrap(), Stopped::Killed);
    timeout(BOUND, vmm.server).await.unwrap().unwrap();
    child.wait().await.unwrap();
    let again = control::stop(&record, BOUND).await.unwrap();
    assert_eq!(again, Stopped::OnRequest);
}

#[tokio::test]
async fn a_vmm_that_is_just_ending_by_itself_is_not_killed() {
    let vmm = serve().await;
    // Nobody listens any more, or whoever does refuses.
    let other = Secret::random().unwrap();
    for (port, secret) in [(1, vmm.secret.clone()), (vmm.port, other)] {
        let mut child = sleep("1");
        let record = Record {
            port,
            secret,
            ..record_of(&child, &vmm)
        };
        let stopped = control::stop(&record, BOUND).await;
        assert_eq!(stopped.unwrap(), Stopped::OnRequest);
        assert!(child.wait().await.unwrap().success());
    }
    // Not for ever.
    let child = sleep("1000");
    let record = Record {
        port: 1,
        ..record_of(&child, &vmm)
    };
    let stopped = control::stop(&record, Duration::from_millis(200)).await;
    assert_eq!(stopped.unwrap(), Stopped::Killed);
}

#[tokio::test]
async fn a_vmm_that_does_not_answer_is_killed_without_a_further_wait() {
    let vmm = serve().await;
    // Who connects waits, as for a VMM that is frozen.
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let mut child = sleep("1000");
    let record = Record {
        port: silent.local_addr().unwrap().port(),
        ..record_of(&child, &vmm)
    };
    let stopped = timeout(BOUND, control::stop(&record, 2 * BOUND)).await;
    assert_eq!(stopped.unwrap().unwrap(), Stopped::Killed);
    child.wait().await.unwrap();
}

#[tokio::test]
async fn what_nobody_waits_for_any_more_is_dropped() {
    let vmm = serve().await;
    // With a runtime of its own, so that it can say nothing when it ends.
    let (port, secret) = (vmm.port, vmm.secret.clone());
    let (entered, dropped) = (vmm.service.entered.clone(), vmm.service.dropped.clone());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let client = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let client = Client::connect(port, &secret).await.unwrap();
            tokio::select! {
                _ = client.resume(GuestClock::StandStill) => panic!("it was answered"),
                _ = stopped => {}
            }
        });
    });
    timeout(BOUND, entered.notified()).await.unwrap();
    stop.send(()).unwrap();
    timeout(BOUND, dropped.notified()).await.unwrap();
    client.join().unwrap();
}
