//! The loop on which devices do what no vCPU waits for.

use std::{
    fmt, io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, RemoteEndpoint, SubscriberOps,
};

use crate::{
    console_input::{ConsoleInput, InputEvents},
    sync::lock,
    virtio::{MmioTransport, QueueEvents, Worker},
};

/// The name of the loop's thread.
pub const THREAD_NAME: &str = "devices";

/// How long a quiesce serves what the guest has made available. What it leaves lies in guest memory
/// and is saved with it.
const DRAIN_TIME: Duration = Duration::from_millis(200);

/// How long one that is dropped is waited for: less than a VMM may take that is asked to stop.
const END_BOUND: Duration = Duration::from_secs(5);

mod gate;
use gate::{Gate, Gated};

type Subscriber = Box<dyn MutEventSubscriber + Send>;
type Workers = Arc<[Arc<Mutex<Worker>>]>;

/// Why the loop could not be started, quiesced or stopped.
#[derive(Debug, thiserror::Error)]
pub enum EventLoopError {
    /// The host refused an epoll instance, an eventfd or a thread.
    #[error("the device event loop cannot start: {0}")]
    Start(#[source] io::Error),
    /// The event manager refused to work.
    #[error("the device event loop cannot use epoll: {0}")]
    Events(#[from] event_manager::Error),
    /// The loop is busy in a device and did not answer in time.
    #[error(
        "thread {THREAD_NAME} did not answer within {0:?}; a disk of this machine is probably slow or hangs"
    )]
    NotAnswering(Duration),
    /// The loop has ended, after an error that is in the log.
    #[error("thread {THREAD_NAME} has ended; the log says why")]
    Ended,
}

/// The thread that serves virtqueues and the console's input.
pub struct EventLoop {
    endpoint: RemoteEndpoint<Subscriber>,
    workers: Workers,
    gate: Arc<Gate>,
    stopping: Arc<AtomicBool>,
    /// Releases the loop from the last quiesce.
    release: Mutex<Option<Sender<()>>>,
    ended: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

/// The loop's thread, before it is known what it serves. If this is dropped instead, it ends.
#[derive(Debug)]
pub struct LoopThread {
    work: SyncSender<Loop>,
    thread: JoinHandle<()>,
}

/// What the thread does.
struct Loop {
    manager: EventManager<Subscriber>,
    workers: Workers,
    gate: Arc<Gate>,
    stopping: Arc<AtomicBool>,
    released: Receiver<()>,
    /// Dropped when the thread ends, in whatever way: that is the signal.
    _end: Sender<()>,
}

/// The loop stands still: nothing of the devices changes guest memory or themselves, and their locks
/// are free. When it is dropped the loop goes on, and first looks at all queues.
#[must_use = "the loop goes on when this is dropped"]
pub struct Quiesced(StandsStill);

impl fmt::Debug for Quiesced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Quiesced").finish_non_exhaustive()
    }
}

/// What keeps the loop from going on.
enum StandsStill {
    /// It waits to be released.
    Waits(Sender<()>),
    /// It is not let in to the devices.
    Out(Arc<Gate>, RemoteEndpoint<Subscriber>, Workers),
}

impl Drop for Quiesced {
    fn drop(&mut self) {
        match &self.0 {
            // It fails when the loop has been stopped meanwhile.
            StandsStill::Waits(release) => drop(release.send(())),
            StandsStill::Out(gate, endpoint, workers) => {
                // While their locks are free.
                let active = workers.iter().any(|worker| lock(worker).is_active());
                gate.open();
                if active {
                    let (gate, workers) = (Arc::clone(gate), Arc::clone(workers));
                    // As above. By the gate, which may be closed again before the loop comes to it.
                    let _ = endpoint.fire(move |_| gate.pass(|| look_at_all(&workers)));
                }
            }
        }
    }
}

/// What the loop is just at: requests that it has begun and not done.
#[derive(Clone, Debug)]
pub struct InHand(Arc<Gate>);

impl InHand {
    /// Waits until all is done that is in hand now; says whether it is within `bound`. The loop goes on meanwhile, and then.
    #[must_use = "it may not be done"]
    pub fn is_done_within(&self, bound: Duration) -> bool {
        self.0.wait_until_out(bound)
    }
}

impl EventLoop {
    /// Starts the loop for `transports` and, if there is one, `input`. It starts quiesced, so that
    /// devices can be restored before any of them moves.
    ///
    /// # Errors
    ///
    /// [`EventLoopError::Start`], [`EventLoopError::Events`].
    pub fn spawn(
        transports: &[Arc<Mutex<MmioTransport>>],
        input: Option<ConsoleInput>,
    ) -> Result<(Self, Quiesced), EventLoopError> {
        Self::start_on(LoopThread::spawn()?, transports, input)
    }

