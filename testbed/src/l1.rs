//! L1: an emulated machine with hardware virtualisation of its own.
//!
//! QEMU's TCG emulates an AMD CPU with SVM; Debian's kernel runs on it with this machine's root file
//! system under a throw-away overlay, so that programs built here run there. Every path means the same
//! inside, except that `/tmp`, `/run` and `/dev/shm` start empty. Jobs and their output are files in a
//! directory that both sides see; a virtio-serial port says when to start one and when it is done.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::cache;
use crate::initramfs::Initramfs;
use crate::job::{Job, KILL_AFTER, Output};
use crate::kernel::{self, Flavour, Kernel};
use crate::modules::Modules;
use crate::qemu::Machine;
use crate::tail::Tail;

const INIT: &str = include_str!("../../resources/l1/init");
const AGENT: &str = include_str!("../../resources/l1/agent");

/// What stage one needs; the agent loads the rest from the host's own `/lib/modules`.
const MODULES: [&str; 5] = [
    "virtio_pci",
    "virtio_console",
    "9p",
    "9pnet_virtio",
    "overlay",
];

/// About ten times what it takes on an idle machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(150);
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(20);
/// How long L1 may show no sign of life, of which it gives one every two seconds: more than a busy host ever took. Where its
/// CPU is not interrupted, its kernel's own watchdog does not see it.
const LIFE_TIMEOUT: Duration = Duration::from_secs(180);
/// After how long without one it is interrupted, and then again and again: with the next, an interrupt comes that QEMU has lost. It
/// does no harm to one that is only slow, and a guest in it is not to see so long a pause that its kernel warns of it, which Linux
/// does after 21 seconds.
const WAKE_AFTER: Duration = Duration::from_secs(6);
/// Bytes of each log that an error shows.
const LAST_WORDS: usize = 4096;
/// How often output that a job has written is looked for.
const OUTPUT_INTERVAL: Duration = Duration::from_millis(20);

/// What L1 is given.
#[derive(Clone, Debug)]
pub struct Options {
    /// Number of CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// The one directory whose changes outlive L1; must exist.
    pub share: PathBuf,
}

impl Options {
    /// One CPU and 4 GiB. With more, QEMU loses interrupts that one CPU sends to another while that leaves a guest.
    #[must_use]
    pub fn new(share: impl Into<PathBuf>) -> Self {
        Self {
            cpus: 1,
            memory_mib: 4096,
            share: share.into(),
        }
    }
}

/// L1 did not come up, stopped answering, or crashed: its emulation failed, not the job. What a job had done
/// until then is in the share, and a fresh L1 can run it again.
#[derive(Debug)]
pub struct Breakdown {
    what: String,
    /// What the job under way had said, where nobody heard it yet.
    said: String,
    /// The ends of QEMU's and the console's logs.
    last_words: String,
}

impl fmt::Display for Breakdown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            what,
            said,
            last_words,
        } = self;
        write!(f, "{what}\n{last_words}")?;
        if said.is_empty() {
            return Ok(());
        }
        write!(f, "--- the job\n{said}")
    }
}

impl std::error::Error for Breakdown {}

/// A running L1. Dropping it ends it at once, as does the death of the thread that booted it;
/// [`shutdown`](Self::shutdown) lets it end by itself.
pub struct L1 {
    qemu: Child,
    /// `None` once L1 was told to quit.
    requests: Option<ChildStdin>,
    replies: Receiver<String>,
    /// Scripts, their output, the initramfs and the console's log.
    directory: TempDir,
    next_job: u32,
    /// From QEMU's start to the agent's first word.
    boot_time: Duration,
}

impl L1 {
    /// Starts L1 and waits until it takes jobs. `/dev/kvm` and `/dev/net/tun` are there then.
    ///
    /// # Errors
    /// When a package is missing; [`Breakdown`] when L1 does not come up.
    pub fn boot(options: &Options) -> Result<Self> {
        let started = Instant::now();
        let directory = tempfile::Builder::new()
            .prefix("l1-")
            .tempdir_in(cache::directory()?)
            .context("cannot make a directory for L1")?;
        let kernel = kernel::newest(Flavour::Generic)?;
        let initrd = directory.path().join("initramfs.cpio");
        write_initramfs(&kernel, &initrd)?;

        let share = options
            .share
            .canonicalize()
            .with_context(|| format!("L1's share {} must exist", options.share.display()))?;
        let machine = Machine {
            cpus: options.cpus,
            memory_mib: options.memory_mib,
            kernel: &kernel.image,
            initrd: &initrd,
            command_line: &command_line(
                &unique_name(),
                &share,
                [cache::workspace(), &cache::target()],
            )?,
            console: &directory.path().join("console.log"),
            shares: &[
                ("host", Path::new("/"), false),
                ("share", &share, true),
                ("jobs", directory.path(), true),
            ],
        };
        let mut l1 = Self::start(&machine.command(), directory)?;
        match l1.replies.recv_timeout(BOOT_TIMEOUT) {
            Ok(line) if line == "ready" => {}
            Ok(line) => {
                return l1.broke_down(format!("L1 said {line:?} where 'ready' was expected"));
            }
            Err(_) => return l1.broke_down(format!("L1 did not come up within {BOOT_TIMEOUT:?}")),
        }
        l1.boot_time = started.elapsed();
        Ok(l1)
    }

