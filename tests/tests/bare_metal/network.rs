//! What a machine's network device is attached to, from the request to the snapshot and back. The guests
//! do not use theirs: that is for Linux guests.

use std::{
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use control::{
    AfterSnapshot, Client, Console, CpuModel, Destination, GuestClock, LaunchSpec, Log,
    MachineConfig, NetAttachment, NetConfig, Origin, RateLimit, Registry, Secret, SnapshotRequest,
    spawn,
};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept, bind, listen, socket_with,
};
use serde_json::{Value, json};
use system_tests::{bare_metal, cli::Cli, http::Machine, programs, server::Server};

use crate::server;

/// Something that machines connect to.
pub(crate) struct Switch {
    pub(crate) path: PathBuf,
    socket: OwnedFd,
}

impl Switch {
    pub(crate) fn new(path: &Path) -> Self {
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::NONBLOCK);
        // No machine may keep it open.
        let flags = flags | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, kind, flags, None).unwrap();
        bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        listen(&socket, 4).unwrap();
        let path = path.to_owned();
        Self { path, socket }
    }

    /// Whether a machine has connected since this was last asked.
    pub(crate) fn connected(&self) -> bool {
        accept(&self.socket).is_ok()
    }
}

/// Boots a machine with a network device on `switch`, saves it, and ends it.
fn saved_on(server: &Server, switch: &Switch) {
    let registry = Registry::open(server.run_directory()).unwrap();
    let secret = Secret::random().unwrap();
    let config = MachineConfig {
        vcpus: 1,
        memory_mib: 64,
        cpu: CpuModel::Host,
        kernel: server.tree().join("kernel"),
        initrd: None,
        cmdline: String::new(),
        disks: Vec::new(),
        nets: vec![NetConfig {
            attachment: NetAttachment::Socket(switch.path.clone()),
            mac: None,
            receive_limit: RateLimit::default(),
            send_limit: RateLimit::default(),
        }],
        vsock: None,
        balloon: None,
        console_device: control::ConsoleDevice::default(),
    };
    let spec = LaunchSpec {
        secret: secret.clone(),
        origin: Origin::Boot(config),
        console: Console::File(registry.new_console().unwrap()),
        registry: server.run_directory(),
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
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let bound = Duration::from_secs(120);
        let spawned = spawn(&programs::vmm(), &spec, Log::File, bound)
            .await
            .unwrap();
        assert!(switch.connected());
        let shown = server.client.vm(spawned.pid).unwrap();
        let shown = serde_json::to_value(shown).unwrap();
        let socket = switch.path.display().to_string();
        assert_eq!(shown["origin"]["nets"], json!([{"socket_path": socket}]));
        let client = Client::connect(spawned.port, &secret).await.unwrap();
        let path = |name: &str| server.tree().join(name);
        let request = SnapshotRequest::new(
            Destination::files(path("state"), path("memory")),
            AfterSnapshot::Halt,
        );
        client.snapshot(request).await.unwrap();
    });
}

#[test]
fn a_restored_machine_is_attached_to_what_it_was_or_to_what_is_named() {
    let Some(server) = server() else { return };
    fs::write(server.tree().join("kernel"), bare_metal::counter()).unwrap();
    let first = Switch::new(&server.tree().join("first"));
    let second = Switch::new(&server.tree().join("second"));
    saved_on(&server, &first);
    let cli = Cli::new(&server.tree(), &server.run_directory());
    let restore = |more: &[&str]| {
        let words = [&["restore", "state", "memory", "--json"][..], more].concat();
        cli.json(&words).unwrap()["pid"].as_u64().unwrap()
    };
    restore(&[]);
    assert!(first.connected() && !second.connected());
    let named = format!("socket={}", second.path.display());
    restore(&["--net", &named]);
    assert!(!first.connected() && second.connected());
    let words = ["restore", "state", "memory"];
    let refused = |more: &[&str]| cli.refused(&[&words[..], more].concat()).unwrap();
    let said = refused(&["--net", "tap=fermata-none"]);
    assert!(
        said.contains("there is no TAP device fermata-none"),
        "{said}"
    );
    let said = refused(&["--net", "saved", "--net", "tap=a"]);
    assert!(
        said.contains("1 network devices, and 2 were named"),
        "{said}"
    );
    drop(first);
    let said = refused(&[]);
    assert!(said.contains("start what listens on it"), "{said}");
}

#[test]
fn a_server_attaches_no_machine_because_its_state_file_says_so() {
    let Some(server) = server() else { return };
    fs::write(server.tree().join("kernel"), bare_metal::counter()).unwrap();
    let switch = Switch::new(&server.tree().join("switch"));
    saved_on(&server, &switch);
    let create = |body: Value| server.client.post("/create", &body).unwrap();
    let restore = |tap: Value| {
        create(json!({
            "cpu_snapshot_path": server.path("state"),
            "memory_snapshot_path": server.path("memory"),
            "resume": true,
            "tap_device": tap,
        }))
    };
    let boot = |tap: &str| {
        create(json!({
            "kernel_path": server.path("kernel"),
            "resume": false,
            "tap_device": tap,
        }))
    };
    for (answer, status, said) in [
        (restore(Value::Null), 400, "name the TAP device"),
        (restore(json!("")), 400, "name the TAP device"),
        (restore(json!("fermata-none")), 404, "ip tuntap add"),
        (boot("fermata-none"), 404, "ip tuntap add"),
        (boot("no/tap"), 400, "name of a TAP device"),
    ] {
        assert_eq!(answer.status, status, "{answer:?}");
        assert!(answer.body.to_string().contains(said), "{answer:?}");
    }
    assert!(!switch.connected());
    assert_eq!(server.client.get("/vms").unwrap().body, json!([]));
    // The names of fields that clients in the field send, of a machine that needs none of them.
    let answer = boot("");
    assert_eq!(answer.status, 200, "{answer:?}");
    let pid = answer.body["pid"].as_u64().unwrap();
    let machine = Machine {
        pid: pid as u32,
        port: answer.body["port"].as_u64().unwrap() as u16,
    };
    let (state, memory) = (server.path("state-2"), server.path("memory-2"));
    server
        .client
        .snapshot(machine, &state, &memory, false)
        .unwrap();
    let answer = create(json!({
        "cpu_snapshot_path": state,
        "memory_snapshot_path": memory,
        "resume": true,
        "tap_device": "fermata-none",
    }));
    assert_eq!(answer.status, 400, "{answer:?}");
    assert!(
        answer.body.to_string().contains("has 0 network devices"),
        "{answer:?}"
    );
}
