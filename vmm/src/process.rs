//! The life of a VMM process.

use std::{
    error::Error as _,
    fs::File,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Instant,
};

use control::{
    Confinement, Errand, Exit, Failure, FailureKind, LaunchSpec, Launched, Origin, ProcessId,
    Record, Registry, RegistryError, Shape, Source, allow_many_files,
};
use hypervisor::install_kick_handler;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::retry_on_intr,
};
use snapshot::{Lost, Snapshot};
use tokio::sync::oneshot;

use crate::{
    console,
    controller::{Controller, Event},
    disks,
    door::Door,
    error::Error,
    frame::Frame,
    lifecycle::{self, Lifecycle},
    limits::confined,
    machine::{Listeners, Machine},
    place,
    service::Service,
    state::DiskState,
    terminal,
};

/// Does `errand` with the descriptor that came with it, and those that follow it on `errands`: makes a machine, lets it run, and
/// serves its control channel until it ends; or writes a hot image. `answer` is called once for each errand, when it is done or has
/// failed, which is the end. It writes to `answers`: if nobody reads from there any more when a machine would begin or has just
/// begun, there is none.
pub fn run(
    errand: Errand,
    with: Option<OwnedFd>,
    errands: impl AsFd,
    answers: impl AsFd,
    answer: impl FnMut(&Launched) + Send + 'static,
) -> Exit {
    allow_many_files();
    let answer = Arc::new(Answer(Mutex::new(Some(Box::new(answer)))));
    match all_done(errand, with, &errands, &answers, &answer) {
        Ok(Done::Machine(started)) => {
            answer.end(&Launched::Ready { port: started.port });
            tracing::debug!("the machine can be reached");
            started.finish()
        }
        Ok(Done::Image(shape)) => {
            answer.end(&Launched::Written(shape));
            Exit::PowerOff
        }
        Ok(Done::CalledOff) => {
            tracing::debug!("what was prepared is not wanted");
            Exit::PowerOff
        }
        Err(failure) => {
            let why = failure.to_string();
            // Who asked says it to whom it concerns; where nobody asks any more, the log does.
            match answer.end(&Launched::Failed(failure)) {
                true => tracing::debug!("{why}"),
                false => tracing::error!("{why}"),
            }
            Exit::Failed
        }
    }
}

type OnAnswer = Box<dyn FnMut(&Launched) + Send>;

/// What is called once for each errand, until one is the last.
struct Answer(Mutex<Option<OnAnswer>>);

impl Answer {
    /// Of an errand that others follow.
    fn give(&self, launched: &Launched) {
        if let Some(answer) = &mut *self.lock() {
            answer(launched);
        }
    }

    /// Of the last: the machine runs, or never will. Whether it had not been given before.
    fn end(&self, launched: &Launched) -> bool {
        let answer = self.lock().take();
        answer.is_some_and(|mut answer| {
            answer(launched);
            true
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<OnAnswer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What errands come to.
enum Done {
    /// A machine runs.
    Machine(Box<Started>),
    /// The image of a machine of this size is written.
    Image(Shape),
    /// Who asked for a machine went away before it was told that it runs. Nothing of it is left, but for disks that were rebuilt
    /// to restore it.
    CalledOff,
}

fn all_done(
    mut errand: Errand,
    mut with: Option<OwnedFd>,
    errands: impl AsFd,
    answers: impl AsFd,
    answer: &Arc<Answer>,
) -> Result<Done, Failure> {
    let mut prepared = None;
    if let Errand::Prepare(shape) = errand {
        prepared = Some(Prepared::new(Some(shape), with)?);
        answer.give(&Launched::Prepared);
        let Ok(next) = control::receive(&errands) else {
            return Ok(Done::CalledOff);
        };
        (errand, with) = next;
    }
    let (spec, at_once) = match errand {
        Errand::Run(spec) => (spec, true),
        Errand::Make(spec) => (spec, false),
        Errand::Image { of, confinement } => {
            return write_image(&of, confinement.as_ref(), with).map(Done::Image);
        }
        Errand::Prepare(_) | Errand::Begin => return Err(Error::OutOfTurn.into()),
    };
    let prepared = match prepared {
        Some(prepared) => prepared,
        None => Prepared::new(None, None)?,
    };
    let made = Made::new(*spec, with, prepared, answer)?;
    if !at_once {
        answer.give(&Launched::Made);
        match control::receive(&errands) {
            Ok((Errand::Begin, _)) => {}
            Ok(_) => return Err(Error::OutOfTurn.into()),
            Err(_) => return Ok(Done::CalledOff),
        }
    }
    // To make it may have taken long, and no word follows by whose absence it would be known.
    if is_gone(&answers) {
        return Ok(Done::CalledOff);
    }
    let started = made.begin()?;
    // To begin takes a while too, and who has not learnt of a machine does not stop it.
    if is_gone(&answers) {
        started.call_off();
        return Ok(Done::CalledOff);
    }
    Ok(Done::Machine(Box::new(started)))
}

/// Whether nobody reads any more what is written to this pipe.
fn is_gone(answers: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&answers, PollFlags::empty())];
    let polled = retry_on_intr(|| poll(&mut fds, Some(&Timespec::default())));
    // Those are told without being asked for.
    let told = PollFlags::ERR | PollFlags::HUP;
    polled.is_ok() && fds[0].revents().intersects(told)
}

fn write_image(
    of: &Source,
    confinement: Option<&Confinement>,
    memory: Option<OwnedFd>,
) -> Result<Shape, Failure> {
    let saved = place::open(of)?;
    let disks = disks::saved(&saved.state)?;
    if let Some(confinement) = confinement {
        confined(confinement, &saved.state.header, &disks)?;
    }
    disks::apart(disks.iter().filter_map(DiskState::config))?;
    let memory = File::from(memory.ok_or(Error::NoImage)?);
    saved.write_hot(&memory).map_err(Error::from)?;
    let header = &saved.state.header;
    Ok(Shape {
        vcpus: header.vcpus,
        memory_mib: header.memory_bytes >> 20,
    })
}

/// What there can be before it is known what the machine is.
struct Prepared {
    door: Door,
    ahead: Ahead,
}

/// What there can be of a machine before it is known which.
enum Ahead {
    Nothing,
    /// For any of some size.
    Frame(Frame),
    /// For forks of an image.
    Image {
        frame: Frame,
        saved: Box<Snapshot>,
        id: FileId,
    },
}

/// What tells a file from all others that are open.
#[derive(PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    fn of(file: &OwnedFd) -> Result<Self, Error> {
        let status = rustix::fs::fstat(file).map_err(|errno| Error::Host(errno.into()))?;
        Ok(Self {
            device: status.st_dev,
            inode: status.st_ino,
        })
    }
}

