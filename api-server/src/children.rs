//! The VMM processes that this server started: they are waited for, and how they ended is remembered.

use std::{
    collections::{HashMap, VecDeque},
    os::unix::process::ExitStatusExt,
    process::ExitStatus,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use api_types::{EndReason, Ended, Vm, VmState};
use control::Exit;
use tokio::{process::Child, sync::Notify, time::timeout};
use tracing::{Instrument, error, info, info_span};

/// How many machines that have ended are remembered.
const REMEMBERED: usize = 256;

/// What is known of the machines whose VMM this server started.
#[derive(Clone, Debug, Default)]
pub(crate) struct Children(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    known: Mutex<Known>,
    one_ended: Notify,
}

#[derive(Debug, Default)]
struct Known {
    /// What was asked for and not done, of machines that live, by process id.
    notes: HashMap<u32, Vec<String>>,
    /// Machines that have ended, the oldest first.
    ended: VecDeque<Vm>,
}

impl Children {
    /// Takes over a child, whose machine is `vm`.
    pub(crate) fn adopt(&self, vm: Vm, mut child: Child) {
        let pid = vm.pid;
        self.known().notes.insert(pid, vm.notes.clone());
        let this = self.clone();
        let reap = async move {
            let ended = match child.wait().await {
                Ok(status) => how(status),
                Err(error) => {
                    error!(%error, "a VMM cannot be waited for");
                    return;
                }
            };
            info!(reason = ?ended.reason, code = ended.code, signal = ended.signal, "a VMM ended");
            this.record(Vm {
                state: VmState::Ended,
                ended: Some(ended),
                ..vm
            });
        };
        tokio::spawn(reap.instrument(info_span!("vm", pid)));
    }

    /// What was asked for and not done, of the machine that lives with this process id.
    pub(crate) fn notes(&self, pid: u32) -> Vec<String> {
        self.known().notes.get(&pid).cloned().unwrap_or_default()
    }

    /// Whether a child with this process id has not been reaped yet.
    pub(crate) fn lives(&self, pid: u32) -> bool {
        self.known().notes.contains_key(&pid)
    }

    /// The machine that ended last with this process id.
    pub(crate) fn ended(&self, pid: u32) -> Option<Vm> {
        let known = self.known();
        known.ended.iter().rev().find(|vm| vm.pid == pid).cloned()
    }

    /// Waits until it is known how a machine ended, though not longer than `bound`.
    pub(crate) async fn ended_within(&self, pid: u32, bound: Duration) -> Option<Vm> {
        let known = async {
            loop {
                // Listened for before it is looked for: nothing is missed between the two.
                let notified = self.0.one_ended.notified();
                if let Some(vm) = self.ended(pid) {
                    return vm;
                }
                notified.await;
            }
        };
        timeout(bound, known).await.ok()
    }

    fn record(&self, vm: Vm) {
        let mut known = self.known();
        known.notes.remove(&vm.pid);
        if known.ended.len() == REMEMBERED {
            known.ended.pop_front();
        }
        known.ended.push_back(vm);
        drop(known);
        self.0.one_ended.notify_waiters();
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Nothing panics while it holds the lock half-way through a change.
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn how(status: ExitStatus) -> Ended {
    let (code, signal) = (status.code(), status.signal());
    let reason = match code.map(Exit::from_code) {
        None => EndReason::Killed,
        Some(Some(Exit::PowerOff)) => EndReason::PowerOff,
        Some(Some(Exit::Reboot)) => EndReason::Reboot,
        Some(Some(Exit::TripleFault)) => EndReason::TripleFault,
        Some(Some(Exit::Halted)) => EndReason::Halted,
        Some(Some(Exit::Stopped)) => EndReason::Stopped,
        Some(Some(Exit::Failed | Exit::Usage) | None) => EndReason::Failed,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    Ended {
        reason,
        code,
        signal,
        at_unix_ms: now.map_or(0, |since| since.as_millis() as u64),
    }
}

/// How a machine ended, as the end of a sentence.
pub(crate) fn why(ended: &Ended) -> String {
    match (ended.reason, ended.signal, ended.code) {
        (EndReason::PowerOff, ..) => "the guest powered off".to_owned(),
        (EndReason::Reboot, ..) => "the guest asked for a reset".to_owned(),
        (EndReason::TripleFault, ..) => "the guest had a triple fault".to_owned(),
        (EndReason::Halted, ..) => "it was saved and was not to go on".to_owned(),
        (EndReason::Stopped, ..) => "it was stopped".to_owned(),
        (_, Some(signal), _) => format!("its VMM was killed by signal {signal}"),
        (_, None, code) => format!("its VMM failed with exit code {}", code.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use api_types::VmOrigin;
    use tokio::process::Command;

    use super::*;

    const BOUND: Duration = Duration::from_secs(60);

    fn vm(pid: u32) -> Vm {
        Vm {
            pid,
            port: 1,
            state: VmState::Running,
            vcpus: None,
            memory_mib: None,
            uptime_ms: None,
            lost_memory: None,
            disks: None,
            release: None,
            origin: VmOrigin::Restore {
                cpu_snapshot_path: String::new(),
                memory_snapshot_path: String::new(),
            },
            console: None,
            log: String::new(),
            notes: vec!["a note".to_owned()],
            ended: None,
        }
    }

    async fn ended(script: &str) -> Ended {
        let children = Children::default();
        let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        let pid = child.id().unwrap();
        children.adopt(vm(pid), child);
        let vm = children.ended_within(pid, BOUND).await.unwrap();
        assert_eq!(vm.state, VmState::Ended);
        assert_eq!(vm.notes, ["a note"]);
        assert_eq!(children.notes(pid), [""; 0]);
        vm.ended.unwrap()
    }

    #[tokio::test]
    async fn every_way_to_end_is_told_apart() {
        let cases = [
            ("exit 0", EndReason::PowerOff),
            ("exit 1", EndReason::Failed),
            ("exit 10", EndReason::Reboot),
            ("exit 11", EndReason::TripleFault),
            ("exit 12", EndReason::Halted),
            ("exit 13", EndReason::Stopped),
            ("exit 77", EndReason::Failed),
            ("kill -9 $$", EndReason::Killed),
        ];
        for (script, reason) in cases {
            let ended = ended(script).await;
            assert_eq!(ended.reason, reason, "{script}");
            assert_eq!(ended.signal.is_some(), reason == EndReason::Killed);
            assert_ne!(ended.code.is_some(), ended.signal.is_some());
        }
        let killed = ended("kill -9 $$").await;
        assert_eq!(why(&killed), "its VMM was killed by signal 9");
    }

    #[test]
    fn memory_of_the_ended_is_bounded_and_the_latest_counts() {
        let children = Children::default();
        for pid in 0..=REMEMBERED as u32 {
            children.record(vm(pid));
        }
        assert_eq!(children.ended(0), None);
        assert!(children.ended(1).is_some());
        let again = Vm { port: 2, ..vm(1) };
        children.record(again.clone());
        assert_eq!(children.ended(1), Some(again));
    }
}
