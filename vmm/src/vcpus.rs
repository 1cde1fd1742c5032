//! All vCPUs of a machine, as one: told together, counted together.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use hypervisor::{ClockStart, HostTsc, Kick, Vcpu, VcpuState};

use crate::{
    awake,
    metrics::ExitCounts,
    urgent::Urgent,
    vcpu::{Acknowledgement, Buses, Command, Done, Order, VcpuEnd, VcpuThread, WaitingThread},
};

/// How long all vCPUs together may take to acknowledge. A host under load, or a hypervisor under this
/// one, may keep a thread off its CPU for seconds; a minute means that it does not come back.
pub(crate) const BOUND: Duration = Duration::from_secs(60);

/// How long they may take to end with their process, which ends them anyway: one that waits for memory that cannot be had may
/// not answer.
const END_BOUND: Duration = Duration::from_secs(5);

/// Why the vCPUs could not be told something.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("vCPUs {0:?} do not answer after {bound} s; the host is overloaded or its KVM is stuck", bound = .1.as_secs())]
    NoAnswer(Vec<u32>, Duration),
    #[error("a thread for vCPU {0} cannot be started: {1}; the host is out of threads")]
    Thread(u32, std::io::Error),
    #[error(transparent)]
    Kvm(#[from] hypervisor::Error),
}

/// The threads of a machine's vCPUs.
#[derive(Debug)]
pub(crate) struct Vcpus {
    vcpus: Vec<Handle>,
    acknowledgements: Receiver<Acknowledgement>,
    round: u64,
    /// All of them are known to be held, and look for orders without being kicked.
    held: bool,
    /// What they answer comes within so long, and is waited for without sleeping.
    awake: Option<Duration>,
    /// They end with the process.
    left: bool,
}

#[derive(Debug)]
struct Handle {
    id: u32,
    orders: Sender<Order>,
    kick: Kick,
    thread: Option<JoinHandle<()>>,
    parked: Arc<AtomicBool>,
}

impl Handle {
    /// Whether its thread is still the one with its id.
    fn lives(&self) -> bool {
        self.thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
    }

    /// Whether it looks for orders without being kicked, because a run is done.
    fn is_parked(&self) -> bool {
        self.parked.load(Ordering::SeqCst)
    }
}

impl Vcpus {
    /// Has each of `vcpus` be on its thread; all are held. `on_end` is told when a guest ends by
    /// itself, `on_parked` whenever one has come back because a run is done, and waits.
    pub(crate) fn start(
        vcpus: Vec<(Vcpu, WaitingThread)>,
        buses: &Arc<Buses>,
        exits: &Arc<ExitCounts>,
        on_end: &Arc<dyn Fn(u32, VcpuEnd) + Send + Sync>,
        on_parked: &Arc<dyn Fn() + Send + Sync>,
    ) -> Result<Self, Error> {
        let (sender, acknowledgements) = channel();
        let mut started = Self {
            vcpus: Vec::new(),
            acknowledgements,
            round: 0,
            held: true,
            awake: None,
            left: false,
        };
        for (vcpu, thread) in vcpus {
            let id = vcpu.id();
            let (orders, receiver) = channel();
            let parked = Arc::new(AtomicBool::new(false));
            let work = VcpuThread {
                orders: receiver,
                acknowledgements: sender.clone(),
                on_end: Arc::clone(on_end),
                on_parked: Arc::clone(on_parked),
                parked: Arc::clone(&parked),
                buses: Arc::clone(buses),
                exits: Arc::clone(exits),
            };
            let begun = thread.begin(work, vcpu);
            let (kick, thread) = begun.map_err(|e| Error::Thread(id, e))?;
            started.vcpus.push(Handle {
                id,
                orders,
                kick,
                thread: Some(thread),
                parked,
            });
        }
        Ok(started)
    }

    /// Holds all of them, within `bound`, and before others who compute if `urgent`, as the caller then is. When it returns, none is in the guest and none has anything undone; it tells when the clock of
    /// the last was stopped. When it fails, those that answered are held: [`Vcpus::go`] undoes that.
    pub(crate) fn hold(&mut self, bound: Duration, urgent: bool) -> Result<HostTsc, Error> {
        let called = HostTsc::now();
        // One of them may wait for a CPU while the others stand still already.
        self.tell(|vcpu| Command::Hold {
            urgent: urgent && vcpu.lives() && Urgent::give(vcpu.kick.thread()),
        });
        let mut last = called;
        for (_, done) in self.gather(bound)? {
            if let Done::Held(stopped) = done {
                last = last.max(stopped?);
            }
        }
        self.held = true;
        Ok(last)
    }

    /// Lets all of them run. Clocks that were stopped go on as `start` says.
    pub(crate) fn run(&mut self, start: ClockStart) -> Result<(), Error> {
        self.none_is_parked();
        self.tell(|_| Command::Run(start));
        self.held = false;
        let told = self.gather(BOUND);
        self.awake = None;
        for (_, done) in told? {
            if let Done::Running(result) = done {
                result?;
            }
        }
        Ok(())
    }

