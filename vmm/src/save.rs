//! Taking a snapshot of a machine.

use std::{
    num::NonZeroU64,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use branch_disk::LayerId;
use control::{
    AfterSnapshot, GuestClock, MemoryCopy, SentReport, SnapshotReport, SnapshotRequest,
    StoredReport,
};
use memory::{AtCut, Outcome, PartKind};
use rustix::rand::{GetRandomFlags, getrandom};
use saved_state::{Container, SnapshotId};
use snapshot::{Content, Draft, Published, Received, Saved, Saving, Unpublished, Written};

use crate::{
    beside::beside_guest,
    disks::{self, Cuts},
    error::Error,
    live::{self, Plan, Prepared},
    machine::{Held, Machine},
    place,
    stored_disks::{self, StoredAs},
};

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
    published: Published,
    /// What the disks were, if they were saved with it.
    layers: Vec<Option<LayerId>>,
}

/// A snapshot that was taken.
struct Taken {
    done: Done,
    downtime: Duration,
    cut: Cut,
}

/// What became of memory at the cut.
struct Cut {
    /// What it was, if it was not just read while the guest stood still.
    at_cut: Option<AtCut>,
    /// What was done for that before.
    prepared: Option<Prepared>,
    /// Bytes that were looked at while the guest stood still.
    last_round_bytes: u64,
}

impl Cut {
    fn known(at_cut: AtCut, prepared: Prepared) -> Self {
        Self {
            last_round_bytes: at_cut.protected_bytes(),
            at_cut: Some(at_cut),
            prepared: Some(prepared),
        }
    }

    fn read(written: Written) -> Self {
        Self {
            at_cut: None,
            prepared: None,
            last_round_bytes: written.data_bytes,
        }
    }
}

