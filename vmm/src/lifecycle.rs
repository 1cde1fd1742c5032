//! What a machine may be asked to do, when: a table, and nothing that does any of it.
//!
//! Requests are admitted here before they are queued, so that a second snapshot, say, is refused at
//! once instead of waiting for the first.

use std::sync::{Mutex, MutexGuard, PoisonError};

use control::{Exit, Failure, FailureKind, MachineState};

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Every vCPU is held and the devices are quiet.
    Paused,
    /// The guest runs.
    Running,
    /// A snapshot is being taken.
    Saving,
    /// It is over.
    Ended(Exit),
}

/// What happens to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// It is to be held.
    Pause,
    /// It is to go on.
    Resume,
    /// Something of it is to be another than it was, or all of it what it once was, whether it runs or not: it then runs, or does not,
    /// as before. Not while it is saved, which would save some of either.
    Change,
    /// A snapshot begins.
    Save,
    /// A snapshot is complete and durable; the guest runs, or does not.
    Saved {
        /// Whether it runs.
        running: bool,
    },
    /// A snapshot could not be taken; the guest runs, or does not.
    SaveFailed {
        /// Whether it runs.
        running: bool,
    },
    /// It could not be held, and runs on.
    PauseFailed,
    /// It stands still without having been told to: because a page of its memory cannot be had, or its runs are over.
    Stalled,
    /// It ends: the guest, a client or a failure says so.
    End(Exit),
}

/// The state after `event`, or why it cannot happen.
///
/// | state | pause | resume | change | save | saved | save failed | pause failed | stalled | end |
/// |---|---|---|---|---|---|---|---|---|---|
/// | paused | paused | running | paused | saving | – | – | running | paused | ended |
/// | running | paused | running | running | saving | – | – | running | paused | ended |
/// | saving | busy | busy | busy | busy | running or paused | running or paused | – | saving | ended |
/// | ended | ended | ended | ended | ended | ended | ended | ended | ended | ended |
///
/// An ended machine refuses what a client asks and lets pass what was under way: it stays ended.
pub(crate) fn next(state: State, event: Event) -> Result<State, Refused> {
    use Event::{Change, End, Pause, PauseFailed, Resume, Save, SaveFailed, Saved, Stalled};
    use State::{Ended, Paused, Running, Saving};
    match (state, event) {
        (Ended(exit), End(_) | Saved { .. } | SaveFailed { .. } | PauseFailed | Stalled) => {
            Ok(Ended(exit))
        }
        (Ended(_), Pause | Resume | Change | Save) => Err(Refused::Ended),
        (_, End(exit)) => Ok(Ended(exit)),
        (Paused | Running, Pause | Stalled) => Ok(Paused),
        // The snapshot waits for the page, too, and fails.
        (Saving, Stalled) => Ok(Saving),
        (Paused | Running, Resume | PauseFailed) => Ok(Running),
        (Paused | Running, Change) => Ok(state),
        (Paused | Running, Save) => Ok(Saving),
        (Saving, Saved { running: true } | SaveFailed { running: true }) => Ok(Running),
        (Saving, Saved { running: false } | SaveFailed { running: false }) => Ok(Paused),
        (Saving, Pause | Resume | Change | Save) => Err(Refused::Busy),
        (Saving, PauseFailed) | (Paused | Running, Saved { .. } | SaveFailed { .. }) => {
            Err(Refused::Impossible)
        }
    }
}

/// Why something cannot happen to a machine now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    /// A snapshot is under way.
    #[error("the machine is busy with a snapshot; ask again when that is done")]
    Busy,
    /// The machine is over.
    #[error("the machine has ended; create it anew or restore a snapshot of it")]
    Ended,
    /// The end of something that never began.
    #[error("nothing of the kind is under way")]
    Impossible,
    /// There is nothing to cancel.
    #[error("no snapshot of the machine is being taken")]
    NoSnapshot,
    /// It is too late to cancel it.
    #[error("the snapshot is about to be complete, and is kept; remove it once it is")]
    Completing,
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        Self {
            kind: FailureKind::WrongState,
            message: refused.to_string(),
        }
    }
}