    /// As [`Vcpus::run`], without waiting until they have heard of it: a guest of which one cannot run ends. One that has not come back
    /// from a hold that was given up is told behind that.
    pub(crate) fn go(&mut self, start: ClockStart) {
        self.none_is_parked();
        self.tell(|_| Command::Go(start));
        self.held = false;
        self.awake = None;
    }

    /// Wakes all of them up, which are held and are let run at once then.
    pub(crate) fn wake(&mut self) -> Result<(), Error> {
        let awake = awake::pays(self.vcpus.len());
        self.awake = awake.then_some(awake::WAKING);
        self.tell(|_| Command::Wake { awake });
        self.gather(BOUND)?;
        self.awake = awake.then_some(awake::AT_ONCE);
        Ok(())
    }

    /// They are about to be let run. Nobody but who tells them so may say so: the next order may come before they have heard of this one, and
    /// takes a kick then.
    fn none_is_parked(&self) {
        for vcpu in &self.vcpus {
            vcpu.parked.store(false, Ordering::SeqCst);
        }
    }

    /// Whether one has come back because a run is done, and waits.
    pub(crate) fn is_any_parked(&self) -> bool {
        self.vcpus.iter().any(Handle::is_parked)
    }

    /// Reads the state of all of them, by number, their clocks as they were at `stopped`. They must be held.
    pub(crate) fn save(&mut self, stopped: HostTsc) -> Result<Vec<VcpuState>, Error> {
        self.tell(|_| Command::Save(stopped));
        let mut states = Vec::new();
        for (_, done) in self.gather(BOUND)? {
            if let Done::Saved(state) = done {
                states.push(*state?);
            }
        }
        states.sort_by_key(|state| state.id);
        Ok(states)
    }

    /// Holds all of them, and leaves their clocks alone: they are to be reset. If `awake`, what comes next comes at once, and is waited for
    /// without sleeping if that pays.
    pub(crate) fn stop(&mut self, awake: bool) -> Result<(), Error> {
        let awake = awake && awake::pays(self.vcpus.len());
        self.awake = awake.then_some(awake::AT_ONCE);
        if !self.held && !self.vcpus.iter().all(Handle::is_parked) {
            self.tell(|_| Command::Stop { awake });
            self.gather(BOUND)?;
        }
        self.held = true;
        Ok(())
    }

    /// Makes all of them, which were stopped, what they were when they were restored from `states`; their clocks are stopped as they were
    /// then. When it fails, they are in no known state.
    pub(crate) fn reset(&mut self, states: &Arc<[VcpuState]>) -> Result<(), Error> {
        let awake = self.awake.is_some();
        self.tell(|_| Command::Reset {
            states: Arc::clone(states),
            awake,
        });
        for (_, done) in self.gather(BOUND)? {
            if let Done::Reset(reset) = done {
                reset?;
            }
        }
        Ok(())
    }

    /// Has their threads end without them, as not all memory is there. KVM may wait for a page on behalf of a guest that goes on meanwhile, and
    /// when the last vCPU ends it waits for that to be over, where nothing can kill it: for good, as the process that has the page come
    /// would be the one that waits. What is still mapped ends only once that process has let go of its memory.
    pub(crate) fn leave(&mut self) {
        self.left = true;
    }

    /// Begins a round: gives all of them a command, and a kick so that they look, unless they wait for one.
    fn tell(&mut self, command: impl Fn(&Handle) -> Command) {
        self.round += 1;
        for vcpu in &self.vcpus {
            // A thread that has ended does not answer either, and is named for that.
            let _ = vcpu.orders.send(Order {
                round: self.round,
                command: command(vcpu),
            });
            // Looked at behind the order: one that has parked since finds it, one that has not is kicked.
            if !self.held && !vcpu.is_parked() {
                vcpu.kick.kick();
            }
        }
    }

    /// Ends a round: collects one acknowledgement of each vCPU, within `bound`.
    fn gather(&self, bound: Duration) -> Result<Vec<(u32, Done)>, Error> {
        let deadline = Instant::now() + bound;
        let mut answers: Vec<(u32, Done)> = Vec::with_capacity(self.vcpus.len());
        while answers.len() < self.vcpus.len() {
            let left = || deadline.saturating_duration_since(Instant::now());
            let asleep = || self.acknowledgements.recv_timeout(left());
            let received = match self.awake {
                Some(bound) => awake::recv(&self.acknowledgements, bound).or_else(|_| asleep()),
                None => asleep(),
            };
            match received {
                Ok(Acknowledgement { vcpu, round, done }) if round == self.round => {
                    answers.push((vcpu, done));
                }
                // Of a round that was given up.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let answered = |id: &u32| answers.iter().any(|(vcpu, _)| vcpu == id);
                    let ids = self.vcpus.iter().map(|vcpu| vcpu.id);
                    let silent = ids.filter(|id| !answered(id)).collect();
                    return Err(Error::NoAnswer(silent, bound));
                }
            }
        }
        Ok(answers)
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        let leaves = self.left;
        self.tell(|_| Command::End { leaves });
        match self.gather(END_BOUND) {
            Ok(_) => {
                for thread in self.vcpus.iter_mut().filter_map(|vcpu| vcpu.thread.take()) {
                    // It has said that it is about to end.
                    let _ = thread.join();
                }
            }
            Err(error) => tracing::error!("{error}; their threads are left behind"),
        }
    }
}