    /// The same, on a thread that is there already.
    ///
    /// # Errors
    ///
    /// As above; [`EventLoopError::Ended`].
    pub fn start_on(
        thread: LoopThread,
        transports: &[Arc<Mutex<MmioTransport>>],
        input: Option<ConsoleInput>,
    ) -> Result<(Self, Quiesced), EventLoopError> {
        let workers: Workers = transports
            .iter()
            .map(|transport| Arc::clone(lock(transport).worker()))
            .collect();
        let mut manager = EventManager::<Subscriber>::new()?;
        let gate = Arc::new(Gate::default());
        let gated = |subscriber| {
            let gate = Arc::clone(&gate);
            Box::new(Gated { gate, subscriber })
        };
        for worker in workers.iter() {
            let events = QueueEvents::new(Arc::clone(worker));
            manager.add_subscriber(gated(Box::new(events)));
        }
        if let Some(input) = input {
            let events = InputEvents::new(input).map_err(EventLoopError::Start)?;
            manager.add_subscriber(gated(Box::new(events)));
        }
        let endpoint = manager.remote_endpoint();
        let stopping = Arc::new(AtomicBool::new(false));
        let (release, released) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let work = Loop {
            manager,
            workers: Arc::clone(&workers),
            gate: Arc::clone(&gate),
            stopping: Arc::clone(&stopping),
            released,
            _end: end,
        };
        let begun = thread.work.send(work);
        begun.map_err(|_| EventLoopError::Ended)?;
        let event_loop = Self {
            endpoint,
            workers,
            gate,
            stopping,
            release: Mutex::new(Some(release.clone())),
            ended,
            thread: Some(thread.thread),
        };
        Ok((event_loop, Quiesced(StandsStill::Waits(release))))
    }

    /// Serves what the guest has made available, and then does nothing until what it returns is
    /// dropped. The vCPUs must have stopped, and the guard of an earlier quiesce must be gone.
    ///
    /// # Errors
    ///
    /// [`EventLoopError::NotAnswering`] when that takes longer than `timeout`, also what a device does beside the loop, whereupon the
    /// loop goes on; [`EventLoopError::Ended`].
    pub fn quiesce(&self, timeout: Duration) -> Result<Quiesced, EventLoopError> {
        let (acknowledge, acknowledged) = mpsc::channel();
        let (release, released) = mpsc::channel();
        let quiesced = Quiesced(StandsStill::Waits(release.clone()));
        // Before the loop hears of it, so that a stop cannot come in between.
        *lock(&self.release) = Some(release);
        let (workers, gate) = (Arc::clone(&self.workers), Arc::clone(&self.gate));
        let deadline = Instant::now() + timeout;
        self.endpoint
            .fire(move |_| {
                let mut is_settled = true;
                let until = deadline.min(Instant::now() + DRAIN_TIME);
                gate.pass(|| is_settled = drain(&workers, until, deadline));
                if acknowledge.send(is_settled).is_ok() && is_settled {
                    stand_still(&released, &workers, &gate);
                }
            })
            .map_err(|_| EventLoopError::Ended)?;
        match acknowledged.recv_timeout(timeout) {
            Ok(true) => Ok(quiesced),
            Ok(false) | Err(RecvTimeoutError::Timeout) => {
                Err(EventLoopError::NotAnswering(timeout))
            }
            Err(RecvTimeoutError::Disconnected) => Err(EventLoopError::Ended),
        }
    }

    /// Has the loop do nothing until what it returns is dropped, as [`EventLoop::quiesce`] does, but at once, and without serving
    /// what the guest has made available: for who takes from it all that it has done. `None` if the loop, or a device beside it, is just
    /// at work. The guard of an earlier one must be gone.
    pub fn halt(&self) -> Option<Quiesced> {
        if !self.gate.close() {
            return None;
        }
        let (gate, workers) = (Arc::clone(&self.gate), Arc::clone(&self.workers));
        let halted = Quiesced(StandsStill::Out(gate, self.endpoint.clone(), workers));
        // The loop is out: nothing can begin now.
        let at_work = |worker: &Arc<Mutex<Worker>>| lock(worker).is_at_work();
        (!self.workers.iter().any(at_work)).then_some(halted)
    }

    /// What the loop has in hand, to be waited for.
    #[must_use]
    pub fn in_hand(&self) -> InHand {
        InHand(Arc::clone(&self.gate))
    }