impl<'a> Work<'a> {
    /// Writes `memory`. When this returns, its machine need not stand still any more for it.
    fn write(self, memory: &impl Content) -> Result<InWork<'a>, Error> {
        let Self { draft, state, rest } = self;
        let unpublished = draft.write(&state, memory, rest.saving)?;
        rest.saving.stand_still(None);
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
        unpublished.finish(rest.saving)?;
        if !rest.saving.complete() {
            return Err(Error::Cancelled);
        }
        Ok(Done {
            written,
            state_bytes,
            published: unpublished.publish()?,
            layers,
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
    let memory_bytes = machine.memory().layout().bytes();
    let destination = place::OpenDestination::new(&request.to)?;
    let id = new_id()?;
    if let place::OpenDestination::Hot(_) = destination {
        disks::apart(machine.disks().iter().map(|disk| disk.config.clone()))?;
    }
    let mut draft = snapshot::begin(
        destination.of_machine(parent, memory_bytes, &counters.saving),
        id,
    )?;
    let next_heads = disks::prepare(machine.disks())?;
    if !destination.keeps_disks() {
        machine.keep_found_layers();
    }
    let goes_on = match request.then {
        AfterSnapshot::Resume(_) => true,
        AfterSnapshot::AsBefore(_) => machine.is_running(),
        AfterSnapshot::Halt => false,
    };
    let plan = Plan {
        copy: request.copy,
        goes_on,
        last: parent,
        saving: &counters.saving,
        ending,
        downtime: request.downtime_limit_ms.map(milliseconds),
        is_slowed: request.bytes_per_second.is_some(),
    };
    let prepared = live::prepare(machine, &plan, &mut draft)?;
    let limited = plan.is_slowed;
    if limited && prepared.is_none() {
        return Err(Error::NothingBeside);
    }
    wanted(&counters.saving)?;

    let ran = machine.is_running();
    let mut held = machine.hold()?.with_clock(clock_of(request.then));
    let since = held.since();
    // Somebody else has decided how long it stands still if it did before.
    let limit = plan.downtime.filter(|_| ran);
    counters
        .saving
        .stand_still(limit.and_then(|limit| since.checked_add(limit)));
    // A guest that has switched itself off waits for its end, which is behind this in the queue.
    if ending.load(Ordering::SeqCst) {
        return Err(Error::GuestEnds);
    }
    let images = disks::writable_images(held.disks());
    let saved = save_state(&mut held, next_heads, id);
    let (state, cuts) = match saved {
        Ok(both) => both,
        Err(error) => {
            drop(held);
            // As below.
            machine.merge_layers();
            return Err(error);
        }
    };
    let ended = cuts.layers();
    let work = Work {
        draft,
        state,
        rest: Rest {
            images,
            cuts,
            last: last.as_ref(),
            saving: &counters.saving,
        },
    };
    // If what is needed to go on beside it cannot be had after all.
    let may_stop = request.copy.is_none() && !limited;
    let taken = match (goes_on, prepared) {
        (true, Some(prepared)) => copy_on_write(held, work, prepared, may_stop),
        (true, None) => stop_and_copy(held, work),
        (false, Some(prepared)) => stay_copied(held, work, prepared),
        (false, None) => stay(held, work),
    };
    let kept = match &taken {
        Ok(taken) => !taken.done.layers.is_empty(),
        // There is none, or it is in the store, and nowhere without its disks.
        Err(_) => !counters.saving.may_be_seen() || destination.keeps_disks(),
    };
    if !kept {
        machine.keep_layers(ended);
    }
    // What ended for one that failed is merged as any other, or there could be no further one some day.
    let taken = taken.inspect_err(|_| machine.merge_layers())?;
    let Done {
        written,
        state_bytes,
        published,
        layers,
    } = taken.done;
    let Cut {
        at_cut,
        prepared,
        last_round_bytes,
    } = taken.cut;
    let (stored, sent) = match published {
        Published::InFiles => (None, None),
        Published::InStore(saved) => (Some(stored_report(saved)), None),
        Published::WithPeer(received) => (None, Some(sent_report(received))),
    };
    if let (Some(live), Some(at_cut)) = (&mut machine.live, at_cut) {
        live.saved(at_cut, stored.as_ref().map(|stored| stored.id.as_str()));
    }
    if let Some(stored) = &stored {
        machine.stored_as = Some(StoredAs {
            id: stored.id.clone(),
            layers,
        });
    }
    if request.then != AfterSnapshot::Halt {
        machine.merge_layers();
    }
    Ok(SnapshotReport {
        id: id.to_string(),
        state_bytes,
        memory_bytes: written.memory_bytes,
        written_bytes: written.data_bytes,
        copy: prepared.map_or(MemoryCopy::StopAndCopy, |prepared| prepared.copy),
        rounds: prepared.map_or(0, |prepared| prepared.rounds),
        copied_bytes: prepared.map_or(0, |prepared| prepared.copied_bytes),
        last_round_bytes,
        downtime_us: taken.downtime.as_micros() as u64,
        total_us: begun.elapsed().as_micros() as u64,
        stored,
        sent,
    })
}

/// Ends a layer of each disk, and saves all of the machine but its memory.
fn save_state(
    held: &mut Held<'_>,
    next_heads: disks::Prepared,
    id: SnapshotId,
) -> Result<(Container, Cuts), Error> {
    let cuts = next_heads.cut(held.disks())?;
    Ok((held.save(id, &cuts)?, cuts))
}

/// The machine goes on at once, and what is not copied of its memory is written beside it.
fn copy_on_write(
    mut held: Held<'_>,
    work: Work<'_>,
    prepared: Prepared,
    may_stop: bool,
) -> Result<Taken, Error> {
    // After its state was saved, which can write to memory.
    let at_cut = match held.cut(&work.draft, work.rest.last) {
        Err(error) if may_stop => {
            tracing::warn!("the guest stands still to be saved: {error}");
            return stop_and_copy(held, work);
        }
        cut => cut?,
    };
    if !work.rest.saving.is_in_time() {
        at_cut.finish(Outcome::SameBase);
        return Err(Error::StandsTooLong);
    }
    let (gone_on, downtime) = held.let_go();
    work.rest.saving.stand_still(None);
    let done = beside_guest(|| work.write(&at_cut)?.publish());
    let (done, at_cut) = known(done, at_cut)?;
    // Of a machine that cannot go on, the snapshot is all that is left.
    gone_on?;
    Ok(Taken {
        done,
        downtime,
        cut: Cut::known(at_cut, prepared),
    })
}

/// The machine goes on when its memory is written.
fn stop_and_copy(mut held: Held<'_>, work: Work<'_>) -> Result<Taken, Error> {
    held.take_time();
    let in_work = work.write(held.memory())?;
    let (gone_on, downtime) = held.let_go();
    let done = in_work.publish()?;
    // As above.
    gone_on?;
    Ok(Taken {
        cut: Cut::read(done.written),
        done,
        downtime,
    })
}

/// The machine stays held, and what is not copied of its memory is written.
fn stay_copied(mut held: Held<'_>, work: Work<'_>, prepared: Prepared) -> Result<Taken, Error> {
    let at_cut = held.cut(&work.draft, work.rest.last)?;
    let left = at_cut.parts().into_iter();
    let left = left.filter(|part| part.kind == PartKind::Data);
    let last_round_bytes = left.map(|part| part.bytes).sum();
    held.take_time();
    // Nobody is spared by that any more.
    work.rest.saving.unlimit();
    let done = work.write(&at_cut).and_then(InWork::publish);
    let (done, at_cut) = known(done, at_cut)?;
    let downtime = held.since().elapsed();
    held.keep();
    Ok(Taken {
        done,
        downtime,
        cut: Cut {
            last_round_bytes,
            ..Cut::known(at_cut, prepared)
        },
    })
}

/// The machine stays held until its memory is written, and further.
fn stay(mut held: Held<'_>, work: Work<'_>) -> Result<Taken, Error> {
    held.take_time();
    let done = work.write(held.memory())?.publish()?;
    let downtime = held.since().elapsed();
    held.keep();
    Ok(Taken {
        cut: Cut::read(done.written),
        done,
        downtime,
    })
}

/// What is done; if it failed, what was in the base before is there still.
fn known(done: Result<Done, Error>, at_cut: AtCut) -> Result<(Done, AtCut), Error> {
    match done {
        Ok(done) => Ok((done, at_cut)),
        Err(error) => {
            at_cut.finish(Outcome::SameBase);
            Err(error)
        }
    }
}

/// Whether to go on with it.
fn wanted(saving: &Saving) -> Result<(), Error> {
    match saving.is_cancelled() {
        true => Err(Error::Cancelled),
        false => Ok(()),
    }
}

fn milliseconds(count: NonZeroU64) -> Duration {
    Duration::from_millis(count.get())
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

fn sent_report(received: Received) -> SentReport {
    SentReport {
        name: received.name,
        id: received.id.map(hex::encode),
        new_bytes: received.new_bytes,
    }
}

fn stored_report(saved: Saved) -> StoredReport {
    StoredReport {
        id: saved.id.to_string(),
        new_bytes: saved.pack_bytes + saved.snapshot_bytes,
        name: saved.name,
    }
}
