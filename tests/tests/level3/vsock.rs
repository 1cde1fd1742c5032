//! A Linux guest's streams to the host: they end at a restore, and what was listened on still is.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    time::Duration,
};

use control::{
    AfterSnapshot, Client, Console, CpuModel, Destination, GuestClock, LaunchSpec, Log,
    MachineConfig, Origin, Registry, Secret, SnapshotRequest, VsockChange, VsockConfig, spawn,
};
use system_tests::{
    cli::Cli,
    console,
    linux::{self, CMDLINE},
    programs,
    server::Server,
    wait::PATIENCE,
};

/// What comes after `word` in a line that the guest has said.
fn said(console: &console::Console, word: &str) -> String {
    let prefix = format!("fermata-guest: {word} ");
    let rest = |line: &str| Some(line.split_once(&prefix)?.1.to_owned());
    console.first(word, rest).unwrap()
}

fn bounded(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Has the guest, which listens on port 5000, echo more than either side buffers.
fn echoed_by_guest(path: &Path) {
    let stream = bounded(UnixStream::connect(path).unwrap());
    (&stream).write_all(b"CONNECT 5000\n").unwrap();
    let mut from = BufReader::new(&stream);
    let mut answer = String::new();
    from.read_line(&mut answer).unwrap();
    assert!(answer.starts_with("OK "), "{answer}");
    let sent: Vec<u8> = (0..1_000_000u32)
        .map(|i| ((i * 7 / 5) ^ (i >> 9)) as u8)
        .collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (&stream).write_all(&sent).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut got = Vec::new();
        from.read_to_end(&mut got).unwrap();
        assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
    });
}

fn boot(server: &Server, path: &Path) -> (u16, Secret, console::Console) {
    let registry = Registry::open(server.run_directory()).unwrap();
    let (secret, file) = (Secret::random().unwrap(), registry.new_console().unwrap());
    let spec = LaunchSpec {
        secret: secret.clone(),
        origin: Origin::Boot(MachineConfig {
            cpu: CpuModel::Host,
            vcpus: 2,
            memory_mib: 256,
            kernel: server.tree().join("vmlinuz"),
            initrd: Some(server.tree().join("initrd")),
            cmdline: format!("{CMDLINE} fermata.role=vsock"),
            disks: Vec::new(),
            nets: Vec::new(),
            vsock: Some(VsockConfig {
                cid: 7,
                path: path.to_owned(),
            }),
            balloon: None,
            console_device: control::ConsoleDevice::default(),
        }),
        console: Console::File(file.clone()),
        registry: server.run_directory(),
        hugepages: false,
        on_demand: false,
        working_set: control::UseWorkingSet::default(),
        paused: false,
        clock: GuestClock::StandStill,
        confinement: None,
        net_changes: Vec::new(),
        disk_directory: None,
        vsock_change: VsockChange::default(),
    };
    let bound = Duration::from_secs(120);
    let spawned = block_on(spawn(&programs::vmm(), &spec, Log::File, bound)).unwrap();
    (spawned.port, secret, console::Console::new(file))
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().unwrap().block_on(future)
}

#[test]
fn streams_of_a_linux_guest_end_at_a_restore_and_new_ones_begin() {
    let server = linux::server().unwrap();
    let path = |name: &str| server.tree().join(name);
    let ours = UnixListener::bind(path("first_6000")).unwrap();
    let (port, secret, console) = boot(&server, &path("first"));
    let expected = said(&console, "sends");
    // It has sent as much as there is room for, and waits.
    let mut cut = bounded(ours.accept().unwrap().0);
    cut.read_exact(&mut [0; 100_000]).unwrap();
    echoed_by_guest(&path("first"));
    let request = SnapshotRequest::new(
        Destination::files(path("state"), path("memory")),
        AfterSnapshot::Halt,
    );
    block_on(async {
        let client = Client::connect(port, &secret).await.unwrap();
        client.snapshot(request).await.unwrap();
    });
    // The end, after what was on its way; it may be told as an error.
    let _ = cut.read_to_end(&mut Vec::new());

    let ours = UnixListener::bind(path("second_6000")).unwrap();
    let cli = Cli::new(&server.tree(), &server.run_directory());
    let change = format!("cid=9,path={}", path("second").display());
    let words = ["restore", "state", "memory", "--json", "--vsock", &change];
    let restored = cli.json(&words).unwrap();
    let pid = restored["pid"].as_u64().unwrap() as u32;
    let shown = server.client.vm(pid).unwrap();
    let console = console::Console::new(shown.console.unwrap());
    said(&console, "cut");
    let stream = bounded(ours.accept().unwrap().0);
    let mut back = stream.try_clone().unwrap();
    std::io::copy(&mut &stream, &mut back).unwrap();
    drop((stream, back));
    assert_eq!(said(&console, "echoed"), expected);
    echoed_by_guest(&path("second"));
}
