//! QEMU, with its snapshot as its users take it: the machine stopped and migrated to a file.

mod qmp;

use std::{
    ffi::OsString,
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::{Files, LinuxGuest, Machine, Monitor, Saved, System, VCPUS};
use qmp::{Event, Qmp, RETRY};

pub(crate) const PROGRAM: &str = "qemu-system-x86_64";

/// Bytes a second: more than any machine has. QEMU's default would throttle it to 128 MiB a second.
const NO_LIMIT: u64 = 1 << 40;

/// How long it may stand still for the last round. By default it ends its rounds as soon as what is left takes 300 ms, however little more
/// time would bring that down.
const DOWNTIME_MS: u64 = 5;

/// The name that the snapshot's file descriptor has inside QEMU.
const SNAPSHOT: &str = "snapshot";

/// QEMU as Debian has it.
#[derive(Debug)]
pub struct Qemu;

/// A QEMU process. Dropped, it is killed.
#[derive(Debug)]
pub struct QemuMachine {
    process: Child,
    monitor: PathBuf,
}

impl Qemu {
    /// Finds it.
    ///
    /// # Errors
    ///
    /// When it is not installed.
    pub fn new() -> Result<Self> {
        let version = Command::new(PROGRAM).arg("--version").output();
        let version = version
            .with_context(|| format!("cannot run {PROGRAM}; apt-get install qemu-system-x86"))?;
        ensure!(version.status.success(), "{PROGRAM} --version fails");
        Ok(Self)
    }
}

impl QemuMachine {
    /// The machine of `process`, whose monitor listens at the path.
    pub(crate) fn of(process: Child, monitor: PathBuf) -> Self {
        Self { process, monitor }
    }
}

/// How QEMU saves a machine whose guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Live {
    /// It copies memory in rounds, and stops the guest for the last: its live migration, to a file.
    PreCopy,
    /// It stops the guest for the state alone, and copies memory behind it, by userfaultfd: its background snapshot.
    Background,
}

impl QemuMachine {
    /// Saves it, while its guest runs, by this way; it goes on.
    ///
    /// # Errors
    ///
    /// When it is not saved.
    pub fn live(&mut self, files: &Files, way: Live) -> Result<Saved> {
        let mut qmp = Qmp::connect(&self.monitor)?;
        prepare(&mut qmp, way == Live::Background)?;
        let begun = Instant::now();
        let file = migrate(&mut qmp, &files.memory)?;
        let stopped = qmp.wait_for(|event| Ok(time_of("STOP", event)))?;
        if way == Live::PreCopy {
            qmp.wait_for(completed)?;
            go_on(&mut qmp)?;
        }
        let resumed = qmp.wait_for(|event| Ok(time_of("RESUME", event)))?;
        if way == Live::Background {
            qmp.wait_for(completed)?;
        }
        make_durable(&file, &files.memory)?;
        Ok(Saved {
            total: begun.elapsed(),
            downtime: resumed.saturating_sub(stopped),
        })
    }
}

/// Has migrations tell what happens, and be as fast as can be.
fn prepare(qmp: &mut Qmp, background: bool) -> Result<()> {
    let capability = |name: &str, state: bool| json!({ "capability": name, "state": state });
    let capabilities = json!({ "capabilities": [
        capability("events", true),
        capability("background-snapshot", background),
    ] });
    qmp.execute("migrate-set-capabilities", capabilities)?;
    let parameters = json!({ "max-bandwidth": NO_LIMIT, "downtime-limit": DOWNTIME_MS });
    qmp.execute("migrate-set-parameters", parameters)?;
    Ok(())
}

/// Begins a migration to a new file at `path`.
fn migrate(qmp: &mut Qmp, path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    qmp.pass(&file, SNAPSHOT)?;
    qmp.execute("migrate", json!({ "uri": format!("fd:{SNAPSHOT}") }))?;
    Ok(file)
}

impl Monitor for Qemu {
    type Machine = QemuMachine;
    const SYSTEM: System = System::Qemu;

    fn boot(&self, guest: &LinuxGuest, console: &Path) -> Result<QemuMachine> {
        start(guest, console, None)
    }

    fn restore(&self, guest: &LinuxGuest, files: &Files, console: &Path) -> Result<QemuMachine> {
        let memory = File::open(&files.memory)
            .with_context(|| format!("cannot open {}", files.memory.display()))?;
        let machine = start(guest, console, Some(memory))?;
        // What was stopped when it was migrated is stopped where it arrives.
        go_on(&mut Qmp::connect(&machine.monitor)?)?;
        Ok(machine)
    }
}

