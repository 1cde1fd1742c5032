//! What the server answers where no machine is needed: every refusal is JSON, has the right status, says
//! what to do, and the server lives on.

#![allow(clippy::unwrap_used, reason = "helpers of tests may do what tests may")]

use std::{
    fs,
    net::{Ipv4Addr, TcpListener},
    path::Path,
    process::{Child, Command},
    sync::mpsc,
    thread,
};

use api_server::{ServerConfig, rocket as server};
use api_types::{ErrorBody, ErrorCode, Health};
use control::{
    Console, Origin, ProcessId, Record, Registration, Registry, Secret, Source, StoreLocation,
};
use rocket::{
    fairing::AdHoc,
    http::{Method, Status},
    local::blocking::Client,
};
use tempfile::TempDir;

/// A tree `tree/` with a `kernel`, and a run directory.
fn config(dir: &Path, vmm: &str) -> ServerConfig {
    let root = dir.join("tree");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("kernel"), "not really").unwrap();
    ServerConfig {
        run_dir: dir.join("run"),
        ..ServerConfig::new(root, vmm)
    }
}

struct Bench {
    client: Client,
    dir: TempDir,
}

impl Bench {
    fn new(vmm: &str) -> Self {
        Self::with(vmm, |_| {})
    }

    fn with(vmm: &str, change: impl FnOnce(&mut ServerConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path(), vmm);
        change(&mut config);
        Self {
            client: Client::tracked(server(config).unwrap()).unwrap(),
            dir,
        }
    }

    #[track_caller]
    fn refusal(&self, method: Method, path: &str, body: &str) -> ErrorBody {
        let answer = self.client.req(method, path).body(body).dispatch();
        let status = answer.status();
        let text = answer.into_string().unwrap();
        let error: ErrorBody = serde_json::from_str(&text).unwrap_or_else(|e| {
            unreachable!("{method} {path} {body} was answered {status} {text}: {e}")
        });
        assert_eq!(status.code, error.error.status(), "{error:?}");
        assert_eq!(self.client.get("/healthz").dispatch().status(), Status::Ok);
        error
    }
}

const BOOT: &str = r#"{"cpu_snapshot_path": "", "memory_snapshot_path": "", "kernel_path": "kernel",
    "resume": false, "config": {"username": "u", "password": "hunter2", "id": 10}}"#;

#[test]
fn a_server_whose_store_is_gone_is_not_well() {
    let elsewhere = tempfile::tempdir().unwrap();
    let directory = elsewhere.path().join("store");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("config"), "").unwrap();
    let bench = Bench::with("/bin/false", |config| {
        config.store = Some(StoreLocation {
            directory: directory.clone(),
            key_file: None,
        });
    });
    let health = || bench.client.get("/healthz").dispatch();
    assert_eq!(health().status(), Status::Ok);
    fs::remove_dir_all(&directory).unwrap();
    let answer = health();
    assert_eq!(answer.status(), Status::InternalServerError);
    assert!(answer.into_string().unwrap().contains("bring it back"));
}

