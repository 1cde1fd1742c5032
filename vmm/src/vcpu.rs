//! The thread of one vCPU: an enum of commands in, acknowledgements out.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, SyncSender, TryRecvError, sync_channel},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use devices::{Bus, Run};
use hypervisor::{BoundVcpu, ClockStart, HostTsc, IoHandler, Kick, Ran, Vcpu, VcpuState};

use crate::{awake, metrics::ExitCounts, urgent::Urgent};

/// What a vCPU's thread is told. A kick has to follow, or the thread may not look, unless it is held or parked.
#[derive(Debug)]
pub(crate) enum Command {
    /// Run the guest, from when its clock goes on.
    Run(ClockStart),
    /// As [`Command::Run`], of one that is held; it is not acknowledged, and one that cannot run ends the guest.
    Go(ClockStart),
    /// Hold it, and stop its clock; if `urgent`, with the priority that its thread was given.
    Hold { urgent: bool },
    /// Read its state, with its clock as it was then; only while it is held.
    Save(HostTsc),
    /// Have its thread wake up while it is held; and be awake for what comes next, if that pays.
    Wake { awake: bool },
    /// Hold it, and leave its clock alone, which is set anew anyway; and have its thread be awake for what comes next, if that pays.
    Stop { awake: bool },
    /// Make it what it was when it was restored from the state of its number, while it is held. As above.
    Reset {
        states: Arc<[VcpuState]>,
        awake: bool,
    },
    /// End the thread; and if it `leaves` its vCPU, have that end with the process.
    End { leaves: bool },
}

/// A command with the number of the round it belongs to, which its acknowledgement repeats: an answer
/// that comes after its round was given up is not taken for one of the next.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) round: u64,
    pub(crate) command: Command,
}

/// What a vCPU's thread answers: which vCPU, in which round, and what it has done.
#[derive(Debug)]
pub(crate) struct Acknowledgement {
    pub(crate) vcpu: u32,
    pub(crate) round: u64,
    pub(crate) done: Done,
}

/// What a vCPU has done.
#[derive(Debug)]
pub(crate) enum Done {
    /// It runs, or could not.
    Running(Result<(), hypervisor::Error>),
    /// It is held, and nothing an exit began is left undone; when its clock was stopped, or why it could not be.
    Held(Result<HostTsc, hypervisor::Error>),
    /// Its state.
    Saved(Result<Box<VcpuState>, hypervisor::Error>),
    /// Its thread has woken up.
    Awake,
    /// It is held, and its clock goes on.
    Stopped,
    /// It is held, and what it was.
    Reset(Result<(), hypervisor::Error>),
    /// The thread is about to end.
    Ended,
}

/// How a guest ends by itself, seen from a vCPU.
#[derive(Debug)]
pub(crate) enum VcpuEnd {
    /// A triple fault.
    TripleFault,
    /// KVM cannot run it.
    Failed(hypervisor::Error),
    /// Its thread panicked.
    Panicked,
}

/// Who answers the guest's port and memory-mapped accesses.
#[derive(Debug)]
pub(crate) struct Buses {
    pub(crate) ports: Bus,
    pub(crate) mmio: Bus,
    /// What the guest says by a port of the run that it is in.
    pub(crate) run: Arc<Run>,
}

/// Nobody there: a read gives all ones, which KVM's buffer holds already, and a write goes nowhere.
impl IoHandler for Buses {
    fn port_in(&self, port: u16, data: &mut [u8]) {
        self.ports.read(u64::from(port), data);
    }

    fn port_out(&self, port: u16, data: &[u8]) {
        self.ports.write(u64::from(port), data);
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.mmio.read(gpa, data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.mmio.write(gpa, data);
    }
}

/// What a vCPU's thread works with.
pub(crate) struct VcpuThread {
    pub(crate) orders: Receiver<Order>,
    pub(crate) acknowledgements: Sender<Acknowledgement>,
    pub(crate) on_end: Arc<dyn Fn(u32, VcpuEnd) + Send + Sync>,
    /// Told whenever it has parked.
    pub(crate) on_parked: Arc<dyn Fn() + Send + Sync>,
    /// It is out of the guest and looks for orders, because a run is done: from before it tells of that until who lets it run says
    /// otherwise.
    pub(crate) parked: Arc<AtomicBool>,
    pub(crate) buses: Arc<Buses>,
    pub(crate) exits: Arc<ExitCounts>,
}

/// What a vCPU's thread is doing.
enum State {
    /// It is held; with priority, if the guest may stand still for what it is told next.
    Held(Option<Urgent>),
    /// It is held, and is told something else within so long; with priority as above.
    Awake(Duration, Option<Urgent>),
    Running,
    /// Its guest has said that a run is done, and it waits for what comes next. Nobody has held it: its clock goes on.
    Parked,
    Ended,
    /// It has ended, and its vCPU has not.
    Left,
}

/// A guest must not go on without one of its CPUs: dropped in a panic, this tells of it.
struct TellOfPanic<'a> {
    vcpu: u32,
    on_end: &'a Arc<dyn Fn(u32, VcpuEnd) + Send + Sync>,
}

