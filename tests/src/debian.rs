//! The Debian guest of `resources/debian`: on a disk that branches and a TAP device, started from the command line.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use tempfile::TempDir;
use testbed::{debian, environment, l1};

use crate::{
    cli::Cli,
    console::Console,
    post_mortem::{self, Standstill},
    tap::Tap,
    wait,
};

/// The host's address on the TAP device; the guest's is in `resources/debian/wired.network`.
pub const HOST: &str = "10.77.1.1";
const GUEST: &str = "10.77.1.2";
/// As `resources/debian/customize` sets it.
const PASSWORD: &str = "fermata";

/// A boot takes more than a minute on an idle emulated machine, and has taken more than three on a slow host. One that stands still is
/// noticed long before.
const BOOT: Duration = Duration::from_secs(900);
/// What guests do under load, some ten times what it takes on an idle emulated machine.
const WORK: Duration = Duration::from_secs(480);

/// There is one guest's address.
static ADDRESS: Mutex<()> = Mutex::new(());

/// What a Debian guest needs around it. Dropped, it is gone.
#[derive(Debug)]
pub struct Host {
    directory: TempDir,
    cli: Cli,
    guest: debian::Guest,
    tap: Tap,
    _address: MutexGuard<'static, ()>,
}

/// A machine whose console is what `fermata run`, or `fermata restore --foreground`, has for its terminal. Dropped, it is
/// stopped.
#[derive(Debug)]
pub struct Machine<'a> {
    host: &'a Host,
    process: Child,
    keys: ChildStdin,
    console: Console,
}

impl Host {
    /// A TAP device, and the guest's disk branched off.
    ///
    /// # Errors
    ///
    /// When the environment does not say where the guest is, or this machine does not let us.
    pub fn new() -> Result<Self> {
        let address = ADDRESS.lock().unwrap_or_else(PoisonError::into_inner);
        let directory = tempfile::tempdir()?;
        let guest = debian::Guest::in_directory(environment::path(environment::DEBIAN)?);
        let cli = Cli::new(directory.path(), &directory.path().join("run"));
        let base = guest.disk();
        let base = base.to_str().context("the guest's path is not UTF-8")?;
        cli.run(&["disk", "create", "root.disk", "--base", base])?;
        // ssh takes no key that others could read.
        let key = directory.path().join("key");
        fs::copy(guest.key(), &key)?;
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
        Ok(Self {
            tap: Tap::new("fermata-debian", &format!("{HOST}/24"))?,
            directory,
            cli,
            guest,
            _address: address,
        })
    }

    /// The command line, in the directory of its own.
    pub fn cli(&self) -> &Cli {
        &self.cli
    }

    /// The path of a file in that directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The guest's files.
    pub fn guest(&self) -> &debian::Guest {
        &self.guest
    }