#[test]
fn every_refusal_has_its_status_and_says_what_to_do() {
    use ErrorCode::{BadRequest, NotFound};
    use Method::{Delete, Get, Post, Put};

    let bench = Bench::new("/no/such/vmm");
    let cases = [
        (Post, "/create", "", BadRequest, "JSON"),
        (Post, "/create", "{", BadRequest, "JSON"),
        (Post, "/create", "[]", BadRequest, "JSON"),
        (Post, "/create", "{\"resume\": \u{7f}}", BadRequest, "JSON"),
        (
            Post,
            "/create",
            r#"{"kernel_path": "kernel"}"#,
            BadRequest,
            "resume",
        ),
        (
            Post,
            "/create",
            r#"{"kernel_path": 7, "resume": false}"#,
            BadRequest,
            "string",
        ),
        (
            Post,
            "/create",
            r#"{"kernel_path": "", "resume": false}"#,
            BadRequest,
            "kernel_path",
        ),
        (
            Post,
            "/create",
            r#"{"kernel_path": "none", "resume": false}"#,
            NotFound,
            "none",
        ),
        (
            Post,
            "/create",
            r#"{"kernel_path": "/etc/hostname", "resume": false}"#,
            BadRequest,
            "tree",
        ),
        (
            Post,
            "/create",
            r#"{"kernel_path": "../run", "resume": false}"#,
            BadRequest,
            "tree",
        ),
        (Post, "/snapshot", "{", BadRequest, "JSON"),
        (
            Post,
            "/snapshot",
            r#"{"rpc_port": 1}"#,
            BadRequest,
            "cpu_snapshot_path",
        ),
        (
            Post,
            "/snapshot",
            r#"{"cpu_snapshot_path": "s", "memory_snapshot_path": "m", "rpc_port": 70000, "resume": true}"#,
            BadRequest,
            "70000",
        ),
        (
            Post,
            "/snapshot",
            r#"{"cpu_snapshot_path": "s", "memory_snapshot_path": "m", "rpc_port": 1, "resume": true}"#,
            NotFound,
            "no VM has port 1",
        ),
        (
            Post,
            "/snapshot",
            r#"{"cpu_snapshot_path": "s", "memory_snapshot_path": "s", "rpc_port": 1, "resume": true}"#,
            BadRequest,
            "same file",
        ),
        (
            Post,
            "/snapshot",
            r#"{"cpu_snapshot_path": "no/s", "memory_snapshot_path": "m", "rpc_port": 1, "resume": true}"#,
            NotFound,
            "directory",
        ),
        (
            Post,
            "/snapshot",
            r#"{"cpu_snapshot_path": "/tmp/s", "memory_snapshot_path": "m", "rpc_port": 1, "resume": true}"#,
            BadRequest,
            "tree",
        ),
        (Get, "/vms/1", "", NotFound, "GET /vms"),
        (Get, "/vms/1/metrics", "", NotFound, "GET /vms"),
        (Get, "/vms/x", "", BadRequest, "process id"),
        (Get, "/vms/-1", "", BadRequest, "process id"),
        (Get, "/vms/4294967296", "", BadRequest, "process id"),
        (Delete, "/vms/1", "", NotFound, "GET /vms"),
        (Post, "/vms/1/pause", "", NotFound, "GET /vms"),
        (Post, "/vms/x/pause", "", BadRequest, "process id"),
        (Post, "/vms/1/resume", "", NotFound, "GET /vms"),
        (Post, "/vms/1/resume?clock=follow", "", NotFound, "GET /vms"),
        (
            Post,
            "/vms/1/resume?clock=back",
            "",
            BadRequest,
            "stand-still or follow",
        ),
        (Get, "/nothing", "", NotFound, "openapi.json"),
        (Put, "/vms", "", NotFound, "openapi.json"),
        (Get, "/create", "", NotFound, "openapi.json"),
    ];
    for (method, path, body, code, said) in cases {
        let error = bench.refusal(method, path, body);
        assert_eq!(error.error, code, "{method} {path} {body}: {error:?}");
        assert!(
            error.message.contains(said),
            "{method} {path} {body}: {error:?}"
        );
    }
}

#[test]
fn a_request_without_end_is_too_large() {
    let bench = Bench::new("/no/such/vmm");
    let body = format!("{{\"cmdline\": \"{}\"}}", "x".repeat(1 << 20));
    let error = bench.refusal(Method::Post, "/create", &body);
    assert_eq!(error.error, ErrorCode::TooLarge);
}

#[test]
fn a_vmm_that_cannot_be_run_is_the_hosts_fault() {
    let bench = Bench::new("/no/such/vmm");
    let error = bench.refusal(Method::Post, "/create", BOOT);
    assert_eq!(error.error, ErrorCode::Internal);
    assert!(error.message.contains("/no/such/vmm"), "{error:?}");
}