impl Drop for TellOfPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            (self.on_end)(self.vcpu, VcpuEnd::Panicked);
        }
    }
}

/// A thread that is there before the vCPU that it is to run. If this is dropped instead, it ends.
#[derive(Debug)]
pub(crate) struct WaitingThread {
    work: SyncSender<(VcpuThread, Vcpu)>,
    kick: Receiver<Kick>,
    thread: JoinHandle<()>,
}

impl WaitingThread {
    /// Starts it, for vCPU `id`.
    pub(crate) fn spawn(id: u32) -> io::Result<Self> {
        // Room for one each: other channels take that of thirty at once.
        let (work, received) = sync_channel::<(VcpuThread, Vcpu)>(1);
        let (tell, kick) = sync_channel(1);
        let thread = thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || {
                // Else nobody wants it any more.
                if tell.send(Kick::this_thread()).is_ok()
                    && let Ok((work, vcpu)) = received.recv()
                {
                    work.run(vcpu.bind());
                }
            })?;
        Ok(Self { work, kick, thread })
    }

    /// Has it hold `vcpu` until it is told to run it.
    pub(crate) fn begin(self, work: VcpuThread, vcpu: Vcpu) -> io::Result<(Kick, JoinHandle<()>)> {
        let ended = || io::Error::other("it has ended");
        let kick = self.kick.recv().map_err(|_| ended())?;
        self.work.send((work, vcpu)).map_err(|_| ended())?;
        Ok((kick, self.thread))
    }
}

impl VcpuThread {
    fn run(self, mut vcpu: BoundVcpu) {
        let _told = TellOfPanic {
            vcpu: vcpu.id(),
            on_end: &self.on_end,
        };
        let mut state = State::Held(None);
        loop {
            state = match state {
                State::Held(urgent) => match self.orders.recv() {
                    Ok(order) => self.obey(&mut vcpu, State::Held(urgent), order),
                    // The machine is gone.
                    Err(_) => State::Ended,
                },
                State::Awake(bound, urgent) => match awake::recv(&self.orders, bound) {
                    Ok(order) => self.obey(&mut vcpu, State::Held(urgent), order),
                    Err(TryRecvError::Empty) => State::Held(urgent),
                    Err(TryRecvError::Disconnected) => State::Ended,
                },
                State::Running => self.run_guest(&mut vcpu),
                State::Parked => self.wait_parked(&mut vcpu),
                State::Ended => return,
                State::Left => {
                    std::mem::forget(vcpu);
                    return;
                }
            };
        }
    }

