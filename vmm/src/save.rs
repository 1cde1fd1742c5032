//! Taking a snapshot of a machine.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use branch_disk::LayerId;
use control::{
    AfterSnapshot, GuestClock, MemoryCopy, SnapshotReport, SnapshotRequest, StoredReport,
};
use memory::{AtCut, Outcome};
use rustix::rand::{GetRandomFlags, getrandom};
use saved_state::{Container, SnapshotId};
use snapshot::{Content, Draft, Saved, Saving, Unpublished, Written};

use crate::{
    disks::{self, Cuts},
    error::Error,
    live,
    machine::{Held, Machine},
    place,
    stored_disks::{self, StoredAs},
};

/// Of the threads that save a machine while its guest runs. Where both want all CPUs, the kernel's weights for it and for 0
/// give them a sixth.
const NICENESS_BESIDE_GUEST: i32 = 7;

/// A snapshot whose machine's state is saved.
struct Work<'a> {
    draft: Draft,
    state: Container,
    rest: Rest<'a>,
}

/// What is to be done for a snapshot once memory is written.
struct Rest<'a> {
    /// Raw images that were written to.
    images: Vec<PathBuf>,
    cuts: Cuts,
    /// What the machine was last in the store.
    last: Option<&'a StoredAs>,
    saving: &'a Saving,
}

/// A snapshot whose state and memory are written.
struct InWork<'a> {
    unpublished: Unpublished,
    rest: Rest<'a>,
}

/// What was written.
struct Done {
    written: Written,
    state_bytes: u64,
    /// What became of it in the store, if it went there, and what the disks were.
    stored: Option<(Saved, Vec<Option<LayerId>>)>,
}

/// A snapshot that was taken.
struct Taken {
    done: Done,
    downtime: Duration,
    /// Bytes of memory that were looked at while the guest stood still.
    last_round_bytes: u64,
    /// What memory was, if the guest went on before it was written.
    at_cut: Option<AtCut>,
}

impl<'a> Work<'a> {
    /// Writes `memory`. When this returns, its machine need not stand still any more for it.
    fn write(self, memory: &impl Content) -> Result<InWork<'a>, Error> {
        let Self { draft, state, rest } = self;
        let unpublished = draft.write(&state, memory, rest.saving)?;
        Ok(InWork { unpublished, rest })
    }
}

impl InWork<'_> {
    /// Makes it durable and visible: the disks first, so that it is not there without them.
    fn publish(self) -> Result<Done, Error> {
        let Self {
            mut unpublished,
            rest,
        } = self;
        wanted(rest.saving)?;
        let (written, state_bytes) = (unpublished.written, unpublished.state_bytes);
        disks::sync(&rest.images)?;
        let disks = rest.cuts.finish()?;
        let layers = stored_disks::save(&mut unpublished, disks, rest.last, rest.saving)?;
        if !rest.saving.complete() {
            return Err(Error::Cancelled);
        }
        Ok(Done {
            written,
            state_bytes,
            stored: unpublished.publish()?.map(|saved| (saved, layers)),
        })
    }
}

/// Saves `machine`. It stands still while its state is saved, and for as long as it has to for its memory. When this
/// fails, a machine that ran runs on; one that was held and was to go on may have.
pub(crate) fn take_snapshot(
    machine: &mut Machine,
    ending: &AtomicBool,
    request: &SnapshotRequest,
) -> Result<SnapshotReport, Error> {
    let begun = Instant::now();
    let counters = Arc::clone(machine.counters());
    let last = machine.stored_as.clone();
    let parent = last.as_ref().map(|last| last.id.as_str());
    // What can be done before the machine is held, and what can fail, costs the guest nothing.
    let destination = place::OpenDestination::new(&request.to)?;
    let id = new_id()?;
    if let place::OpenDestination::Hot(_) = destination {
        disks::apart(machine.disks().iter().map(|disk| disk.config.clone()))?;
    }
    let draft = snapshot::begin(destination.with_parent(parent), id)?;
    let next_heads = disks::prepare(machine.disks())?;
    let goes_on = match request.then {
        AfterSnapshot::Resume(_) => true,
        AfterSnapshot::AsBefore(_) => machine.is_running(),
        AfterSnapshot::Halt => false,
    };
    let armed = live::prepare(machine, request.copy, goes_on)?;
    let limited = request.bytes_per_second.is_some();
    if limited && armed.is_none() {
        return Err(Error::NothingBeside);
    }
    wanted(&counters.saving)?;

    let mut held = machine.hold()?.with_clock(clock_of(request.then));
    // A guest that has switched itself off waits for its end, which is behind this in the queue.
    if ending.load(Ordering::SeqCst) {
        return Err(Error::GuestEnds);
    }
    let images = disks::writable_images(held.disks());
    let cuts = next_heads.cut(held.disks())?;
    let work = Work {
        draft,
        state: held.save(id, &cuts)?,
        rest: Rest {
            images,
            cuts,
            last: last.as_ref(),
            saving: &counters.saving,
        },
    };
    // If what is needed to go on beside it cannot be had after all.
    let may_stop = request.copy.is_none() && !limited;
    let taken = match (goes_on, &armed) {
        (true, Some(_)) => copy_on_write(held, work, may_stop)?,
        (true, None) => stop_and_copy(held, work)?,
        (false, _) => stay(held, work)?,
    };
    let Done {
        written,
        state_bytes,
        stored,
    } = taken.done;
    let copy = match taken.at_cut {
        Some(_) => MemoryCopy::CopyOnWrite,
        None => MemoryCopy::StopAndCopy,
    };
    let stored = stored.map(|(saved, layers)| (stored_report(saved), layers));
    if let (Some(live), Some(at_cut)) = (&mut machine.live, taken.at_cut) {
        let stored = stored.as_ref().map(|(stored, _)| stored.id.as_str());
        live.saved(at_cut, stored);
    }
    if let Some((stored, layers)) = &stored {
        machine.stored_as = Some(StoredAs {
            id: stored.id.clone(),
            layers: layers.clone(),
        });
    }
    Ok(SnapshotReport {
        id: id.to_string(),
        state_bytes,
        memory_bytes: written.memory_bytes,
        written_bytes: written.data_bytes,
        copy,
        rounds: armed.map_or(0, |armed| armed.rounds),
        last_round_bytes: taken.last_round_bytes,
        downtime_us: taken.downtime.as_micros() as u64,
        total_us: begun.elapsed().as_micros() as u64,
        stored: stored.map(|(stored, _)| stored),
    })
}