impl Prepared {
    fn new(shape: Option<Shape>, image: Option<OwnedFd>) -> Result<Self, Failure> {
        install_kick_handler().map_err(|e| host("SIGRTMIN cannot be handled", &e))?;
        let door = Door::new().map_err(|e| host("the control channel cannot be opened", &e))?;
        let frame = shape.map(Frame::prepare).transpose()?;
        let ahead = match (frame, image) {
            (None, _) => Ahead::Nothing,
            (Some(frame), None) => Ahead::Frame(frame),
            (Some(frame), Some(image)) => Ahead::of_image(frame, image)?,
        };
        Ok(Self { door, ahead })
    }
}

impl Ahead {
    fn of_image(mut frame: Frame, image: OwnedFd) -> Result<Self, Error> {
        let id = FileId::of(&image)?;
        let saved = Box::new(place::open_image(image)?);
        frame.restore(&saved)?;
        Ok(Self::Image { frame, saved, id })
    }

    /// For a machine that is no fork.
    fn frame(self) -> Option<Frame> {
        match self {
            Self::Nothing => None,
            Self::Frame(frame) => Some(frame),
            Self::Image { frame, .. } => {
                frame.put_away();
                None
            }
        }
    }

    /// For a fork of `image`, which is opened.
    fn fork(self, image: OwnedFd) -> Result<(Snapshot, Option<Frame>), Error> {
        match self {
            // Both are open, so that what is called the same is the same, and nobody can change it.
            Self::Image { frame, saved, id } if id == FileId::of(&image)? => {
                Ok((*saved, Some(frame)))
            }
            other => Ok((place::open_image(image)?, other.frame())),
        }
    }
}

/// A machine that is made and stands still.
struct Made {
    spec: LaunchSpec,
    machine: Machine,
    door: Door,
    events: Sender<Event>,
    received: Receiver<Event>,
    flags: Flags,
    /// When it was asked for.
    begun: Instant,
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

impl Made {
    fn new(
        spec: LaunchSpec,
        image: Option<OwnedFd>,
        Prepared { door, ahead }: Prepared,
        answer: &Arc<Answer>,
    ) -> Result<Self, Failure> {
        let begun = Instant::now();
        tracing::debug!("a machine is to be made");
        let (events, received) = channel();
        let flags = Flags::default();
        let machine = make(&spec, image, ahead, &listeners(&events, &flags, answer))?;
        Ok(Self {
            spec,
            machine,
            door,
            events,
            received,
            flags,
            begun,
        })
    }

    /// Lets it run, unless it is to be held at first, and has it be reached.
    fn begin(self) -> Result<Started, Failure> {
        let Self {
            spec,
            mut machine,
            door,
            events,
            received,
            flags,
            begun,
        } = self;
        let lifecycle = Arc::new(Lifecycle::new());
        // Before anybody can ask for anything else.
        if !spec.paused {
            machine.run(spec.clock)?;
            lifecycle.apply(lifecycle::Event::Resume)?;
            tracing::debug!("the guest runs");
        }
        machine.bring_the_rest()?;
        let service = Service {
            lifecycle: Arc::clone(&lifecycle),
            events: events.clone(),
            counters: Arc::clone(machine.counters()),
            vcpus: machine.vcpu_count(),
            memory_mib: machine.memory().layout().bytes() >> 20,
            begun,
        };
        let (vcpus, memory_mib) = (service.vcpus, service.memory_mib);
        let (shutdown, closed) = oneshot::channel();
        let port = door.port();
        let server = door
            .serve(spec.secret.clone(), service, closed)
            .map_err(|e| host("the control channel cannot be served", &e))?;
        let process =
            ProcessId::current().map_err(|e| host("the machine cannot be registered", &e))?;
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
            .map_err(|e| unregistered(&e))?;
        Ok(Started {
            port,
            controller: Controller {
                machine,
                lifecycle,
                events: received,
                teller: events,
                waiting: None,
                rounds: 0,
                runs: None,
                ending: flags.ending,
                parked: flags.parked,
            },
            shutdown,
            server,
            registration,
        })
    }
}

impl Started {
    fn finish(self) -> Exit {
        let exit = self.end_after(|mut controller| {
            controller.machine.is_known();
            controller.run()
        });
        tracing::info!(?exit, "the machine has ended");
        exit
    }

