//! A Linux guest whose console is a virtio console: what it prints there and what is typed at it, before and after a restore.

use std::{
    fs::File,
    io::Write,
    path::Path,
    process::{Child, ChildStdin, Stdio},
};

use api_types::Metric;
use control::Exit;
use serde_json::Value;
use system_tests::{cli::Cli, console::Console, linux, wait};

/// The kernel's messages are the serial port's until there is a virtio console, and only that one's from then on.
const CMDLINE: &str = "earlyprintk=ttyS0 console=hvc0 quiet panic=-1 reboot=t fermata.role=console";

/// What the guest prints at once, as in `resources/guest/init`: the numbers from 1.
const NUMBERS: u64 = 20_000;

/// A machine on this terminal, which is none: keys go in by a pipe, and what is shown goes into a file.
struct Foreground {
    process: Child,
    keys: ChildStdin,
    console: Console,
}

impl Foreground {
    fn start(cli: &Cli, words: &[&str], shown: &Path) -> Self {
        let mut process = cli
            .command(words)
            .stdin(Stdio::piped())
            .stdout(File::create(shown).unwrap())
            .spawn()
            .unwrap();
        let keys = process.stdin.take().unwrap();
        Self {
            process,
            keys,
            console: Console::new(shown),
        }
    }

    /// Waits until the guest has said `words` in a line of their own.
    fn says(&self, words: &str) {
        let expected = format!("fermata-guest: {words}");
        let said = |line: &str| (line == expected).then_some(());
        self.console.first(words, said).unwrap();
    }

    fn types(&mut self, line: &str) {
        writeln!(self.keys, "{line}").unwrap();
    }

    fn ended(&mut self) -> Option<i32> {
        let ended = wait::until("the command to end", || self.process.try_wait().unwrap());
        ended.unwrap().code()
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What machine `pid` counts.
fn metrics(cli: &Cli, pid: &str) -> Vec<Metric> {
    let printed = cli.json(&["metrics", pid, "--json"]).unwrap();
    serde_json::from_value(printed).unwrap()
}

/// The sum of those of a name, with a label of this value.
fn count(metrics: &[Metric], name: &str, label: Option<&str>) -> u64 {
    let named = metrics.iter().filter(|metric| metric.name == name);
    let labelled = named.filter(|metric| {
        label.is_none_or(|label| metric.labels.values().any(|value| value == label))
    });
    labelled.map(|metric| metric.value).sum()
}

/// What the guest has printed of numbers, which are to come without a gap.
fn numbers(text: &str) -> Vec<u64> {
    let lines = text.lines().map(|line| line.trim_end_matches('\r'));
    lines.filter_map(|line| line.parse().ok()).collect()
}

#[test]
fn a_linux_guest_prints_to_a_virtio_console_and_reads_from_it_and_goes_on_after_a_restore() {
    let server = linux::server().unwrap();
    let cli = Cli::new(&server.tree(), &server.run_directory());
    let shown = |name: &str| server.tree().join(name);
    let run = [
        &["run", "vmlinuz", "--initrd", "initrd", "--cmdline", CMDLINE][..],
        &["--vcpus", "2", "--memory", "256"],
        &["--console-device", "virtio"],
    ];
    let mut machine = Foreground::start(&cli, &run.concat(), &shown("first"));
    machine.says("program");
    machine.types("one line");
    machine.says("heard 1 one line");

    let pid = cli.json(&["ps", "--json"]).unwrap()[0]["pid"].to_string();
    let before = metrics(&cli, &pid);
    machine.types("print");
    machine.says("heard 2 print");
    let after = metrics(&cli, &pid);
    let text = machine.console.text();
    assert_eq!(numbers(&text), (1..=NUMBERS).collect::<Vec<_>>());
    // Once, and not by the serial port, too.
    assert_eq!(text.matches("fermata-guest: kernel").count(), 1, "{text}");
    let more = |name, label| count(&after, name, label) - count(&before, name, label);
    let output = "fermata_device_output_bytes_total";
    assert_eq!(more(output, Some("uart0")), 0);
    let printed = more(output, Some("vcon0"));
    let exits = more("fermata_vcpu_exits_total", None);
    println!("{printed} bytes printed with {exits} exits");
    assert!(
        printed > 100_000 && exits < printed / 100,
        "{printed} bytes, {exits} exits"
    );
    assert_eq!(
        count(&after, "fermata_device_input_bytes_total", Some("vcon0")),
        15
    );

    cli.run(&["snapshot", &pid, "state", "memory", "--halt"])
        .unwrap();
    assert_eq!(machine.ended(), Some(Exit::Halted.code().into()));
    let inspected = cli.json(&["inspect", "state", "--json"]).unwrap();
    let sections: &[Value] = inspected["sections"].as_array().unwrap();
    let consoles = sections.iter().filter(|section| section["kind"] == "VCON");
    assert_eq!(consoles.count(), 1, "{inspected}");

    let restore = ["restore", "state", "memory", "--foreground"];
    let mut machine = Foreground::start(&cli, &restore, &shown("second"));
    machine.types("another");
    machine.says("heard 3 another");
    machine.types("print");
    machine.says("heard 4 print");
    let text = machine.console.text();
    assert_eq!(numbers(&text), (1..=NUMBERS).collect::<Vec<_>>());
    machine.keys.write_all(b"\x01x").unwrap();
    assert_eq!(machine.ended(), Some(Exit::Stopped.code().into()));
}
