//! The command line: a machine in the foreground, and the commands that act on it from beside.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    os::fd::OwnedFd,
    path::Path,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
};

use api_types::Metric;
use control::{Exit, LOG_VARIABLE, Registry};
use rustix::{
    fs::{Mode, OFlags},
    process::{Pid, Signal, kill_process},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, tcgetattr},
};
use serde_json::Value;
use system_tests::{bare_metal, cli::Cli, wait};
use tempfile::TempDir;

/// A directory with a kernel, whose machines are ended when it is dropped.
struct Desk {
    directory: TempDir,
}

impl Desk {
    /// A desk with `kernel` on it, unless this machine has no KVM.
    fn new(kernel: &[u8]) -> Option<Self> {
        if !bare_metal::has_kvm() {
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("kernel"), kernel).unwrap();
        Some(Self { directory })
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn registry(&self) -> Registry {
        Registry::open(self.path().join("run")).unwrap()
    }

    fn cli(&self) -> Cli {
        Cli::new(self.path(), &self.path().join("run"))
    }

    fn command(&self, arguments: &[&str]) -> Command {
        self.cli().command(arguments)
    }

    /// The machine that is there, once it is: its guest runs before it is registered.
    fn only_machine(&self) -> Value {
        let listed = || self.json(&["ps", "--json"]).as_array()?.first().cloned();
        wait::until("the machine to be listed", listed).unwrap()
    }

    /// Runs a command that succeeds, and returns what it prints.
    fn run(&self, arguments: &[&str]) -> String {
        self.cli().run(arguments).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        self.cli().json(arguments).unwrap()
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        for record in self.registry().list().unwrap_or_default() {
            if let Ok(Some(process)) = record.process.open() {
                let _ = process.kill();
            }
        }
    }
}

/// A machine in the foreground of a terminal that is none: keys go in and lines come out by pipes.
struct Foreground {
    process: Child,
    keys: ChildStdin,
    lines: Receiver<String>,
}

impl Foreground {
    fn start(desk: &Desk, arguments: &[&str]) -> Self {
        let mut process = desk
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let keys = process.stdin.take().unwrap();
        let out = BufReader::new(process.stdout.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self {
            process,
            keys,
            lines,
        }
    }

    /// The next count that is printed.
    fn count(&self) -> u64 {
        loop {
            let line = self.lines.recv_timeout(wait::PATIENCE).unwrap();
            if let Some(count) = bare_metal::count(line.trim_end()) {
                return count;
            }
        }
    }

    fn ended(&mut self) -> ExitStatus {
        wait::until("the command to end", || self.process.try_wait().unwrap()).unwrap()
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn code(exit: Exit) -> Option<i32> {
    Some(exit.code().into())
}

#[test]
fn a_machine_is_run_saved_restored_and_stopped() {
    let Some(desk) = Desk::new(&bare_metal::counter()) else {
        return;
    };
    let shape = ["--vcpus", "1", "--memory", "64"];
    let mut machine = Foreground::start(&desk, &[&["run", "kernel"], &shape[..]].concat());
    assert_eq!(machine.count(), 1);

    let vm = desk.only_machine();
    assert_eq!(vm["state"], "running");
    assert_eq!(vm["memory_mib"], 64);
    let (pid, port) = (vm["pid"].to_string(), vm["port"].to_string());
    assert!(desk.run(&["ps"]).contains(&pid));

    // By process id, and it goes on; by port, and it ends.
    let report = desk.json(&["snapshot", &pid, "state", "memory", "--json"]);
    assert_eq!(report["memory_bytes"], 64 << 20);
    machine.count();
    desk.run(&["snapshot", &port, "state", "memory", "--halt"]);
    assert_eq!(machine.ended().code(), code(Exit::Halted));
    let cut = machine
        .lines
        .iter()
        .filter_map(|line| bare_metal::count(&line));
    let cut = cut.last();
    assert_eq!(desk.json(&["ps", "--json"]), Value::Array(vec![]));

    let inspected = desk.json(&["inspect", "state", "--json"]);
    assert_eq!(inspected["vcpus"], 1);
    // Which one depends on the host's KVM; a level that was asked for is seen by a Linux guest.
    assert!(inspected["needs_cpu"].is_string(), "{inspected}");
    assert!(!inspected["sections"].as_array().unwrap().is_empty());

    // In the background, and in the foreground from the same files.
    let restored = desk.json(&["restore", "state", "memory", "--json"]);
    let mut machine = Foreground::start(&desk, &["restore", "state", "memory", "--foreground"]);
    let first = machine.count();
    if let Some(cut) = cut {
        // The line that was cut may be the first.
        assert!((cut + 1..=cut + 2).contains(&first), "{first} after {cut}");
    }
    machine.keys.write_all(b"x\x01x").unwrap();
    assert_eq!(machine.ended().code(), code(Exit::Stopped));

    let pid = restored["pid"].to_string();
    assert!(desk.run(&["stop", &pid]).contains("has stopped"));
    assert_eq!(desk.registry().list().unwrap(), []);
}

#[test]
fn what_is_typed_at_a_virtio_console_and_not_read_is_saved_and_restored() {
    let Some(desk) = Desk::new(&bare_metal::counter()) else {
        return;
    };
    // Its guest has no driver for a virtio console, and counts on the serial port.
    let run = ["run", "kernel", "--vcpus", "1", "--memory", "64"];
    let console = ["--console-device", "virtio"];
    let mut machine = Foreground::start(&desk, &[&run[..], &console].concat());
    // How large its console's state is.
    let saved = |machine: &Value| {
        let pid = machine["pid"].to_string();
        desk.run(&["snapshot", &pid, "state", "memory"]);
        let inspected = desk.json(&["inspect", "state", "--json"]);
        let sections = inspected["sections"].as_array().unwrap();
        let section = sections.iter().find(|section| section["kind"] == "VCON");
        section.unwrap()["bytes"].as_u64().unwrap()
    };
    machine.count();
    let vm = desk.only_machine();
    let nothing_typed = saved(&vm);
    machine.keys.write_all(b"typed ahead").unwrap();
    let typed = nothing_typed + 11;
    wait::until("what is typed to be saved", || {
        (saved(&vm) == typed).then_some(())
    })
    .unwrap();
    desk.run(&["stop", &vm["pid"].to_string()]);
    machine.ended();

    let machine = Foreground::start(&desk, &["restore", "state", "memory", "--foreground"]);
    machine.count();
    let vm = desk.only_machine();
    assert_eq!(saved(&vm), typed);
    // And so has who goes on beside it.
    let forks = desk.json(&["fork", &vm["pid"].to_string(), "--json"]);
    assert_eq!(saved(&forks[0]), typed);
}

#[test]
fn a_machine_of_a_template_is_run_and_one_that_cannot_be_is_refused_by_name() {
    let Some(desk) = Desk::new(&bare_metal::counter()) else {
        return;
    };
    let template = |name: &str, text: &str| std::fs::write(desk.path().join(name), text).unwrap();
    let change = |what: &str| format!("[[cpuid]]\nleaf = 1\nregister = \"ecx\"\n{what}\n");
    template("less.toml", &change("clear = \"0x2000\""));
    template(
        "machine.toml",
        "kernel = \"kernel\"\nvcpus = 1\nmemory_mib = 64\ncpu = \"less.toml\"\n",
    );
    let needs = |machine: &[&str]| {
        let mut machine = Foreground::start(&desk, machine);
        machine.count();
        let pid = desk.only_machine()["pid"].to_string();
        desk.run(&["snapshot", &pid, "state", "memory", "--halt"]);
        machine.ended();
        let inspected = desk.json(&["inspect", "state", "--json"]);
        // This host has what it gave.
        let found = desk
            .command(&["doctor", "--snapshot", "./state", "--json"])
            .output()
            .unwrap();
        let found: Value = serde_json::from_slice(&found.stdout).unwrap();
        let last = found.as_array().unwrap().last().unwrap();
        assert_eq!(
            (&last["what"], &last["verdict"]),
            (&"CPU of the snapshot".into(), &"ok".into())
        );
        let level = inspected["needs_cpu"].as_str().unwrap().to_owned();
        (level, inspected["needs_features"].to_string())
    };
    let whole = needs(&["run", "kernel", "--vcpus", "1", "--memory", "64"]);
    let less = needs(&["run", "--config", "machine.toml"]);
    // What every level has is hidden: no level is left, and the rest is named.
    assert_eq!(less.0, "host");
    assert!(!less.1.contains("\"cx16\""), "{less:?}");
    assert_ne!(less, whole);

    template(
        "more.toml",
        "[[cpuid]]\nleaf = 7\nsubleaf = 2\nregister = \"edx\"\nset = 0x80000000\n",
    );
    template("wrong.toml", &change("clears = 1"));
    for (name, said) in [
        ("more.toml", "CPUID 0x7.2 EDX bit 31"),
        ("wrong.toml", "wrong.toml:4:1: unknown field `clears`"),
        ("none.toml", "neither a level of CPUs nor a file"),
    ] {
        let shape = ["--cpu", name, "--vcpus", "1", "--memory", "64"];
        let refused = desk
            .cli()
            .refused(&[&["run", "kernel"], &shape[..]].concat())
            .unwrap();
        assert!(refused.contains(said), "{refused}");
    }
}

#[test]
fn a_foreground_machine_ends_with_its_command_and_its_command_with_it() {
    let Some(desk) = Desk::new(&bare_metal::spinner()) else {
        return;
    };
    let run = ["run", "kernel", "--vcpus", "1", "--memory", "64"];
    let living = || {
        wait::until("the machine to run", || {
            desk.registry().list().unwrap().pop()
        })
        .unwrap()
    };

    // A signal to the command.
    let mut machine = Foreground::start(&desk, &run);
    let record = living();
    kill_process(Pid::from_child(&machine.process), Signal::TERM).unwrap();
    assert_eq!(machine.ended().code(), code(Exit::Stopped));
    assert!(!record.process.is_alive().unwrap());

    // The death of the VMM.
    let mut machine = Foreground::start(&desk, &run);
    living().process.open().unwrap().unwrap().kill().unwrap();
    assert_eq!(machine.ended().code(), code(Exit::Failed));
}

#[test]
fn a_command_whose_output_nobody_reads_ends_all_the_same() {
    let Some(desk) = Desk::new(&bare_metal::babbler()) else {
        return;
    };
    let run = ["run", "kernel", "--vcpus", "1", "--memory", "64"];
    let by_signal = |command: &mut Child| {
        kill_process(Pid::from_child(command), Signal::TERM).unwrap();
    };
    // Ended from beside, it waits for who reads, if all is not in the pipe, but not when it is told to end.
    let from_beside = |command: &mut Child| {
        let pid = desk.only_machine()["pid"].to_string();
        desk.run(&["stop", &pid]);
        kill_process(Pid::from_child(command), Signal::TERM).unwrap();
    };
    for end in [&by_signal as &dyn Fn(&mut Child), &from_beside] {
        let mut command = desk.command(&run);
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut command = command.stderr(Stdio::null()).spawn().unwrap();
        let output = command.stdout.take().unwrap();
        // Not to its last byte: what is written in parts leaves some of its pages partly empty.
        let mut before = 0;
        let full = || {
            let now = rustix::io::ioctl_fionread(&output).unwrap();
            let last = std::mem::replace(&mut before, now);
            (now > 1 << 15 && now == last).then_some(())
        };
        wait::until("the pipe to be full", full).unwrap();
        end(&mut command);
        let ended = wait::until("the command to end", || command.try_wait().unwrap()).unwrap();
        assert_eq!(ended.code(), code(Exit::Stopped));
    }
}

#[test]
fn the_guests_end_is_the_commands() {
    for (kernel, exit) in [
        (bare_metal::power_off(), Exit::PowerOff),
        (bare_metal::reset(), Exit::Reboot),
        (bare_metal::triple_fault(), Exit::TripleFault),
    ] {
        let Some(desk) = Desk::new(&kernel) else {
            return;
        };
        let mut machine = Foreground::start(&desk, &["run", "kernel", "--memory", "64"]);
        assert_eq!(machine.ended().code(), code(exit));
    }
}

#[test]
fn what_is_not_a_kernel_is_refused_in_a_sentence() {
    let Some(desk) = Desk::new(b"hello") else {
        return;
    };
    let output = desk.command(&["run", "kernel"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("kernel"), "{said}");
    assert_eq!(desk.registry().list().unwrap(), []);
}

/// A terminal: the end that a user's fingers and eyes are at, and the end that programs have.
fn terminal() -> (File, OwnedFd) {
    let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&user).unwrap();
    unlockpt(&user).unwrap();
    let name = ptsname(&user, Vec::new()).unwrap();
    let flags = OFlags::RDWR | OFlags::NOCTTY;
    let programs = rustix::fs::open(name.as_c_str(), flags, Mode::empty()).unwrap();
    (user.into(), programs)
}

/// What the serial port of machine `pid` has taken.
fn printed(desk: &Desk, pid: &str) -> u64 {
    let metrics = desk.json(&["metrics", pid, "--json"]);
    let metrics: Vec<Metric> = serde_json::from_value(metrics).unwrap();
    let taken = |metric: &&Metric| metric.name == "fermata_device_output_bytes_total";
    metrics
        .iter()
        .filter(taken)
        .map(|metric| metric.value)
        .sum()
}

/// Far more than what is between a machine and a terminal that nobody reads holds.
const PRINTED: usize = 200_000;

/// A machine at a terminal that nobody reads, once its guest has printed so much. Its VMM says what `log` asks for.
fn unread(desk: &Desk, log: &str) -> (File, Child, String) {
    let (user, programs) = terminal();
    let command = desk
        .command(&["run", "kernel", "--vcpus", "1", "--memory", "64"])
        .env(LOG_VARIABLE, log)
        .stdin(programs.try_clone().unwrap())
        .stdout(programs.try_clone().unwrap())
        .stderr(programs)
        .spawn()
        .unwrap();
    let pid = desk.only_machine()["pid"].to_string();
    let enough = || (printed(desk, &pid) > PRINTED as u64).then_some(());
    wait::until("the guest to print", enough).unwrap();
    (user, command, pid)
}

#[test]
fn nothing_waits_for_a_terminal_that_is_not_read_and_it_gets_all_once_it_is() {
    let Some(desk) = Desk::new(&bare_metal::babbler()) else {
        return;
    };
    let (mut user, mut command, pid) = unread(&desk, "warn");
    desk.run(&["snapshot", &pid, "state", "memory"]);

    let mut seen = BufReader::new(user.try_clone().unwrap());
    let mut greeting = Vec::new();
    seen.read_until(b'\n', &mut greeting).unwrap();
    let mut digits = vec![0; PRINTED];
    seen.read_exact(&mut digits).unwrap();
    let expected = (b'0'..=b'7').cycle();
    assert!(
        expected
            .zip(&digits)
            .all(|(expected, digit)| expected == *digit)
    );
    user.write_all(b"\x01x").unwrap();
    thread::spawn(move || std::io::copy(&mut seen, &mut std::io::sink()));
    wait::until("the command to end", || command.try_wait().unwrap()).unwrap();
}

#[test]
fn a_machine_whose_terminal_is_not_read_stops_by_itself() {
    let Some(desk) = Desk::new(&bare_metal::babbler()) else {
        return;
    };
    // Of its end the VMM says a word, which nobody takes.
    let (user, mut command, pid) = unread(&desk, "info");
    let said = desk.run(&["stop", &pid]);
    assert!(said.contains("has stopped"), "{said}");
    // The command waits until somebody reads.
    command.kill().unwrap();
    command.wait().unwrap();
    drop(user);
}

#[test]
fn the_terminal_is_as_it_was_whatever_ends_the_machine() {
    let ends: [fn(&Desk, &mut File, &Child); 3] = [
        |_, user, _| user.write_all(b"\x01x").unwrap(),
        |_, _, command| kill_process(Pid::from_child(command), Signal::HUP).unwrap(),
        |desk, _, _| {
            let record = desk.registry().list().unwrap().pop().unwrap();
            record.process.open().unwrap().unwrap().kill().unwrap();
        },
    ];
    for end in ends {
        let Some(desk) = Desk::new(&bare_metal::counter()) else {
            return;
        };
        let (mut user, programs) = terminal();
        let canonical = || {
            let modes = tcgetattr(&programs).unwrap().local_modes;
            modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
        };
        assert!(canonical());
        let mut command = desk
            .command(&["run", "kernel", "--vcpus", "1", "--memory", "64"])
            .stdin(programs.try_clone().unwrap())
            .stdout(programs.try_clone().unwrap())
            .stderr(programs.try_clone().unwrap())
            .spawn()
            .unwrap();
        let mut eyes = user.try_clone().unwrap();
        // Somebody has to look, or the command waits for room on the terminal.
        let seen = thread::spawn(move || {
            let mut seen = Vec::new();
            let _ = eyes.read_to_end(&mut seen);
            seen
        });
        wait::until("the terminal to be raw", || (!canonical()).then_some(())).unwrap();
        end(&desk, &mut user, &command);
        wait::until("the command to end", || command.try_wait().unwrap()).unwrap();
        assert!(canonical());
        drop(programs);
        let seen = String::from_utf8_lossy(&seen.join().unwrap()).into_owned();
        assert!(seen.contains("Ctrl-A x"), "{seen:?}");
    }
}
