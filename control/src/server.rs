//! The VMM's side of the control channel.

use std::{panic::AssertUnwindSafe, time::Duration};

use futures::{FutureExt, StreamExt, stream::FuturesUnordered};
use tarpc::server::{BaseChannel, Channel};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tracing::{error, warn};

use crate::{Secret, Vmm, hung_up::UntilHungUp, strangers::Strangers, wire};

/// How many clients that know the secret a VMM serves at once; more wait in the listen queue.
const MAX_CONNECTIONS: usize = 32;

/// How many requests a connection may have under way at once; more are refused.
const MAX_REQUESTS_PER_CONNECTION: usize = 8;

/// How long open connections are waited for at the end, so that the answer to the request which
/// ended the machine reaches its client.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// How long to hold off when the process cannot accept (it is out of file descriptors, say).
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Offers `service` to every client that knows `secret`, until `shutdown` resolves; then returns
/// once the clients have hung up, or after half a second.
///
/// Connections are served by the calling task: requests take turns where they await, so a service
/// must not block. A request is dropped where it awaits when its client goes away or its deadline
/// passes: what must be carried through belongs in a task or thread of its own.
pub async fn serve<S>(
    listener: TcpListener,
    secret: Secret,
    service: S,
    shutdown: impl Future<Output = ()>,
) where
    S: Vmm + Clone,
{
    let mut strangers = Strangers::new(&secret);
    let mut connections = FuturesUnordered::new();
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(()) = connections.next() => {}
            stream = strangers.known() => connections.push(guarded(service.clone(), stream)),
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => strangers.greet(stream),
                Err(error) => {
                    warn!(%error, "a control connection could not be accepted");
                    sleep(ACCEPT_BACKOFF).await;
                }
            },
        }
    }
    drop((listener, strangers));
    let hung_up = async { while connections.next().await.is_some() {} };
    let _ = timeout(LAST_ANSWERS, hung_up).await;
}

/// Serves one connection. A panic in a request ends its connection, not the machine.
async fn guarded<S: Vmm + Clone>(service: S, stream: TcpStream) {
    let conversation = AssertUnwindSafe(converse(service, stream));
    if conversation.catch_unwind().await.is_err() {
        error!("a control request panicked; its connection is closed");
    }
}

async fn converse<S: Vmm + Clone>(service: S, stream: TcpStream) {
    let (transport, hung_up) = UntilHungUp::new(wire::transport(stream));
    let served = BaseChannel::with_defaults(transport)
        .max_concurrent_requests(MAX_REQUESTS_PER_CONNECTION)
        .execute(service.serve())
        .for_each_concurrent(None, |request| request);
    // The channel alone would go on until what was asked for is answered, to nobody.
    tokio::select! {
        () = served => {}
        _ = hung_up => {}
    }
}
