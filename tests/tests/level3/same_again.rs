//! Saved, restored, and saved again without having run: nothing has changed.

use std::fs;

use control::{
    AfterSnapshot, Client, Console, Destination, GuestClock, LaunchSpec, Log, Origin, Registry,
    Secret, SnapshotRequest, Source,
};
use system_tests::{linux, programs};

#[test]
fn a_machine_that_has_not_run_is_saved_as_it_was() {
    let server = linux::server().unwrap();
    let machine = linux::boot(&server, "counter").unwrap();
    linux::verify(&server.console(machine).unwrap()).unwrap();
    let path = |name: &str| server.tree().join(name);
    let (state, memory) = (server.path("state"), server.path("memory"));
    server
        .client
        .snapshot(machine, &state, &memory, false)
        .unwrap();

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let registry = Registry::open(server.run_directory()).unwrap();
        let secret = Secret::random().unwrap();
        let spec = LaunchSpec {
            secret: secret.clone(),
            origin: Origin::Restore(Source::files(path("state"), path("memory"))),
            console: Console::File(registry.new_console().unwrap()),
            registry: server.run_directory(),
            hugepages: false,
            on_demand: false,
            working_set: control::UseWorkingSet::default(),
            paused: true,
            clock: GuestClock::StandStill,
            confinement: None,
            net_changes: Vec::new(),
            disk_directory: None,
            vsock_change: control::VsockChange::default(),
        };
        let bound = std::time::Duration::from_secs(120);
        let spawned = control::spawn(&programs::vmm(), &spec, Log::File, bound)
            .await
            .unwrap();
        let client = Client::connect(spawned.port, &secret).await.unwrap();
        let request = SnapshotRequest::new(
            Destination::files(path("state-again"), path("memory-again")),
            AfterSnapshot::Halt,
        );
        client.snapshot(request).await.unwrap();
    });

    let sections = |name: &str| {
        let state = snapshot::read_state(&path(name)).unwrap();
        state.sections().cloned().collect::<Vec<_>>()
    };
    let (first, again) = (sections("state"), sections("state-again"));
    for (one, two) in first.iter().zip(&again) {
        assert_eq!(one, two, "section {} {}", one.kind, one.instance);
    }
    assert_eq!(first.len(), again.len());
    let image = |name: &str| fs::read(path(name)).unwrap()[..256 << 20].to_vec();
    assert!(
        image("memory") == image("memory-again"),
        "the memory differs"
    );
}