    fn start(command: &[OsString], directory: TempDir) -> Result<Self> {
        let (program, arguments) = command.split_first().context("an empty command line")?;
        let log =
            File::create(directory.path().join("qemu.log")).context("cannot write QEMU's log")?;
        let mut qemu = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("cannot run setpriv, of util-linux")?;
        let requests = qemu.stdin.take();
        let output = qemu.stdout.take().context("QEMU's output is not piped")?;
        let (sender, replies) = mpsc::channel();
        // Ends with QEMU, which holds the pipe's other end.
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            qemu,
            requests,
            replies,
            directory,
            next_job: 0,
            boot_time: Duration::ZERO,
        })
    }

    /// How long it took from the start until jobs were taken.
    #[must_use]
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// Runs `job` and waits for it.
    ///
    /// # Errors
    /// [`Breakdown`] when L1 is gone or does not answer. A job that fails or runs out of time is no error.
    pub fn run(&mut self, job: &Job) -> Result<Output> {
        let number = self.next_job;
        self.next_job += 1;
        let file = |suffix: &str| self.directory.path().join(format!("{number}.{suffix}"));
        std::fs::write(file("sh"), job.script().as_encoded_bytes())
            .context("cannot write a job's script")?;
        let mut stdout = Tail::create(&file("out"))?;
        let mut stderr = Tail::create(&file("err"))?;
        let follow = || {
            stdout.advance(job.echo.then(std::io::stdout))?;
            stderr.advance(job.echo.then(std::io::stderr))
        };
        let ended = self.wait_for(job, number, follow);
        let (stdout, stderr) = (stdout.text(), stderr.text());
        match ended {
            Ok(status) => Ok(Output {
                status,
                stdout,
                stderr,
            }),
            Err(error) if job.echo => Err(error),
            Err(error) => Err(match error.downcast::<Breakdown>() {
                Ok(breakdown) => Breakdown {
                    said: stdout + &stderr,
                    ..breakdown
                }
                .into(),
                Err(other) => other,
            }),
        }
    }

    /// Has job `number` run, and returns its exit status; `follow` looks for what it has written.
    fn wait_for(
        &mut self,
        job: &Job,
        number: u32,
        mut follow: impl FnMut() -> Result<()>,
    ) -> Result<i32> {
        let requests = self.requests.as_mut().context("L1 was told to quit")?;
        if writeln!(requests, "run {number}").is_err() {
            return self.broke_down("L1 is gone");
        }
        // timeout(1) ends the job in L1; this deadline is for a job that cannot be ended.
        let deadline = Instant::now() + job.timeout + 2 * KILL_AFTER;
        let mut woken = Instant::now();
        let reply = loop {
            match self.replies.recv_timeout(OUTPUT_INTERVAL) {
                Ok(reply) => break reply,
                Err(RecvTimeoutError::Timeout)
                    if Instant::now() > deadline || !self.lives_within(LIFE_TIMEOUT) =>
                {
                    return self.broke_down("L1 hangs");
                }
                Err(RecvTimeoutError::Timeout) => {
                    follow()?;
                    if woken.elapsed() > WAKE_AFTER && !self.lives_within(WAKE_AFTER) {
                        woken = Instant::now();
                        self.wake();
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return self.broke_down("L1 has crashed");
                }
            }
        };
        // All that the job wrote was in its files before the agent replied.
        follow()?;
        match parse_exit(&reply, number) {
            Some(status) => Ok(status),
            None => self.broke_down(format!(
                "L1 said {reply:?} where the exit of job {number} was expected"
            )),
        }
    }

    /// Whether programs have run in it within so long.
    fn lives_within(&self, bound: Duration) -> bool {
        let alive = std::fs::metadata(self.directory.path().join("alive"));
        let touched = alive.and_then(|alive| alive.modified());
        // A clock that was set back says nothing.
        touched.is_ok_and(|touched| touched.elapsed().unwrap_or_default() < bound)
    }

    /// Has its CPU be interrupted, by a line that says nothing. QEMU 7.2 seems to lose that interrupts are pending for a CPU that leaves
    /// a guest just then, and to look again when another comes (`docs/decisions/emulated-machines-break-down.md`).
    fn wake(&mut self) {
        eprintln!(
            "The emulated machine shows no sign of life for {WAKE_AFTER:?}, and is interrupted"
        );
        if let Some(requests) = &mut self.requests {
            // One that is gone is found out soon.
            let _ = writeln!(requests, "wake");
        }
    }

    /// Lets L1 power off.
    ///
    /// # Errors
    /// [`Breakdown`] when it does not within a bound; it is killed then.
    pub fn shutdown(mut self) -> Result<()> {
        if let Some(mut requests) = self.requests.take()
            && writeln!(requests, "quit").is_err()
        {
            return self.broke_down("L1 is gone");
        }
        match self.replies.recv_timeout(SHUTDOWN_TIMEOUT) {
            Err(RecvTimeoutError::Disconnected) => Ok(()),
            Ok(line) => self.broke_down(format!("L1 said {line:?} when it was to power off")),
            Err(RecvTimeoutError::Timeout) => {
                self.broke_down(format!("L1 did not power off within {SHUTDOWN_TIMEOUT:?}"))
            }
        }
    }

    fn broke_down<T>(&self, what: impl Into<String>) -> Result<T> {
        Err(Breakdown {
            what: what.into(),
            said: String::new(),
            last_words: self.last_words(),
        }
        .into())
    }

    /// The ends of QEMU's and the console's logs, for an error's message.
    fn last_words(&self) -> String {
        let mut words = String::new();
        for name in ["qemu.log", "console.log"] {
            let log = std::fs::read(self.directory.path().join(name)).unwrap_or_default();
            let end = &log[log.len().saturating_sub(LAST_WORDS)..];
            words.push_str(&format!("--- {name}\n{}\n", String::from_utf8_lossy(end)));
        }
        words
    }
}