/// The machine goes on at once, and its memory is written beside it.
fn copy_on_write(held: Held<'_>, work: Work<'_>, may_stop: bool) -> Result<Taken, Error> {
    // After its state was saved, which can write to memory.
    let at_cut = match held.cut(&work.draft, work.rest.last) {
        Err(error) if may_stop => {
            tracing::warn!("the guest stands still to be saved: {error}");
            return stop_and_copy(held, work);
        }
        cut => cut?,
    };
    let since = held.since();
    let gone_on = held.let_go();
    let downtime = since.elapsed();
    let done = match beside_guest(|| work.write(&at_cut)?.publish()) {
        Ok(done) => done,
        Err(error) => {
            // What was in the base before is there still.
            at_cut.finish(Outcome::SameBase);
            return Err(error);
        }
    };
    // Of a machine that cannot go on, the snapshot is all that is left.
    gone_on?;
    Ok(Taken {
        done,
        downtime,
        last_round_bytes: at_cut.protected_bytes(),
        at_cut: Some(at_cut),
    })
}

/// The machine goes on when its memory is written.
fn stop_and_copy(held: Held<'_>, work: Work<'_>) -> Result<Taken, Error> {
    let in_work = work.write(held.memory())?;
    let since = held.since();
    let gone_on = held.let_go();
    let downtime = since.elapsed();
    let done = in_work.publish()?;
    // As above.
    gone_on?;
    Ok(Taken {
        last_round_bytes: done.written.data_bytes,
        done,
        downtime,
        at_cut: None,
    })
}

/// The machine stays held.
fn stay(held: Held<'_>, work: Work<'_>) -> Result<Taken, Error> {
    let done = work.write(held.memory())?.publish()?;
    let downtime = held.since().elapsed();
    held.keep();
    Ok(Taken {
        last_round_bytes: done.written.data_bytes,
        done,
        downtime,
        at_cut: None,
    })
}

/// Does `work`, and lets the guest have the CPUs first.
fn beside_guest<T: Send>(work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    let work = || {
        // Threads that are made from here on inherit it. Nobody is refused to be nicer.
        let _ = rustix::process::setpriority_process(None, NICENESS_BESIDE_GUEST);
        work()
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("saver".to_owned());
        let saver = thread.spawn_scoped(scope, work).map_err(Error::Host)?;
        let panicked = || Error::Host(std::io::Error::other("the saving thread panicked"));
        saver.join().unwrap_or_else(|_| Err(panicked()))
    })
}

/// Whether to go on with it.
fn wanted(saving: &Saving) -> Result<(), Error> {
    match saving.is_cancelled() {
        true => Err(Error::Cancelled),
        false => Ok(()),
    }
}

fn new_id() -> Result<SnapshotId, Error> {
    let mut id = [0; 16];
    getrandom(&mut id, GetRandomFlags::empty()).map_err(|errno| Error::Host(errno.into()))?;
    Ok(SnapshotId(id))
}

/// What the clocks of a machine have done that goes on, also if it does because saving it failed.
fn clock_of(then: AfterSnapshot) -> GuestClock {
    match then {
        AfterSnapshot::Resume(clock) | AfterSnapshot::AsBefore(clock) => clock,
        AfterSnapshot::Halt => GuestClock::default(),
    }
}

fn stored_report(saved: Saved) -> StoredReport {
    StoredReport {
        id: saved.id.to_string(),
        new_bytes: saved.pack_bytes + saved.snapshot_bytes,
        name: saved.name,
    }
}