    /// Carries out `order` in state `state`; returns the state after it.
    fn obey(&self, vcpu: &mut BoundVcpu, state: State, order: Order) -> State {
        let Order { round, command } = order;
        let mut start = None;
        let (state, done) = match (command, state) {
            (Command::Run(_), State::Running) => (State::Running, Done::Running(Ok(()))),
            // A priority ends here, before the clock's start is waited for: the guest would see the system call's time pass.
            (Command::Run(clock), _) => match self.start(vcpu, clock) {
                Ok(()) => {
                    start = Some(clock);
                    (State::Running, Done::Running(Ok(())))
                }
                Err(error) => (State::Held(None), Done::Running(Err(error))),
            },
            (Command::Go(clock), _) => {
                if let Err(error) = self.start(vcpu, clock) {
                    (self.on_end)(vcpu.id(), VcpuEnd::Failed(error));
                    return State::Held(None);
                }
                // Who comes late finds more than one order, and the kicks of all of them are behind it.
                if let Ok(order) = self.orders.try_recv() {
                    return self.obey(vcpu, State::Running, order);
                }
                clock.wait();
                return State::Running;
            }
            (Command::Hold { urgent }, state) => {
                let given = urgent.then(Urgent::taken);
                let had = match state {
                    State::Held(had) => had,
                    _ => None,
                };
                (State::Held(given.or(had)), Done::Held(vcpu.stop_clock()))
            }
            (Command::Save(stopped), state) => {
                (state, Done::Saved(vcpu.save(stopped).map(Box::new)))
            }
            (Command::Wake { .. }, State::Running) => (State::Running, Done::Awake),
            (Command::Wake { awake }, state) => {
                let urgent = match state {
                    State::Held(urgent) => urgent,
                    _ => None,
                };
                let state = match awake {
                    // Others may take that long to wake up.
                    true => State::Awake(awake::WAKING, urgent),
                    false => State::Held(urgent),
                };
                (state, Done::Awake)
            }
            (Command::Stop { awake }, _) => (held(awake), Done::Stopped),
            (Command::Reset { states, awake }, _) => {
                (held(awake), Done::Reset(reset(vcpu, &states)))
            }
            (Command::End { leaves: true }, _) => (State::Left, Done::Ended),
            (Command::End { leaves: false }, _) => (State::Ended, Done::Ended),
        };
        self.acknowledge(vcpu, round, done);
        if let Some(start) = start {
            // Behind the acknowledgement: to wake up who waits for it takes longer than to enter the guest, and the
            // guest would see that time pass.
            start.wait();
        }
        state
    }

    /// Has its clock go on, which is all that it takes to run.
    fn start(&self, vcpu: &mut BoundVcpu, clock: ClockStart) -> Result<(), hypervisor::Error> {
        vcpu.excuse_hold(&clock);
        vcpu.start_clock(clock)
    }

    /// Runs the guest until it is kicked, and looks for a command then and only then: only a vCPU
    /// that came back from a kick has finished what its last exit began.
    fn run_guest(&self, vcpu: &mut BoundVcpu) -> State {
        loop {
            match vcpu.run(&*self.buses) {
                Ok(Ran::Port) => {
                    self.exits.port.add(1);
                    if self.buses.run.result().is_some() {
                        // What this exit began must be finished before anything else is made of the vCPU, as for any order.
                        vcpu.come_back();
                    }
                }
                Ok(Ran::Mmio) => self.exits.mmio.add(1),
                Ok(Ran::Kicked) => {
                    self.exits.kicked.add(1);
                    match self.orders.try_recv() {
                        Ok(order) => match self.obey(vcpu, State::Running, order) {
                            State::Running => {}
                            other => return other,
                        },
                        Err(TryRecvError::Empty) => {
                            if self.buses.run.result().is_some() {
                                return State::Parked;
                            }
                            // Kicked once too often.
                        }
                        Err(TryRecvError::Disconnected) => return State::Ended,
                    }
                }
                Ok(Ran::TripleFault) => {
                    (self.on_end)(vcpu.id(), VcpuEnd::TripleFault);
                    return State::Held(None);
                }
                Err(error) => {
                    (self.on_end)(vcpu.id(), VcpuEnd::Failed(error));
                    return State::Held(None);
                }
            }
        }
    }

    /// Tells that it does nothing more, and waits to be told something.
    fn wait_parked(&self, vcpu: &mut BoundVcpu) -> State {
        // Before anybody hears of it who would tell it something without a kick.
        self.parked.store(true, Ordering::SeqCst);
        (self.on_parked)();
        let order = self.orders.recv();
        // Who lets it run has said so too, but perhaps before this one parked. Before it answers, so that the next order takes a kick.
        self.parked.store(false, Ordering::SeqCst);
        match order {
            Ok(order) => self.obey(vcpu, State::Held(None), order),
            Err(_) => State::Ended,
        }
    }

    fn acknowledge(&self, vcpu: &BoundVcpu, round: u64, done: Done) {
        // Nobody listens any more when the machine is being dropped.
        let _ = self.acknowledgements.send(Acknowledgement {
            vcpu: vcpu.id(),
            round,
            done,
        });
    }
}

fn held(awake: bool) -> State {
    match awake {
        true => State::Awake(awake::AT_ONCE, None),
        false => State::Held(None),
    }
}

fn reset(vcpu: &mut BoundVcpu, states: &[VcpuState]) -> Result<(), hypervisor::Error> {
    let state = states.iter().find(|state| state.id == vcpu.id());
    let missing = hypervisor::Error::Missing("the state of each vCPU");
    vcpu.reset(state.ok_or(missing)?)
}
