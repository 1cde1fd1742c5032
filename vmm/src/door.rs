//! Where clients come in: the control channel's port, which is there before its machine.

use std::{io, net::TcpListener, thread};

use control::Secret;
use tokio::{runtime::Runtime, sync::oneshot};

use crate::service::Service;

/// A free loopback port that nobody serves yet; who connects waits.
#[derive(Debug)]
pub(crate) struct Door {
    runtime: Runtime,
    listener: tokio::net::TcpListener,
    port: u16,
}

impl Door {
    pub(crate) fn new() -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            // There is room for 1024 otherwise, for a handful of connections.
            .max_io_events_per_tick(16)
            .build()?;
        let listener = {
            let _entered = runtime.enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        Ok(Self {
            runtime,
            listener,
            port,
        })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Serves the control channel on a thread of its own, until `closed`.
    pub(crate) fn serve(
        self,
        secret: Secret,
        service: Service,
        closed: oneshot::Receiver<()>,
    ) -> io::Result<thread::JoinHandle<()>> {
        let Self {
            runtime, listener, ..
        } = self;
        thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || {
                runtime.block_on(control::serve(listener, secret, service, async {
                    // Closed by dropping the other end.
                    let _ = closed.await;
                }));
            })
    }
}