#[test]
fn a_vmm_that_dies_at_once_is_told_and_survived() {
    let bench = Bench::new("/bin/false");
    let error = bench.refusal(Method::Post, "/create", BOOT);
    assert_eq!(error.error, ErrorCode::VmmLost);
    assert!(error.message.contains("exit status: 1"), "{error:?}");
    assert_eq!(
        bench.client.get("/vms").dispatch().into_string().unwrap(),
        "[]"
    );
}

#[test]
fn a_program_that_is_no_vmm_is_recognised() {
    // `cat` answers with the launch spec itself, secret and all.
    let bench = Bench::new("/bin/cat");
    let error = bench.refusal(Method::Post, "/create", BOOT);
    assert_eq!(error.error, ErrorCode::Internal);
    assert!(error.message.contains("launch protocol"), "{error:?}");
    assert!(!error.message.contains("hunter2"), "{error:?}");
}

#[test]
fn there_is_a_limit_of_machines() {
    let bench = Bench::with("/no/such/vmm", |config| config.limits.vms = 0);
    let error = bench.refusal(Method::Post, "/create", BOOT);
    assert_eq!(error.error, ErrorCode::TooManyVms);
}

#[test]
fn a_failed_launch_does_not_count_against_the_limit() {
    let bench = Bench::with("/bin/false", |config| config.limits.vms = 1);
    for _ in 0..3 {
        let error = bench.refusal(Method::Post, "/create", BOOT);
        assert_eq!(error.error, ErrorCode::VmmLost);
    }
}

#[test]
fn a_tree_or_run_directory_that_is_not_there_is_an_error_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), "/no/such/vmm");
    config.run_dir = "/proc/no".into();
    assert!(server(config.clone()).is_err());
    config.run_dir = dir.path().join("run");
    config.root = dir.path().join("absent");
    assert!(server(config).is_err());
}

#[test]
fn machines_are_not_written_down_where_clients_could_read_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), "/no/such/vmm");
    std::os::unix::fs::symlink(&config.root, dir.path().join("link")).unwrap();
    for inside in ["tree/run", "link/run"] {
        config.run_dir = dir.path().join(inside);
        let refused = server(config.clone()).map(drop).unwrap_err();
        assert!(refused.to_string().contains("keep them apart"), "{refused}");
        assert!(!config.run_dir.exists());
    }
    // Nor may the tree lie among them.
    config.run_dir = dir.path().join("run");
    config.root = config.run_dir.join("tree");
    Registry::open(&config.run_dir).unwrap();
    fs::create_dir(&config.root).unwrap();
    assert!(server(config).is_err());
}

/// The same server behind a real socket, as a client without a library for it would speak to it.
#[test]
fn a_real_connection_gets_the_same_answers() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, port) = mpsc::channel();
    let (shutdowns, shutdown) = mpsc::channel();
    let rocket = server(config(dir.path(), "/no/such/vmm"))
        .unwrap()
        .attach(AdHoc::on_liftoff("tell", move |rocket| {
            Box::pin(async move {
                ports.send(rocket.config().port).unwrap();
                shutdowns.send(rocket.shutdown()).unwrap();
            })
        }));
    let served = thread::spawn(|| rocket::execute(rocket.launch()).is_ok());
    let url = format!("http://127.0.0.1:{}", port.recv().unwrap());
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .build()
        .into();

    let mut answer = agent.get(format!("{url}/healthz")).call().unwrap();
    assert_eq!(answer.status(), 200);
    let health: Health = answer.body_mut().read_json().unwrap();
    assert_eq!(health.vms, 0);

    let mut answer = agent.get(format!("{url}/openapi.json")).call().unwrap();
    let document = answer.body_mut().read_to_string().unwrap();
    assert_eq!(document, api_server::document());

    let body =
        r#"{"cpu_snapshot_path": "s", "memory_snapshot_path": "m", "rpc_port": 9, "resume": true}"#;
    let mut answer = agent.post(format!("{url}/snapshot")).send(body).unwrap();
    assert_eq!(answer.status(), 404);
    let error: ErrorBody = answer.body_mut().read_json().unwrap();
    assert_eq!(error.error, ErrorCode::NotFound);

    shutdown.recv().unwrap().notify();
    assert!(served.join().unwrap());
}