    /// Starts the guest with its kernel of a series and so many vCPUs, and streams at `vsock`.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn boot(&self, series: &str, vcpus: u32) -> Result<Machine<'_>> {
        let (kernel, initrd) = (self.guest.kernel(series), self.guest.initrd(series));
        let mut command = self.cli.command(&["run"]);
        command.arg(kernel).arg("--initrd").arg(initrd);
        command.args(["--cmdline", &command_line()]);
        command.args(["--vcpus", &vcpus.to_string(), "--memory", "512"]);
        command.args(["--disk", "root.disk,format=branch"]);
        command.args(["--net", &format!("tap={}", self.tap.name())]);
        command.args(["--vsock", "cid=5,path=vsock"]);
        self.start(command, "console")
    }

    /// Goes on from a snapshot in two files, in the foreground, with its streams at `vsock-again`.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn restore(&self, state: &str, memory: &str) -> Result<Machine<'_>> {
        let words = ["restore", state, memory, "--foreground", "--vsock"];
        let mut command = self.cli.command(&words);
        command.arg("path=vsock-again");
        self.start(command, "console-again")
    }

    fn start(&self, mut command: Command, console: &str) -> Result<Machine<'_>> {
        let console = self.path(console);
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(File::create(&console)?)
            .spawn()?;
        let keys = process.stdin.take().context("its input is not piped")?;
        Ok(Machine {
            host: self,
            process,
            keys,
            console: Console::new(console),
        })
    }

    /// The process of the only machine, once it is listed.
    fn pid(&self) -> Option<u64> {
        let machines = self.cli.json(&["ps", "--json"]).ok()?;
        machines.as_array()?.first()?["pid"].as_u64()
    }

    fn ssh(&self, arguments: &[&str]) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"])
            .args([
                "-o",
                "StrictHostKeyChecking=no",
                "-o",
                "UserKnownHostsFile=/dev/null",
            ])
            // The guest may have no time for us for a while, but one that is gone must be noticed.
            .args(["-o", "ConnectTimeout=120"])
            .args(["-o", "ServerAliveInterval=60"])
            .args(["-o", "ServerAliveCountMax=4", "-i"])
            .arg(self.path("key"))
            .arg("-S")
            .arg(self.path("ssh"))
            .args(arguments)
            .arg(format!("root@{GUEST}"));
        ssh
    }

    /// Logs in by ssh, and stays so: the commands of [`Self::command`] need not log in again.
    ///
    /// # Errors
    ///
    /// When the guest does not let us.
    pub fn log_in(&self) -> Result<()> {
        wait::within(BOOT, "the guest's ssh server", || {
            // Who stays in the background would keep our pipes.
            let mut ssh = self.ssh(&["-M", "-N", "-f"]);
            ssh.stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            ssh.status()
                .is_ok_and(|status| status.success())
                .then_some(())
        })
    }

    /// Has the guest's shell run `command`, which succeeds, and returns what it prints.
    ///
    /// # Errors
    ///
    /// When it fails, with what it said.
    pub fn command(&self, command: &str) -> Result<String> {
        let quoted = format!("'{}'", command.replace('\'', r"'\''"));
        let script = format!("timeout {} sh -c {quoted}", WORK.as_secs());
        let output = self
            .ssh(&[])
            .arg(script)
            .stdin(Stdio::null())
            .output()
            .context("cannot run ssh; install openssh-client")?;
        let said = String::from_utf8_lossy(&output.stderr);
        let printed = String::from_utf8(output.stdout)?;
        ensure!(
            output.status.success(),
            "{command}: {}: {printed}{said}",
            output.status
        );
        Ok(printed)
    }

    /// A stream to `port` of the guest, through the socket `name`.
    ///
    /// # Errors
    ///
    /// When nobody listens there.
    pub fn stream(&self, name: &str, port: u32) -> Result<UnixStream> {
        let mut stream = UnixStream::connect(self.path(name))?;
        stream.set_read_timeout(Some(WORK))?;
        stream.set_write_timeout(Some(WORK))?;
        writeln!(stream, "CONNECT {port}")?;
        let answer = line(&mut stream)?;
        ensure!(answer.starts_with("OK "), "port {port}: {answer:?}");
        Ok(stream)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // There may be no connection, and nobody is left to complain to.
        let _ = self
            .ssh(&["-O", "exit"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

impl Machine<'_> {
    /// Waits for the login prompt.
    ///
    /// # Errors
    ///
    /// When it does not come.
    pub fn comes_up(&mut self) -> Result<()> {
        self.shows("debian login: ")
    }

    /// Logs in at the console, and has the shell there print what `command` does.
    ///
    /// # Errors
    ///
    /// When the guest does not answer as it should.
    pub fn log_in_at_the_console(&mut self, command: &str) -> Result<String> {
        writeln!(self.keys, "root")?;
        self.shows("Password: ")?;
        writeln!(self.keys, "{PASSWORD}")?;
        self.shows("root@debian:~# ")?;
        // What is typed is echoed, with a quote behind it; before what is printed the shell may speak to its terminal.
        writeln!(self.keys, "echo \"<$({command})>\"")?;
        self.console.first("the shell's answer", |line| {
            let (_, said) = line.strip_suffix('>')?.rsplit_once('<')?;
            Some(said.to_owned())
        })
    }

    fn shows(&mut self, text: &str) -> Result<()> {
        let (host, console, process) = (self.host, &self.console, &mut self.process);
        let mut standstill = Standstill::new();
        // A guest runs before its machine is listed.
        let mut pid = None;
        let shown = || {
            if console.text().contains(text) {
                return Some(Ok(()));
            }
            // Nothing more comes then.
            if let Ok(Some(status)) = process.try_wait() {
                return Some(Err(anyhow!("the machine has ended: {status}")));
            }
            pid = pid.or_else(|| host.pid());
            let used = post_mortem::used(pid?).ok()?;
            let still = standstill.seen(Instant::now(), used);
            still.then(|| Err(anyhow!("the machine stands still")))
        };
        let waited = wait::within(BOOT, &format!("{text:?} on the console"), shown).flatten();
        waited.with_context(|| {
            let at = pid.map(|pid| post_mortem::describe(&host.cli, pid));
            let at = at.unwrap_or_default();
            format!("the console shows {:?}\n{at}", console.text())
        })
    }

    /// Saves it into two files, and ends it.
    ///
    /// # Errors
    ///
    /// When it is not saved.
    pub fn save(mut self, state: &str, memory: &str) -> Result<()> {
        let pid = self.host.pid().context("the machine is gone")?.to_string();
        self.host
            .cli
            .run(&["snapshot", &pid, state, memory, "--halt"])?;
        ensure!(self.ended()? == Some(12), "it was not ended by being saved");
        Ok(())
    }

    /// Has the guest shut down.
    ///
    /// # Errors
    ///
    /// When it does not, or does not as it should.
    pub fn shut_down(mut self) -> Result<()> {
        self.host.command("systemctl poweroff")?;
        let code = self.ended()?;
        ensure!(code == Some(0), "it ended with {code:?}");
        Ok(())
    }

    /// Waits until it has ended, and returns its exit code.
    fn ended(&mut self) -> Result<Option<i32>> {
        let process = &mut self.process;
        let ended = wait::within(WORK, "the machine to end", || {
            process.try_wait().transpose()
        })?;
        Ok(ended?.code())
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        // Nobody is left to complain to.
        if let (Ok(None), Some(pid)) = (self.process.try_wait(), self.host.pid()) {
            let _ = self.host.cli.run(&["stop", &pid.to_string()]);
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What Debian's boot loader would say, to a kernel with a serial console.
fn command_line() -> String {
    let mut line = "console=ttyS0 root=/dev/vda ro quiet".to_owned();
    if l1::is_here() {
        // QEMU 7.2 leaves garbage in the flags behind cmpxchg16b, which 6.12 finds in them when a vCPU stops right there
        // (docs/decisions/emulated-machines-break-down.md): it is not to use that instruction.
        line.push_str(" clearcpuid=cx16");
    }
    line
}

/// The next line of `stream`, and nothing of what is behind it.
fn line(stream: &mut UnixStream) -> Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while byte != *b"\n" {
        std::io::Read::read_exact(stream, &mut byte)?;
        line.extend(byte);
    }
    Ok(String::from_utf8(line)?)
}

/// What a guest's kernel may say, with a reason for each.
#[derive(Debug)]
pub struct Expected(Vec<Vec<String>>);

impl Expected {
    /// A list with a line each: a text that the kernel's line has in it, in which `*` stands for anything, then ` => ` and the
    /// reason. Lines that begin with `#` are not of the list.
    ///
    /// # Errors
    ///
    /// When a line has no reason.
    pub fn parse(list: &str) -> Result<Self> {
        let lines = list
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let parsed = lines.map(|line| {
            let (text, reason) = line
                .split_once(" => ")
                .with_context(|| format!("{line:?} has no reason"))?;
            ensure!(!reason.trim().is_empty(), "{line:?} has no reason");
            Ok(text.split('*').map(str::to_owned).collect())
        });
        Ok(Self(parsed.collect::<Result<_>>()?))
    }

    /// What of a kernel's log the list does not have. A warning with its trace counts as one line.
    pub fn unexpected(&self, log: &str) -> Vec<String> {
        let entries = entries(log).into_iter();
        entries.filter(|entry| !self.has(entry)).collect()
    }

    fn has(&self, entry: &str) -> bool {
        self.0.iter().any(|parts| {
            let mut rest = Some(entry);
            for part in parts {
                rest = rest.and_then(|text| Some(text.split_once(part.as_str())?.1));
            }
            rest.is_some()
        })
    }
}

/// The lines of a kernel's log; from `cut here` to `end trace` all in one.
fn entries(log: &str) -> Vec<String> {
    let mut entries: Vec<String> = Vec::new();
    let mut in_trace = false;
    for line in log.lines() {
        match entries.last_mut() {
            Some(last) if in_trace => {
                last.push('\n');
                last.push_str(line);
            }
            _ => entries.push(line.to_owned()),
        }
        in_trace = (in_trace || line.contains("[ cut here ]")) && !line.contains("[ end trace");
    }
    entries
}

/// Reads a file that both the guest and its host have.
///
/// # Errors
///
/// When it cannot be read.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test that cannot go on should stop

    use super::*;

    #[test]
    fn what_the_list_has_is_expected_and_nothing_else_is() {
        let list = "# why\n\nhrtimer: interrupt took * ns => slow\nbad CPU => old\n";
        let expected = Expected::parse(list).unwrap();
        let log = "hrtimer: interrupt took 7 ns\nhrtimer: interrupt took\n\
                   --[ cut here ]--\nbad CPU\nRIP: 1\n--[ end trace 0 ]--\nRIP: 2\n";
        assert_eq!(
            expected.unexpected(log),
            ["hrtimer: interrupt took", "RIP: 2"]
        );
    }

    #[test]
    fn each_line_of_a_list_has_a_reason() {
        assert!(Expected::parse("text").is_err());
        assert!(Expected::parse("text =>  ").is_err());
    }
}