    fn call_off(self) {
        self.end_after(drop);
    }

    fn end_after<T>(self, run: impl FnOnce(Controller) -> T) -> T {
        let Self {
            port: _,
            controller,
            shutdown,
            server,
            registration,
        } = self;
        let exit = run(controller);
        // The server gives its last answers; then nobody can find the machine any more.
        drop(shutdown);
        if server.join().is_err() {
            tracing::error!("the control channel ended in a panic");
        }
        drop(registration);
        exit
    }
}

fn make(
    spec: &LaunchSpec,
    image: Option<OwnedFd>,
    ahead: Ahead,
    listeners: &Listeners,
) -> Result<Machine, Failure> {
    let console = console::open(&spec.console).map_err(Error::Console)?;
    match &spec.origin {
        Origin::Boot(config) => Ok(Machine::boot(config, spec, console, listeners)?),
        Origin::Restore(source) => {
            let saved = place::open(source)?;
            let frame = ahead.frame();
            Ok(Machine::restore(saved, frame, spec, console, listeners)?)
        }
        Origin::Fork(_) => {
            let (saved, frame) = ahead.fork(image.ok_or(Error::NoImage)?)?;
            let disks = disks::saved(&saved.state)?;
            disks::apart(disks.iter().filter_map(DiskState::config))?;
            Ok(Machine::restore(saved, frame, spec, console, listeners)?)
        }
    }
}

/// What is known before it is read from the controller's queue.
#[derive(Default)]
struct Flags {
    /// The guest has ended itself.
    ending: Arc<AtomicBool>,
    /// It is in the queue that a vCPU has parked, and need not be there twice.
    parked: Arc<AtomicBool>,
}

/// Has what the guest does end up in the controller's queue.
fn listeners(events: &Sender<Event>, flags: &Flags, answer: &Arc<Answer>) -> Listeners {
    let Flags { ending, parked } = flags;
    let tell = |events: &Sender<Event>, ending: &AtomicBool, event| {
        // Once, for a guest can ask for it as often as it likes while the controller does something else.
        if !ending.swap(true, Ordering::SeqCst) {
            // The controller has ended, and so will the guest.
            let _ = events.send(event);
        }
    };
    let (guest, vcpus) = (events.clone(), events.clone());
    let (memory, answer) = (events.clone(), Arc::clone(answer));
    let (parked, told) = (events.clone(), Arc::clone(parked));
    let (by_guest, by_vcpus) = (Arc::clone(ending), Arc::clone(ending));
    Listeners {
        requests: Arc::new(move |request| tell(&guest, &by_guest, Event::Guest(request))),
        end: Arc::new(move |id, end| tell(&vcpus, &by_vcpus, Event::Vcpu(id, end))),
        parked: Arc::new(move || {
            if !told.swap(true, Ordering::SeqCst) {
                // As above.
                let _ = parked.send(Event::Parked);
            }
        }),
        lost: Arc::new(move |lost: &Lost| {
            // The thread that starts the machine may wait for this page, and nothing else can end that.
            if answer.end(&Launched::Failed(Error::from(lost.clone()).into())) {
                tracing::error!("the machine cannot be started: {lost}");
                terminal::finish();
                std::process::exit(Exit::Failed.code().into());
            }
            // The controller has ended.
            let _ = memory.send(Event::Lost(lost.clone()));
        }),
    }
}

/// The failure of a machine that cannot be written down.
fn unregistered(error: &RegistryError) -> Failure {
    let cause = error.source().map(|cause| format!(": {cause}"));
    let why = format!("{error}{}", cause.unwrap_or_default());
    let failure = host("the machine cannot be registered", &why);
    match error.is_no_space() {
        true => Failure {
            kind: FailureKind::NoSpace,
            ..failure
        },
        false => failure,
    }
}

fn host(what: &str, error: &dyn std::fmt::Display) -> Failure {
    Failure {
        kind: FailureKind::Host,
        message: format!("{what}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_read_any_more_is_gone() {
        let (reader, writer) = std::io::pipe().unwrap();
        assert!(!is_gone(&writer));
        drop(reader);
        assert!(is_gone(&writer));
        // Who starts a VMM by hand may have its answers go anywhere.
        assert!(!is_gone(tempfile::tempfile().unwrap()));
    }
}
