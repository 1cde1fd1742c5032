//! The program itself, where no machine is needed.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests may do what tests may"
)]

#[path = "commands/disks.rs"]
mod disks;
#[path = "commands/stores.rs"]
mod stores;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::Duration,
};

use saved_state::{Container, CpuIdentity, Header, Kind, Section, SnapshotId};
use serde_json::Value;
use tempfile::TempDir;

/// Names a program that is not there.
const NO_VMM: &str = "/no/such/vmm";

struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fermata"));
        command
            .args(arguments)
            .current_dir(self.path())
            .env("FERMATA_RUN_DIR", self.path().join("run"))
            .env("FERMATA_VMM_BIN", NO_VMM)
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// What serves a tree of its own on `port`.
    fn server(&self, port: &str) -> Command {
        let tree = self.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let mut command = self.command(&["serve", "--port", port, "--root"]);
        command.arg(tree).env("FERMATA_VMM_BIN", "/bin/false");
        command
    }

    /// A server that says on `stderr` what it does, and the address on which it serves.
    fn serve(&self, stderr: impl Into<Stdio>) -> (Child, String) {
        self.serve_with(Path::new("/bin/false"), stderr)
    }

    /// The same, with `vmm` as the program that runs machines.
    fn serve_with(&self, vmm: &Path, stderr: impl Into<Stdio>) -> (Child, String) {
        let mut server = self
            .server("0")
            .env("FERMATA_VMM_BIN", vmm)
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut said = BufReader::new(server.stdout.take().unwrap());
        said.read_line(&mut line).unwrap();
        let (_, address) = line.trim().rsplit_once("http://").unwrap();
        (server, address.to_owned())
    }

    /// What a command that fails says.
    #[track_caller]
    fn refusal(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert_eq!(text(&output.stdout), "", "{output:?}");
        text(&output.stderr)
    }
}

/// A program that takes for ever to make a machine. It is killed when this is dropped.
struct SlowVmm<'a>(&'a Path);

impl<'a> SlowVmm<'a> {
    fn new(dir: &'a Path) -> Self {
        let this = Self(dir);
        let script = "#!/bin/sh\necho $$ > PID.draft; mv PID.draft PID; exec sleep 1000\n";
        let script = script.replace("PID", this.pid().to_str().unwrap());
        fs::write(this.program(), script).unwrap();
        fs::set_permissions(this.program(), fs::Permissions::from_mode(0o700)).unwrap();
        this
    }

    fn program(&self) -> PathBuf {
        self.0.join("vmm")
    }

    fn pid(&self) -> PathBuf {
        self.0.join("pid")
    }

