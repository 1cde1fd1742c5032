//! What keeps the loop from its devices while somebody else works on them, without a word from its thread: most of the time that
//! waits for events, and need not wake up to go on waiting.

use std::{
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use event_manager::{EventOps, Events, MutEventSubscriber};

use super::Subscriber;
use crate::sync::lock;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Nobody is in.
    #[default]
    Open,
    /// The loop is in.
    Entered,
    /// The loop waits if it wants in.
    Closed,
    /// The loop is not let in any more.
    Ended,
}

/// The way from the loop to its devices.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// How often the loop has come out.
    passes: AtomicU64,
    /// How often somebody has found it closed.
    #[cfg(test)]
    found_closed: std::sync::atomic::AtomicUsize,
}

impl Gate {
    /// Keeps the loop out, if it is not in.
    pub(super) fn close(&self) -> bool {
        let mut state = lock(&self.state);
        let open = *state == State::Open;
        if open {
            *state = State::Closed;
        }
        open
    }

    /// Lets it in again.
    pub(super) fn open(&self) {
        self.change(State::Closed, State::Open);
    }

    /// Never lets it in again.
    pub(super) fn end(&self) {
        *lock(&self.state) = State::Ended;
        self.changed.notify_all();
    }

    /// Does `work` once the loop is let in, if it ever is.
    pub(super) fn pass(&self, work: impl FnOnce()) {
        let state = lock(&self.state);
        let closed = |state: &mut State| {
            let closed = *state == State::Closed;
            #[cfg(test)]
            self.found_closed
                .fetch_add(closed.into(), std::sync::atomic::Ordering::Relaxed);
            closed
        };
        let waited = self.changed.wait_while(state, closed);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        if *state == State::Ended {
            return;
        }
        *state = State::Entered;
        drop(state);
        work();
        self.passes.fetch_add(1, Ordering::SeqCst);
        self.change(State::Entered, State::Open);
    }

    /// Waits until the loop has come out, if it is in, whether or not it has gone in again; says whether it has within `bound`.
    pub(super) fn wait_until_out(&self, bound: Duration) -> bool {
        let state = lock(&self.state);
        let passes = self.passes.load(Ordering::SeqCst);
        let is_in = |state: &mut State| {
            *state == State::Entered && self.passes.load(Ordering::SeqCst) == passes
        };
        let waited = self.changed.wait_timeout_while(state, bound, is_in);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn change(&self, from: State, to: State) {
        let mut state = lock(&self.state);
        if *state == from {
            *state = to;
            self.changed.notify_all();
        }
    }
}

/// What the loop does, behind the gate.
pub(super) struct Gated {
    pub(super) gate: std::sync::Arc<Gate>,
    pub(super) subscriber: Subscriber,
}

impl MutEventSubscriber for Gated {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.subscriber.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        self.gate.pass(|| self.subscriber.process(events, ops));
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, mpsc},
        thread::{self, JoinHandle},
    };

    use super::*;

    /// Returns when `who` waits at the closed gate.
    fn waits(gate: &Gate, who: &JoinHandle<()>) {
        while gate.found_closed.load(Ordering::Relaxed) == 0 {
            assert!(!who.is_finished(), "it did not wait");
            thread::yield_now();
        }
    }

    #[test]
    fn who_is_in_keeps_it_from_being_closed_and_who_is_not_waits() {
        let gate = Arc::new(Gate::default());
        gate.pass(|| assert!(!gate.close()));
        assert!(gate.close());
        assert!(!gate.close());
        let passed = Arc::new(Mutex::new(false));
        let waiting = thread::spawn({
            let (gate, passed) = (Arc::clone(&gate), Arc::clone(&passed));
            move || gate.pass(|| *lock(&passed) = true)
        });
        waits(&gate, &waiting);
        assert!(!*lock(&passed));
        gate.open();
        waiting.join().unwrap();
        assert!(*lock(&passed));
    }

    #[test]
    fn nobody_passes_one_that_has_ended() {
        let gate = Arc::new(Gate::default());
        assert!(gate.close());
        let waiting = thread::spawn({
            let gate = Arc::clone(&gate);
            move || gate.pass(|| panic!("it passed"))
        });
        waits(&gate, &waiting);
        gate.end();
        waiting.join().unwrap();
        gate.open();
        gate.pass(|| panic!("it passed"));
        assert!(!gate.close());
    }

    #[test]
    fn what_is_in_hand_is_waited_for_and_no_more() {
        let gate = Arc::new(Gate::default());
        let long = Duration::from_secs(60);
        assert!(gate.wait_until_out(long), "nobody is in");
        let (enter, entered) = mpsc::channel();
        let (leave, leaves) = mpsc::channel();
        let looping = Arc::clone(&gate);
        let device_loop = thread::spawn(move || {
            for _ in 0..2 {
                looping.pass(|| {
                    enter.send(()).unwrap();
                    leaves.recv().unwrap();
                });
            }
        });
        entered.recv().unwrap();
        assert!(!gate.wait_until_out(Duration::from_millis(10)));
        let waiting = Arc::clone(&gate);
        let (begin, begun) = mpsc::channel();
        let waits = thread::spawn(move || {
            begin.send(()).unwrap();
            waiting.wait_until_out(long)
        });
        begun.recv().unwrap();
        leave.send(()).unwrap();
        // It is in again, with what has begun since, or who waits was late and waits for that, too.
        entered.recv().unwrap();
        leave.send(()).unwrap();
        assert!(waits.join().unwrap());
        device_loop.join().unwrap();
        gate.end();
        assert!(gate.wait_until_out(long));
    }
}
