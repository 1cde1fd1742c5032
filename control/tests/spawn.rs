//! Programs that are not a VMM, started as one: each is an error that says so, and none is left behind.

#![allow(clippy::unwrap_used, reason = "helpers of tests may do what tests may")]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use control::{
    Console, FailureKind, GuestClock, LaunchSpec, Log, Origin, ProcessId, Registry, Secret, Source,
    SpawnError, Spawned, spawn,
};
use tempfile::TempDir;

/// Far more than anything here takes.
const BOUND: Duration = Duration::from_secs(60);

struct Bench {
    dir: TempDir,
    spec: LaunchSpec,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let spec = LaunchSpec {
            secret: Secret::random().unwrap(),
            origin: Origin::Restore(Source::files("/s", "/m")),
            console: Console::File(dir.path().join("console")),
            registry: dir.path().join("run"),
            paused: false,
            clock: GuestClock::StandStill,
            confinement: None,
            net_changes: Vec::new(),
            vsock_change: control::VsockChange::default(),
        };
        Self { dir, spec }
    }

    fn script(&self, body: &str) -> PathBuf {
        let path = self.dir.path().join("program");
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        path
    }

    async fn spawn(&self, program: &Path, deadline: Duration) -> Result<Spawned, SpawnError> {
        spawn(program, &self.spec, Log::File, deadline).await
    }
}

#[tokio::test]
async fn a_program_that_is_not_there() {
    let bench = Bench::new();
    let error = bench.spawn(Path::new("/no/such/program"), BOUND).await;
    assert!(
        matches!(error, Err(SpawnError::Program { .. })),
        "{error:?}"
    );
    let left: Vec<_> = fs::read_dir(&bench.spec.registry).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn a_program_that_ends_without_a_word_leaves_its_log() {
    let bench = Bench::new();
    let program = bench.script("echo too early >&2; exit 3");
    match bench.spawn(&program, BOUND).await {
        Err(SpawnError::Died { pid, status }) => {
            assert_eq!(status.code(), Some(3));
            let log = Registry::open(&bench.spec.registry).unwrap().log_of(pid);
            assert_eq!(fs::read_to_string(log).unwrap(), "too early\n");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_program_that_says_nothing_is_killed() {
    let bench = Bench::new();
    let program = bench.script("exec sleep 1000");
    match bench.spawn(&program, Duration::from_millis(200)).await {
        Err(SpawnError::Deadline { pid, .. }) => {
            assert_eq!(ProcessId::alive(pid).unwrap(), None);
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_program_that_says_something_else() {
    let bench = Bench::new();
    let program = bench.script("cat > /dev/null; echo hello");
    let error = bench.spawn(&program, BOUND).await;
    assert!(
        matches!(error, Err(SpawnError::Protocol { .. })),
        "{error:?}"
    );
}

#[tokio::test]
async fn an_endless_answer_is_not_read_to_its_end() {
    let bench = Bench::new();
    let program = bench.script("cat > /dev/null; exec cat /dev/zero");
    let error = bench.spawn(&program, BOUND).await;
    assert!(
        matches!(error, Err(SpawnError::Protocol { .. })),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_refusal_is_passed_on() {
    let bench = Bench::new();
    let program = bench.script(
        r#"cat > /dev/null; echo '{"failed":{"kind":"no_space","message":"full"}}'; exit 1"#,
    );
    match bench.spawn(&program, BOUND).await {
        Err(SpawnError::Refused(failure)) => assert_eq!(failure.kind, FailureKind::NoSpace),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_spec_arrives_whole_and_the_child_outlives_its_handle() {
    let bench = Bench::new();
    let copy = bench.dir.path().join("spec");
    let program = bench.script(&format!(
        r#"cat > {}; echo '{{"ready":{{"port":4711}}}}'; exec sleep 1000"#,
        copy.display()
    ));
    let vmm = bench.spawn(&program, BOUND).await.unwrap();
    assert_eq!(vmm.port, 4711);
    let spec: LaunchSpec = serde_json::from_slice(&fs::read(copy).unwrap()).unwrap();
    assert_eq!(spec.secret, bench.spec.secret);
    assert_eq!(spec.origin, bench.spec.origin);
    let id = ProcessId::alive(vmm.pid).unwrap().unwrap();
    drop(vmm);
    let process = id.open().unwrap().expect("it lives on");
    process.kill().unwrap();
    assert!(process.ended_within(BOUND).await.unwrap());
}