#[test]
fn requests_of_web_pages_are_refused() {
    let asked_by = |address: &str, host: &'static str, header: Option<(&'static str, &str)>| {
        let bench = Bench::with("/no/such/vmm", |config| {
            config.address = address.parse().unwrap();
        });
        let mut request = bench.client.get("/vms");
        let host = rocket::http::uri::Host::new(rocket::http::uri::Authority::parse(host).unwrap());
        request.inner_mut().set_host(host);
        if let Some((name, value)) = header {
            request.add_header(rocket::http::Header::new(name, value.to_owned()));
        }
        request.dispatch().status().code
    };
    let own = ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "10.0.0.7"];
    for host in own {
        assert_eq!(asked_by("127.0.0.1", host, None), 200, "{host}");
    }
    // A page that was got by another name is of the same origin for its browser.
    assert_eq!(asked_by("127.0.0.1", "rebound.example:8000", None), 403);
    assert_eq!(asked_by("0.0.0.0", "fermata.example:8000", None), 200);
    for (header, status) in [
        (("Origin", "https://a.example"), 403),
        (("Origin", "null"), 403),
        (("Sec-Fetch-Site", "cross-site"), 403),
        (("Sec-Fetch-Site", "none"), 200),
    ] {
        let asked = asked_by("127.0.0.1", "localhost:8000", Some(header));
        assert_eq!(asked, status, "{header:?}");
    }
    // Neither what a script may send without leave nor a form's own idea of a method.
    let bench = Bench::new("/no/such/vmm");
    for (kind, path, body) in [
        ("text/plain", "/create", "{}"),
        (
            "application/x-www-form-urlencoded",
            "/vms/1",
            "_method=delete",
        ),
    ] {
        let request = bench.client.post(path).body(body);
        let request = request.header(rocket::http::Header::new("Content-Type", kind));
        let answer = request
            .header(rocket::http::Header::new("Origin", "https://a.example"))
            .dispatch();
        assert_eq!(answer.status().code, 403);
        let error: ErrorBody = answer.into_json().unwrap();
        assert_eq!(error.error, ErrorCode::Forbidden);
    }
}

/// A process that lives for so many seconds, and its record: its control service is on `port`.
fn machine(bench: &Bench, seconds: &str, port: u16) -> (Child, Registration) {
    let process = Command::new("sleep").arg(seconds).spawn().unwrap();
    let record = Record {
        process: ProcessId::alive(process.id()).unwrap().unwrap(),
        port,
        secret: Secret::random().unwrap(),
        origin: Origin::Restore(Source::files("/s", "/m")),
        console: Console::Terminal,
        vcpus: 1,
        memory_mib: 64,
    };
    let registry = Registry::open(bench.dir.path().join("run")).unwrap();
    (process, registry.register(&record).unwrap())
}

#[test]
fn a_machine_that_is_just_ending_is_not_there_and_one_that_is_silent_is() {
    let bench = Bench::new("/no/such/vmm");
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = closed.local_addr().unwrap().port();
    drop(closed);
    let (mut ending, _written) = machine(&bench, "1", port);
    let path = format!("/vms/{}/pause", ending.id());
    let error = bench.refusal(Method::Post, &path, "");
    assert_eq!(error.error, ErrorCode::NotFound, "{error:?}");
    ending.wait().unwrap();

    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = silent.local_addr().unwrap().port();
    let (mut frozen, _written) = machine(&bench, "600", port);
    let path = format!("/vms/{}/pause", frozen.id());
    let error = bench.refusal(Method::Post, &path, "");
    assert_eq!(error.error, ErrorCode::Deadline, "{error:?}");
    frozen.kill().unwrap();
    frozen.wait().unwrap();
}
