//! The life of a VMM process.

use std::{
    io::{self, Read},
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Sender, channel},
    },
    thread,
    time::Instant,
};

use control::{
    Exit, Failure, FailureKind, LaunchSpec, Launched, Origin, ProcessId, Record, Registry, Secret,
};
use hypervisor::install_kick_handler;
use tokio::sync::oneshot;

use crate::{
    console,
    controller::{Controller, Event},
    error::Error,
    lifecycle::{self, Lifecycle},
    machine::{Listeners, Machine},
    place,
    service::Service,
};

/// A spec has a few paths and a command line.
const MAX_SPEC_BYTES: u64 = 1 << 20;

/// Reads a launch spec to its end.
///
/// # Errors
///
/// When `input` cannot be read or is not a spec.
pub fn read_spec(input: impl Read) -> io::Result<LaunchSpec> {
    let mut json = Vec::new();
    input.take(MAX_SPEC_BYTES).read_to_end(&mut json)?;
    Ok(serde_json::from_slice(&json)?)
}

/// Makes the machine of `spec`, lets it run, and serves its control channel until it ends.
/// `launched` is called once, when the machine runs and can be reached, or has failed to.
pub fn run(spec: LaunchSpec, launched: impl FnOnce(&Launched)) -> Exit {
    allow_many_files();
    match start(spec) {
        Ok(started) => {
            launched(&Launched::Ready { port: started.port });
            started.finish()
        }
        Err(failure) => {
            tracing::error!("the machine cannot be started: {failure}");
            launched(&Launched::Failed(failure));
            Exit::Failed
        }
    }
}

/// A disk that branches is one file for each layer: takes as many as this process may have.
fn allow_many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(e) = setrlimit(Resource::Nofile, most) {
        tracing::debug!("the limit of open files stays as it is: {e}");
    }
}

/// A machine that runs and can be reached.
struct Started {
    port: u16,
    controller: Controller,
    /// Tells the control channel to close.
    shutdown: oneshot::Sender<()>,
    server: thread::JoinHandle<()>,
    // Dropped last of all: while it is there, clients find the machine.
    registration: control::Registration,
}

fn start(spec: LaunchSpec) -> Result<Started, Failure> {
    let begun = Instant::now();
    install_kick_handler().map_err(|e| host("SIGRTMIN cannot be handled", &e))?;
    let (events, received) = channel();
    let ending = Arc::new(AtomicBool::new(false));
    let mut machine = make(&spec, &listeners(&events, &ending))?;
    let lifecycle = Arc::new(Lifecycle::new());
    // Before anybody can ask for anything else.
    if !spec.paused {
        machine.run(spec.clock)?;
        lifecycle.apply(lifecycle::Event::Resume)?;
    }
    let service = Service {
        lifecycle: Arc::clone(&lifecycle),
        events,
        counters: Arc::clone(machine.counters()),
        vcpus: machine.vcpu_count(),
        memory_mib: machine.memory().layout().bytes() >> 20,
        begun,
    };
    let (vcpus, memory_mib) = (service.vcpus, service.memory_mib);
    let (shutdown, closed) = oneshot::channel();
    let (port, server) = serve(spec.secret.clone(), service, closed)
        .map_err(|e| host("the control channel cannot be opened", &e))?;
    let process = ProcessId::current().map_err(|e| host("the machine cannot be registered", &e))?;
    let registration = Registry::open(&spec.registry)
        .and_then(|registry| {
            registry.register(&Record {
                process,
                port,
                secret: spec.secret,
                origin: spec.origin,
                console: spec.console,
                vcpus,
                memory_mib,
            })
        })
        .map_err(|e| host("the machine cannot be registered", &e))?;
    Ok(Started {
        port,
        controller: Controller {
            machine,
            lifecycle,
            events: received,
            ending,
        },
        shutdown,
        server,
        registration,
    })
}

impl Started {
    fn finish(self) -> Exit {
        let Self {
            port: _,
            controller,
            shutdown,
            server,
            registration,
        } = self;
        let exit = controller.run();
        // The server gives its last answers; then nobody can find the machine any more.
        drop(shutdown);
        if server.join().is_err() {
            tracing::error!("the control channel ended in a panic");
        }
        drop(registration);
        tracing::info!(?exit, "the machine has ended");
        exit
    }
}

fn make(spec: &LaunchSpec, listeners: &Listeners) -> Result<Machine, Failure> {
    let console = console::open(&spec.console).map_err(Error::Console)?;
    match &spec.origin {
        Origin::Boot(config) => {
            let confinement = spec.confinement.as_ref();
            Ok(Machine::boot(config, confinement, console, listeners)?)
        }
        Origin::Restore(source) => {
            let saved = place::open(source)?;
            Ok(Machine::restore(saved, spec, console, listeners)?)
        }
    }
}

/// Has what the guest does end up in the controller's queue, and known before it is read from there.
fn listeners(events: &Sender<Event>, ending: &Arc<AtomicBool>) -> Listeners {
    let tell = |events: &Sender<Event>, ending: &AtomicBool, event| {
        ending.store(true, Ordering::SeqCst);
        // The controller has ended, and so will the guest.
        let _ = events.send(event);
    };
    let (guest, vcpus) = (events.clone(), events.clone());
    let (by_guest, by_vcpus) = (Arc::clone(ending), Arc::clone(ending));
    Listeners {
        requests: Arc::new(move |request| tell(&guest, &by_guest, Event::Guest(request))),
        end: Arc::new(move |id, end| tell(&vcpus, &by_vcpus, Event::Vcpu(id, end))),
    }
}

/// Serves the control channel on a free loopback port, on a thread of its own, until `closed`.
fn serve(
    secret: Secret,
    service: Service,
    closed: oneshot::Receiver<()>,
) -> io::Result<(u16, thread::JoinHandle<()>)> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    listener.set_nonblocking(true)?;
    let port = listener.local_addr()?.port();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    let listener = {
        let _entered = runtime.enter();
        tokio::net::TcpListener::from_std(listener)?
    };
    let thread = thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || {
            runtime.block_on(control::serve(listener, secret, service, async {
                // Closed by dropping the other end.
                let _ = closed.await;
            }));
        })?;
    Ok((port, thread))
}

fn host(what: &str, error: &dyn std::fmt::Display) -> Failure {
    Failure {
        kind: FailureKind::Host,
        message: format!("{what}: {error}"),
    }
}
