//! Programs that are not a VMM, started as one: each is an error that says so, and none is left behind.

#![allow(clippy::unwrap_used, reason = "helpers of tests may do what tests may")]

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use control::{
    Console, Errand, FailureKind, GuestClock, HotImage, LaunchSpec, Log, Origin, Pool, Prepare,
    ProcessId, Registry, Secret, Shape, Source, SpawnError, Spawned, spawn,
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
            hugepages: false,
            on_demand: false,
            working_set: control::UseWorkingSet::default(),
            paused: false,
            clock: GuestClock::StandStill,
            confinement: None,
            net_changes: Vec::new(),
            disk_directory: None,
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
    let errand = serde_json::from_slice(&fs::read(copy).unwrap());
    let Errand::Run(spec) = errand.unwrap() else {
        panic!("it is another errand");
    };
    assert_eq!(spec.secret, bench.spec.secret);
    assert_eq!(spec.origin, bench.spec.origin);
    let id = ProcessId::alive(vmm.pid).unwrap().unwrap();
    drop(vmm);
    let process = id.open().unwrap().expect("it lives on");
    process.kill().unwrap();
    assert!(process.ended_within(BOUND).await.unwrap());
}

#[tokio::test]
async fn one_that_has_no_record_is_ended_by_who_started_it() {
    let bench = Bench::new();
    let program = bench.script(r#"cat > /dev/null; echo '{"ready":{"port":1}}'; exec sleep 1000"#);
    let mut vmm = bench.spawn(&program, BOUND).await.unwrap();
    let registry = Registry::open(&bench.spec.registry).unwrap();
    assert_eq!(registry.find_pid(vmm.pid).unwrap(), None);
    let grace = Duration::from_millis(200);
    let status = vmm.stop(&bench.spec.secret, grace).await.unwrap();
    assert_eq!(status.signal(), Some(9));
}

#[tokio::test]
async fn one_that_does_not_answer_is_killed_without_a_further_wait() {
    let bench = Bench::new();
    // Who connects waits, as for a VMM that is frozen.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let program = bench.script(&format!(
        r#"cat > /dev/null; echo '{{"ready":{{"port":{port}}}}}'; exec sleep 1000"#
    ));
    let mut vmm = bench.spawn(&program, BOUND).await.unwrap();
    let stopped = tokio::time::timeout(BOUND, vmm.stop(&bench.spec.secret, 2 * BOUND)).await;
    assert_eq!(stopped.unwrap().unwrap().signal(), Some(9));
}

/// A program that does every errand as a VMM would, but for the machine.
const OBEDIENT: &str = r#"while read -r line; do case $line in
    *prepare*) echo '"prepared"';;
    *image*) echo '{"written":{"vcpus":1,"memory_mib":64}}'; exit;;
    *make*) echo '"made"';;
    *) echo '{"ready":{"port":4711}}'; exec sleep 1000;;
esac; done"#;

/// The processes that live and have a log.
fn living(bench: &Bench) -> Vec<u32> {
    let names = fs::read_dir(&bench.spec.registry).unwrap();
    let pids = names.filter_map(|entry| entry.unwrap().path().file_stem()?.to_str()?.parse().ok());
    let lives = |pid: &u32| ProcessId::alive(*pid).unwrap().is_some();
    pids.filter(lives).collect()
}

/// Waits until so many processes live.
async fn until_living(bench: &Bench, count: usize) {
    for _ in 0..600 {
        if living(bench).len() == count {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(living(bench).len(), count);
}

#[tokio::test]
async fn a_pool_gives_what_is_prepared_and_then_what_is_new() {
    let bench = Bench::new();
    let program = bench.script(OBEDIENT);
    let source = Source::files("/s", "/m");
    let image = HotImage::of_saved(&program, &bench.spec.registry, source, None, BOUND);
    let image = image.await.unwrap();
    let shape = image.shape();
    assert_eq!((shape.vcpus, shape.memory_mib), (1, 64));
    let pool = Pool::new(&program, &bench.spec.registry, 2).unwrap();
    pool.fill(Prepare::Shape(shape)).await;
    pool.fill(Prepare::Shape(shape)).await;
    let prepared = living(&bench);
    assert_eq!(prepared.len(), 2);
    let specs = vec![bench.spec.clone(); 3];
    let mut forks = pool.fork(&image, specs, BOUND).await.unwrap();
    let pids: Vec<_> = forks.iter().map(|fork| fork.pid).collect();
    assert!(
        prepared.iter().all(|pid| pids.contains(pid)),
        "{pids:?} {prepared:?}"
    );
    // What has ended while it waited is passed over.
    pool.fill(Prepare::Shape(shape)).await;
    let waiting = living(&bench).into_iter().filter(|pid| !pids.contains(pid));
    for pid in waiting {
        let process = ProcessId::alive(pid)
            .unwrap()
            .unwrap()
            .open()
            .unwrap()
            .unwrap();
        process.kill().unwrap();
        process.ended_within(BOUND).await.unwrap();
    }
    let one = pool.fork(&image, vec![bench.spec.clone()], BOUND).await;
    forks.extend(one.unwrap());
    // Those for another size take the place of those for this one, and all end with the pool.
    pool.fill(Prepare::Shape(shape)).await;
    let larger = Shape { vcpus: 2, ..shape };
    pool.fill(Prepare::Shape(larger)).await;
    drop(pool);
    until_living(&bench, forks.len()).await;
    for fork in &mut forks {
        fork.child.kill().await.unwrap();
    }
}

#[tokio::test]
async fn what_is_prepared_for_an_image_is_for_its_forks_alone() {
    let bench = Bench::new();
    let program = bench.script(OBEDIENT);
    let image = || {
        let (registry, source) = (&bench.spec.registry, Source::files("/s", "/m"));
        let image = HotImage::of_saved(&program, registry, source, None, BOUND);
        async { Arc::new(image.await.unwrap()) }
    };
    let (one, other) = (image().await, image().await);
    let pool = Pool::new(&program, &bench.spec.registry, 2).unwrap();
    pool.fill(Prepare::Image(Arc::clone(&one))).await;
    let prepared = living(&bench);
    assert_eq!(prepared.len(), 2);
    let specs = |count| vec![bench.spec.clone(); count];
    let mut others = pool.fork(&other, specs(1), BOUND).await.unwrap();
    others.push(pool.spawn(&bench.spec, BOUND).await.unwrap());
    assert!(others.iter().all(|other| !prepared.contains(&other.pid)));
    let mut forks = pool.fork(&one, specs(2), BOUND).await.unwrap();
    assert!(forks.iter().all(|fork| prepared.contains(&fork.pid)));
    // What is prepared for something else ends.
    pool.fill(Prepare::Image(one)).await;
    pool.fill(Prepare::Image(other)).await;
    until_living(&bench, forks.len() + others.len() + 2).await;
    for started in forks.iter_mut().chain(&mut others) {
        started.child.kill().await.unwrap();
    }
}
