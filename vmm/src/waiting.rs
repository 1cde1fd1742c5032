//! A snapshot that waits until all of its machine's memory and disks have come.
//!
//! The guest runs meanwhile, and the machine's controller does what else it is told: only then is memory copied, which nobody does
//! of pages that are not there. The wait ends when a page cannot be had, when nothing comes any more, when who asked has gone
//! away, and with the machine.

use std::{
    sync::{Arc, mpsc::Sender},
    thread,
    time::{Duration, Instant},
};

use control::{SnapshotReport, SnapshotRequest};
use snapshot::OnDemand;

use crate::{
    controller::{Event, Reply},
    error::Error,
    machine::Counters,
};

/// How often it is looked whether to wait on.
pub(crate) const INTERVAL: Duration = Duration::from_millis(500);

/// How long nothing may come: longer than a store on a network is away when its server starts anew.
const STILL: Duration = Duration::from_secs(300);

/// What is done when all is there.
pub(crate) struct Waiting {
    pub(crate) request: SnapshotRequest,
    pub(crate) reply: Reply<SnapshotReport>,
    /// Tells this wait from one that was given up.
    pub(crate) round: u64,
    /// With this it ends what has everything come.
    _waits: Arc<()>,
    /// Bytes that had come when it was looked, and when that number was another last.
    come: u64,
    since: Instant,
}

impl Waiting {
    pub(crate) fn new(
        round: u64,
        request: SnapshotRequest,
        reply: Reply<SnapshotReport>,
        waits: Arc<()>,
        come: u64,
    ) -> Self {
        Self {
            request,
            reply,
            round,
            _waits: waits,
            come,
            since: Instant::now(),
        }
    }

    /// Whether to wait on, now that so many bytes have come.
    pub(crate) fn look(&mut self, come: u64) -> Result<(), Error> {
        if self.reply.is_closed() {
            return Err(Error::NobodyWaits);
        }
        if come != self.come {
            (self.come, self.since) = (come, Instant::now());
        }
        if self.since.elapsed() > STILL {
            let still = STILL.as_secs();
            return Err(Error::NothingComes { still });
        }
        Ok(())
    }
}

/// Has all memory and all disks come as soon as can be, and tells `events` when they have, or cannot. It ends when that is not
/// `wanted` any more.
pub(crate) fn bring_all(
    round: u64,
    counters: &Arc<Counters>,
    wanted: impl Fn() -> bool + Send + Sync + 'static,
    events: &Sender<Event>,
) -> Result<(), Error> {
    // Nothing else of the machine's: if it ends before, this ends with it.
    let finisher = counters.arriving.as_ref().map(OnDemand::finisher);
    let disks = counters.arriving_disks.clone();
    let events = events.clone();
    let bring = move || {
        let memory = finisher.map_or(Ok(()), |finisher| finisher.finish(&wanted));
        let came = memory
            .map_err(Error::from)
            .and_then(|()| disks.finish(&wanted));
        // The controller has ended.
        let _ = events.send(Event::Arrived(round, came));
    };
    let thread = thread::Builder::new().name("arrivals".to_owned());
    thread.spawn(bring).map(drop).map_err(Error::Thread)
}

#[cfg(test)]
mod tests {
    use control::{AfterSnapshot, Destination};
    use tokio::sync::oneshot;

    use super::*;

    fn waiting() -> (
        Waiting,
        oneshot::Receiver<Result<SnapshotReport, control::Failure>>,
    ) {
        let (reply, answer) = oneshot::channel();
        let request = SnapshotRequest::new(Destination::files("/s", "/m"), AfterSnapshot::Halt);
        (Waiting::new(1, request, reply, Arc::default(), 0), answer)
    }

    #[test]
    fn a_wait_goes_on_as_long_as_something_comes_and_no_longer() {
        let (mut waiting, _answer) = waiting();
        let long_ago = Instant::now().checked_sub(STILL + INTERVAL).unwrap();
        waiting.since = long_ago;
        waiting.look(1).unwrap();
        waiting.look(1).unwrap();
        waiting.since = long_ago;
        let ended = waiting.look(1).unwrap_err();
        assert!(matches!(ended, Error::NothingComes { still: 300 }));
    }

    #[test]
    fn nobody_is_waited_for_who_has_gone_away() {
        let (mut waiting, answer) = waiting();
        drop(answer);
        let ended = waiting.look(1).unwrap_err();
        assert!(matches!(ended, Error::NobodyWaits));
    }
}