    #[track_caller]
    fn wait_until_started(&self) {
        for _ in 0..6000 {
            if self.pid().exists() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("nobody has started {}", self.program().display());
    }
}

impl Drop for SlowVmm<'_> {
    fn drop(&mut self) {
        let pid = fs::read_to_string(self.pid()).ok();
        let pid = pid.and_then(|pid| pid.trim().parse().ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            // One that has ended is as good.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

fn asked(address: &str, request: &str) -> String {
    let mut client = TcpStream::connect(address).unwrap();
    client.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer
}

fn terminate(process: &Child) {
    let pid = rustix::process::Pid::from_child(process);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn state_file() -> Vec<u8> {
    let mut container = Container::new(Header {
        id: SnapshotId([0xab; 16]),
        release: "0.1.0".to_owned(),
        created_unix_ns: 1_700_000_000_000_000_000,
        host_cpu: CpuIdentity {
            vendor: "GenuineIntel".to_owned(),
            signature: 0x0005_0654,
            brand: "A processor".to_owned(),
        },
        vcpus: 2,
        memory_bytes: 256 << 20,
    });
    for instance in [0, 1] {
        let section = Section {
            kind: Kind(*b"VCPU"),
            instance,
            version: 1,
            payload: vec![0; 100],
        };
        container.insert(section).unwrap();
    }
    container.to_bytes()
}

#[test]
fn no_machine_is_an_empty_list() {
    let bench = Bench::new();
    let output = bench.run(&["ps", "--json"]);
    assert!(output.status.success());
    assert_eq!(text(&output.stdout), "[]\n");
    let output = bench.run(&["ps"]);
    assert!(text(&output.stdout).starts_with("PID"));
}

#[test]
fn an_unknown_machine_is_named_with_the_next_step() {
    let bench = Bench::new();
    for arguments in [
        &["stop", "4294967295"][..],
        &["snapshot", "4294967295", "s", "m"],
        &["snapshot", "1", "s", "m"],
    ] {
        let said = bench.refusal(arguments);
        assert!(
            said.contains(arguments[1]) && said.contains("fermata ps"),
            "{said}"
        );
    }
}

#[test]
fn a_vmm_program_that_is_not_there_is_named() {
    let bench = Bench::new();
    for arguments in [
        &["run", "kernel"][..],
        &["restore", "s", "m"],
        &["restore", "s", "m", "--foreground"],
        &["serve"],
    ] {
        let said = bench.refusal(arguments);
        assert!(said.contains(NO_VMM), "{said}");
        assert!(said.contains("FERMATA_VMM_BIN"), "{said}");
    }
}

#[test]
fn a_state_file_is_shown() {
    let bench = Bench::new();
    fs::write(bench.path().join("s"), state_file()).unwrap();
    let output = bench.run(&["inspect", "s"]);
    assert!(output.status.success(), "{output:?}");
    let shown = text(&output.stdout);
    for expected in [
        "2023-11-14T22:13:20Z",
        "0x00050654",
        "256 MiB",
        "VCPU     1",
    ] {
        assert!(shown.contains(expected), "{expected} in\n{shown}");
    }
    let output = bench.run(&["inspect", "s", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["snapshot"], "ab".repeat(16));
    assert_eq!(report["sections"].as_array().unwrap().len(), 2);
    assert_eq!(report["sections"][0]["bytes"], 100);
    assert_eq!(report.get("damage"), None);
}

#[test]
fn a_damaged_state_file_shows_its_header_and_fails() {
    let bench = Bench::new();
    let mut bytes = state_file();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(bench.path().join("s"), bytes).unwrap();
    let output = bench.run(&["inspect", "s", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["vcpus"], 2);
    assert!(report["damage"].as_str().unwrap().contains("checksum"));
}

#[test]
fn what_is_not_a_state_file_is_refused() {
    let bench = Bench::new();
    fs::write(bench.path().join("x"), "hello").unwrap();
    assert!(
        bench
            .refusal(&["inspect", "x"])
            .contains("not a fermata state file")
    );
    assert!(bench.refusal(&["inspect", "absent"]).contains("absent"));
}

#[test]
fn the_doctor_judges_everything_and_fails_without_a_vmm_program() {
    let bench = Bench::new();
    let findings = |command: &mut Command| -> Vec<(String, String)> {
        let output = command.arg("--json").output().unwrap();
        let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
        let failed = output.status.code() == Some(1);
        let findings: Vec<_> = findings
            .as_array()
            .unwrap()
            .iter()
            .map(|finding| ["what", "verdict"].map(|key| finding[key].as_str().unwrap().to_owned()))
            .map(|[what, verdict]| (what, verdict))
            .collect();
        let any_fails = findings.iter().any(|(_, verdict)| verdict == "fail");
        assert_eq!(failed, any_fails, "{findings:?}");
        findings
    };
    let whole = findings(&mut bench.command(&["doctor"]));
    assert_eq!(whole.len(), 12);
    assert!(
        whole.contains(&("run directory".to_owned(), "ok".to_owned())),
        "{whole:?}"
    );
    assert!(
        whole.contains(&("VMM program".to_owned(), "fail".to_owned())),
        "{whole:?}"
    );
    let output = bench.run(&["doctor"]);
    assert!(text(&output.stdout).contains("FAIL  VMM program"));
}

#[test]
fn the_server_says_where_it_serves_and_ends_when_it_is_told_to() {
    let bench = Bench::new();
    let (mut server, address) = bench.serve(Stdio::null());
    assert!(!address.ends_with(":0"), "{address}");
    let answer = asked(&address, "GET /healthz HTTP/1.0\r\n\r\n");
    assert!(answer.contains(r#""vms":0"#), "{answer}");
    terminate(&server);
    assert!(server.wait().unwrap().success());
}

#[test]
fn a_server_whose_messages_nobody_takes_answers_all_the_same() {
    let bench = Bench::new();
    let full = fs::File::options().write(true).open("/dev/full");
    let (mut server, address) = bench.serve(full.unwrap());
    let request = "POST /create HTTP/1.0\r\nContent-Length: 1\r\n\r\n{";
    let answer = asked(&address, request);
    assert!(answer.starts_with("HTTP/1.0 400 "), "{answer}");
    assert!(answer.contains(r#""error":"bad_request""#), "{answer}");
    terminate(&server);
    assert!(server.wait().unwrap().success());
}

#[test]
fn what_a_command_cannot_say_does_not_change_its_exit_code() {
    let bench = Bench::new();
    let full = fs::File::options().write(true).open("/dev/full");
    let mut command = bench.command(&["stop", "1"]);
    let status = command.stderr(full.unwrap()).status().unwrap();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn a_server_that_is_told_to_end_before_it_has_answered_ends_well() {
    let bench = Bench::new();
    let vmm = SlowVmm::new(bench.path());
    let (mut server, address) = bench.serve_with(&vmm.program(), Stdio::null());
    fs::write(bench.path().join("tree/kernel"), "").unwrap();
    let body = r#"{"kernel_path": "kernel", "resume": false}"#;
    let mut client = TcpStream::connect(address).unwrap();
    let length = body.len();
    write!(
        client,
        "POST /create HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    vmm.wait_until_started();
    terminate(&server);
    assert!(server.wait().unwrap().success());
}

#[test]
fn a_port_in_use_is_an_error() {
    let bench = Bench::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let output = bench.server(&port).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("in use"), "{output:?}");
}

#[test]
fn a_tree_with_the_run_directory_in_it_is_not_served() {
    let bench = Bench::new();
    let mut server = bench
        .command(&["serve", "--port", "0"])
        .env("FERMATA_VMM_BIN", "/bin/false")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut said = BufReader::new(server.stdout.take().unwrap());
    said.read_line(&mut line).unwrap();
    if !line.is_empty() {
        // It would go on for ever.
        server.kill().unwrap();
    }
    let output = server.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{line}{output:?}");
    let said = text(&output.stderr);
    assert!(said.contains("keep them apart"), "{said}");
}

#[test]
fn a_machine_that_takes_long_to_be_made_can_be_ended() {
    let bench = Bench::new();
    let vmm = SlowVmm::new(bench.path());
    let mut run = bench.command(&["run", "kernel"]);
    run.env("FERMATA_VMM_BIN", vmm.program());
    let run = run.stderr(Stdio::piped()).spawn().unwrap();
    vmm.wait_until_started();
    terminate(&run);
    let output = run.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = text(&output.stderr);
    assert!(said.contains("before the machine ran"), "{said}");
}

#[test]
fn a_machine_that_runs_by_the_time_it_is_to_be_ended_is_stopped() {
    let bench = Bench::new();
    let vmm = bench.path().join("vmm");
    // Who started it finds its answer and the signal at once.
    let script = r#"#!/bin/sh
cat > /dev/null
kill -STOP $PPID
echo '{"ready":{"port":1}}'
kill -TERM $PPID
kill -CONT $PPID
exit 13
"#;
    fs::write(&vmm, script).unwrap();
    fs::set_permissions(&vmm, fs::Permissions::from_mode(0o700)).unwrap();
    let mut run = bench.command(&["run", "kernel"]);
    let output = run.env("FERMATA_VMM_BIN", vmm).output().unwrap();
    assert_eq!(output.status.code(), Some(13), "{output:?}");
}

#[test]
fn a_server_whose_machines_could_not_be_does_not_begin() {
    for (option, value) in [("--vcpus", "99"), ("--memory", "1")] {
        let bench = Bench::new();
        let ended = bench.server("0").args([option, value]).output().unwrap();
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        let said = text(&ended.stderr);
        assert!(said.contains(&format!("{value}; ask for")), "{said}");
    }
}