/// Starts a process that boots `guest`, or goes on from a snapshot of it.
fn start(guest: &LinuxGuest, console: &Path, snapshot: Option<File>) -> Result<QemuMachine> {
    let monitor = console.with_extension("qmp");
    let mut command = Command::new(PROGRAM);
    command.args(arguments(guest, console, &monitor));
    match snapshot {
        // A file as it is: no process and no pipe in between.
        Some(snapshot) => command.args(["-incoming", "fd:0"]).stdin(snapshot),
        None => command.stdin(Stdio::null()),
    };
    let process = command.spawn().context("cannot start QEMU")?;
    Ok(QemuMachine::of(process, monitor))
}

/// Of QEMU's machine types `pc` boots and restores fastest in the test bed; less what this guest does not
/// use, and with the same devices as fermata's machine: a serial console, a virtio entropy source.
fn arguments(guest: &LinuxGuest, console: &Path, monitor: &Path) -> Vec<OsString> {
    let words = |line: &str| -> Vec<OsString> { line.split(' ').map(OsString::from).collect() };
    let mut arguments = words("-nodefaults -no-user-config -display none -no-reboot");
    arguments.extend(words(
        "-machine pc,accel=kvm,smm=off,vmport=off,hpet=off -cpu host",
    ));
    arguments.extend(words(&format!("-smp {VCPUS} -m {}", guest.mem_mib)));
    arguments.extend(words("-device virtio-rng-pci"));
    let mut option = |name: &str, prefix: &str, value: &Path, suffix: &str| {
        let mut text = OsString::from(prefix);
        text.push(value);
        text.push(suffix);
        arguments.extend([name.into(), text]);
    };
    option("-kernel", "", &guest.kernel, "");
    option("-initrd", "", &guest.initrd, "");
    option("-append", "", guest.cmdline.as_ref(), "");
    option("-serial", "file:", console, "");
    option("-qmp", "unix:", monitor, ",server=on,wait=off");
    arguments
}

impl Machine for QemuMachine {
    fn snapshot(&mut self, files: &Files) -> Result<Saved> {
        let mut qmp = Qmp::connect(&self.monitor)?;
        prepare(&mut qmp, false)?;
        let begun = Instant::now();
        qmp.execute("stop", json!({}))?;
        let stopped = qmp.wait_for(|event| Ok(time_of("STOP", event)))?;
        let file = migrate(&mut qmp, &files.memory)?;
        qmp.wait_for(completed)?;
        go_on(&mut qmp)?;
        let resumed = qmp.wait_for(|event| Ok(time_of("RESUME", event)))?;
        make_durable(&file, &files.memory)?;
        Ok(Saved {
            total: begun.elapsed(),
            downtime: resumed.saturating_sub(stopped),
        })
    }

    fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for QemuMachine {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Lets the guest go on once a migration is over: `cont` is forgotten before one has arrived, and refused
/// for a moment after one has left.
fn go_on(qmp: &mut Qmp) -> Result<()> {
    loop {
        let status = qmp.execute("query-status", json!({}))?;
        match status["status"].as_str() {
            Some("inmigrate" | "finish-migrate") => std::thread::sleep(RETRY),
            _ => break,
        }
    }
    qmp.execute("cont", json!({}))?;
    Ok(())
}

/// When the event called `name` happened, if this is it.
fn time_of(name: &str, event: &Event) -> Option<Duration> {
    (event.name == name).then(|| event.time())
}

/// Whether a migration is complete.
fn completed(event: &Event) -> Result<Option<()>> {
    if event.name != "MIGRATION" {
        return Ok(None);
    }
    match event.data["status"].as_str() {
        Some("completed") => Ok(Some(())),
        Some("failed" | "cancelled") => bail!("QEMU's migration to a file failed"),
        _ => Ok(None),
    }
}

/// What fermata does before it answers: the bytes, then the name.
fn make_durable(file: &File, path: &Path) -> Result<()> {
    file.sync_all()?;
    let directory = path.parent().context("a snapshot is in a directory")?;
    File::open(directory)?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn migration(status: &str) -> Event {
        serde_json::from_value(json!({
            "event": "MIGRATION",
            "data": { "status": status },
            "timestamp": { "seconds": 1, "microseconds": 2 },
        }))
        .unwrap()
    }

    #[test]
    fn a_migration_is_waited_for_to_its_end() {
        assert_eq!(completed(&migration("active")).unwrap(), None);
        assert_eq!(completed(&migration("completed")).unwrap(), Some(()));
        assert!(completed(&migration("failed")).is_err());
    }

    #[test]
    fn only_the_event_asked_for_has_a_time() {
        assert_eq!(time_of("STOP", &migration("active")), None);
        assert!(time_of("MIGRATION", &migration("active")).is_some());
    }
}