    /// Ends the loop and waits for it, and for what devices do beside it. A quiesced loop ends without having done anything more.
    ///
    /// # Errors
    ///
    /// [`EventLoopError::NotAnswering`] when that takes longer than `timeout`; the thread then ends
    /// whenever the device it is in lets it.
    pub fn stop(mut self, timeout: Duration) -> Result<(), EventLoopError> {
        self.request_stop();
        let thread = self.thread.take();
        let deadline = Instant::now() + timeout;
        if let Err(RecvTimeoutError::Timeout) = self.ended.recv_timeout(timeout) {
            return Err(EventLoopError::NotAnswering(timeout));
        }
        if !settle(&self.workers, deadline) {
            return Err(EventLoopError::NotAnswering(timeout));
        }
        match thread.map(JoinHandle::join) {
            Some(Err(_)) => Err(EventLoopError::Ended),
            _ => Ok(()),
        }
    }

    fn request_stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.gate.end();
        if let Some(release) = lock(&self.release).take() {
            let _ = release.send(());
        }
        // It fails when the loop has ended by itself.
        let _ = self.endpoint.kick();
    }
}

impl Drop for EventLoop {
    /// Waits for the thread and for what devices do beside it, though not for long: with what they have go files that are there only
    /// while they are, like a vsock device's socket, a disk is left in order, and a process that ends does not wait for its threads.
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.request_stop();
        let deadline = Instant::now() + END_BOUND;
        let ended = self.ended.recv_timeout(END_BOUND);
        let left = matches!(ended, Err(RecvTimeoutError::Timeout));
        // Before the thread, whose end can take as long as the reads that it has begun.
        if !left && settle(&self.workers, deadline) {
            // That it panicked was said.
            drop(thread.join());
        } else {
            tracing::warn!("a thread that serves devices is left behind; a disk is slow or hangs");
        }
    }
}

impl fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventLoop")
            .field("devices", &self.workers.len())
            .finish_non_exhaustive()
    }
}

impl LoopThread {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// [`EventLoopError::Start`].
    pub fn spawn() -> Result<Self, EventLoopError> {
        let (work, received) = mpsc::sync_channel(1);
        let thread = thread::Builder::new()
            .name(THREAD_NAME.to_owned())
            .spawn(move || {
                // Else there is nothing to serve.
                if let Ok(work) = received.recv() {
                    Loop::run(work);
                }
            })
            .map_err(EventLoopError::Start)?;
        Ok(Self { work, thread })
    }
}

impl Loop {
    fn run(mut self) {
        stand_still(&self.released, &self.workers, &self.gate);
        while !self.stopping.load(Ordering::Acquire) {
            if let Err(error) = self.manager.run() {
                tracing::error!(%error, "the device event loop ends");
                return;
            }
        }
    }
}

/// Serves the requests that are available, until there are none or it is `until`, and answers what was begun. Says whether nothing is
/// under way then, which has to be so by `deadline`.
pub(crate) fn drain(workers: &[Arc<Mutex<Worker>>], until: Instant, deadline: Instant) -> bool {
    for worker in workers {
        let mut worker = lock(worker);
        for index in 0..worker.queue_count() {
            worker.serve_until(index, until);
        }
    }
    // All of them before any is waited for: they may wait for the same.
    end_early(workers);
    workers.iter().all(|worker| {
        let mut worker = lock(worker);
        let mut queues = 0..worker.queue_count();
        queues.all(|index| worker.answer(index, deadline))
    })
}

fn end_early(workers: &[Arc<Mutex<Worker>>]) {
    for worker in workers {
        lock(worker).end_early();
    }
}

/// Has what is under way beside the loop end early, and waits until nothing is; says whether that is so by `deadline`.
fn settle(workers: &[Arc<Mutex<Worker>>], deadline: Instant) -> bool {
    end_early(workers);
    workers.iter().all(|worker| lock(worker).settle(deadline))
}

/// Waits until released, and then looks at all queues: the guest may have notified the machine that
/// was saved, whose eventfds are not this one's.
fn stand_still(released: &Receiver<()>, workers: &Workers, gate: &Gate) {
    // An error means that the guard is gone, which releases too. Who has stopped the loop does not let it in.
    let _ = released.recv();
    gate.pass(|| look_at_all(workers));
}

fn look_at_all(workers: &Workers) {
    for worker in workers.iter() {
        let mut worker = lock(worker);
        for index in 0..worker.queue_count() {
            worker.process(index);
        }
    }
}

/// Watches for `events`; what cannot be watched is a device that does not hear of them.
pub(crate) fn watch(ops: &mut EventOps<'_>, events: Events) {
    if let Err(error) = ops.add(events) {
        tracing::warn!(fd = events.fd(), %error, "cannot wait for a device's events");
    }
}

#[cfg(test)]
mod tests;