/// The state of one machine, shared by those who admit requests and those who carry them out.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    state: Mutex<State>,
}

impl Lifecycle {
    /// Of a machine that has been made and stands still.
    pub(crate) fn new() -> Self {
        Self {
            state: Mutex::new(State::Paused),
        }
    }

    /// Has `event` happen; returns the state before it.
    pub(crate) fn apply(&self, event: Event) -> Result<State, Refused> {
        let mut state = self.lock();
        let before = *state;
        *state = next(before, event)?;
        Ok(before)
    }

    /// How the machine ended, once it has.
    pub(crate) fn ended(&self) -> Option<Exit> {
        match *self.lock() {
            State::Ended(exit) => Some(exit),
            _ => None,
        }
    }

    /// As a client sees it.
    pub(crate) fn state(&self) -> MachineState {
        match *self.lock() {
            State::Paused => MachineState::Paused,
            State::Running => MachineState::Running,
            State::Saving => MachineState::Saving,
            State::Ended(_) => MachineState::Ended,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A state is copied in and out whole, so that no panic can leave half of one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Pause),
            Just(Event::Resume),
            Just(Event::Change),
            Just(Event::Save),
            any::<bool>().prop_map(|running| Event::Saved { running }),
            any::<bool>().prop_map(|running| Event::SaveFailed { running }),
            Just(Event::PauseFailed),
            Just(Event::Stalled),
            Just(Event::End(Exit::PowerOff)),
            Just(Event::End(Exit::Stopped)),
        ]
    }

    proptest! {
        #[test]
        fn any_history_keeps_the_rules(events in proptest::collection::vec(any_event(), 0..60)) {
            let lifecycle = Lifecycle::new();
            let mut saving = false;
            let mut ended = None;
            for event in events {
                let before = *lifecycle.lock();
                let result = lifecycle.apply(event);
                let after = *lifecycle.lock();
                // What is refused changes nothing.
                prop_assert!(result.is_ok() || before == after);
                // Pausing and resuming twice is as good as once.
                if let (Ok(_), Event::Pause | Event::Resume) = (result, event) {
                    prop_assert_eq!(next(after, event), Ok(after));
                }
                // One snapshot at a time, and only it ends itself.
                match event {
                    Event::Save => prop_assert_eq!(result.is_ok(), !saving && ended.is_none()),
                    Event::Saved { .. } | Event::SaveFailed { .. } => {
                        prop_assert_eq!(result.is_ok(), saving || ended.is_some());
                    }
                    Event::PauseFailed => prop_assert_eq!(result.is_ok(), !saving),
                    Event::End(_) => prop_assert!(result.is_ok()),
                    Event::Stalled => {
                        prop_assert!(result.is_ok());
                        prop_assert!(!matches!(after, State::Running));
                    }
                    Event::Change => {
                        prop_assert_eq!(result.is_ok(), !saving && ended.is_none());
                        prop_assert_eq!(before, after);
                    }
                    Event::Pause | Event::Resume => prop_assert_eq!(result.is_ok(), !saving && ended.is_none()),
                }
                saving = matches!(after, State::Saving);
                // The first end is the one that counts.
                if let Some(exit) = ended {
                    prop_assert_eq!(lifecycle.ended(), Some(exit));
                }
                ended = lifecycle.ended();
            }
        }

        #[test]
        fn a_snapshot_leaves_what_the_machine_does(before: bool, running: bool, failed: bool) {
            let lifecycle = Lifecycle::new();
            if before {
                lifecycle.apply(Event::Resume).unwrap();
            }
            lifecycle.apply(Event::Save).unwrap();
            prop_assert_eq!(lifecycle.state(), MachineState::Saving);
            let end = if failed { Event::SaveFailed { running } } else { Event::Saved { running } };
            lifecycle.apply(end).unwrap();
            let expected = if running { MachineState::Running } else { MachineState::Paused };
            prop_assert_eq!(lifecycle.state(), expected);
        }
    }
}