impl Drop for L1 {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn write_initramfs(kernel: &Kernel, path: &Path) -> Result<()> {
    let mut initramfs = Initramfs::new(INIT)?;
    initramfs.file("agent", 0o755, AGENT.as_bytes())?;
    initramfs.modules(&Modules::of_kernel(&kernel.release)?.read(&MODULES)?)?;
    initramfs.write(path)
}

/// Different for every L1 of every process.
fn unique_name() -> String {
    static BOOTED: AtomicU32 = AtomicU32::new(0);
    format!(
        "l1-{}-{}",
        std::process::id(),
        BOOTED.fetch_add(1, Ordering::Relaxed)
    )
}

fn command_line(name: &str, share: &Path, keep: [&Path; 2]) -> Result<String> {
    // Mitigations cost an emulated CPU dearly and protect nothing in it. TCG hands out this machine's own
    // TSC, the same on all CPUs, but has no flag to say so: without a word the kernel would read its clock
    // from the HPET, an exit to QEMU each time, and KVM would give its guests no stable clock.
    // A kernel whose CPUs hang is to end, not to wait for the job's time to be up: softlockup_panic, after twice
    // the watchdog's threshold in seconds, which a busy host does not reach.
    let mut line = format!(
        "console=ttyS0 quiet panic=-1 softlockup_panic=1 watchdog_thresh=30 mitigations=off tsc=reliable l1.name={name}"
    );
    for (option, path) in [("share", share), ("keep", keep[0]), ("keep", keep[1])] {
        let splits = |c: char| c.is_whitespace() || c == '"';
        let path = path
            .to_str()
            .filter(|path| !path.contains(splits))
            .with_context(|| {
                format!(
                    "L1 cannot see {}: its path has a blank or a quote",
                    path.display()
                )
            })?;
        line.push_str(&format!(" l1.{option}={path}"));
    }
    Ok(line)
}

/// Whether this very program runs in an L1.
#[must_use]
pub fn is_here() -> bool {
    std::fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.contains(" l1.name="))
}

fn parse_exit(reply: &str, job: u32) -> Option<i32> {
    reply.strip_prefix(&format!("exit {job} "))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_names_the_directories() {
        let line = command_line("l1-1-0", Path::new("/s"), ["/a", "/b"].map(Path::new)).unwrap();
        assert!(
            line.ends_with("l1.name=l1-1-0 l1.share=/s l1.keep=/a l1.keep=/b"),
            "{line}"
        );
    }

    #[test]
    fn a_path_that_the_command_line_would_split_is_refused() {
        assert!(command_line("l1", Path::new("/a b"), ["/a", "/b"].map(Path::new)).is_err());
    }

    #[test]
    fn only_the_exit_of_the_job_in_question_counts() {
        assert_eq!(parse_exit("exit 7 124", 7), Some(124));
        assert_eq!(parse_exit("exit 17 0", 7), None);
        assert_eq!(parse_exit("ready", 7), None);
    }
}
