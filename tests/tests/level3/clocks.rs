//! Whether guests see how long they were held.

use std::{thread::sleep, time::Duration};

use control::{Client, GuestClock, Registry};
use system_tests::{
    bare_metal::{self, clock_step},
    console::Console,
    http::Machine,
    linux,
    server::Server,
    wait,
};
use tokio::runtime::{Builder, Runtime};

const HOLD: Duration = Duration::from_secs(4);

/// A machine and its console.
struct Held<'a> {
    server: &'a Server,
    runtime: Runtime,
    machine: Machine,
}

impl<'a> Held<'a> {
    fn new(server: &'a Server, machine: Machine) -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        Self {
            server,
            runtime,
            machine,
        }
    }

    fn console(&self) -> Console {
        self.server.console(self.machine).unwrap()
    }

    /// Holds it for [`HOLD`]; calls `then` while it stands still.
    fn hold<T>(&self, clock: GuestClock, then: impl FnOnce() -> T) -> T {
        let registry = Registry::open(self.server.run_directory()).unwrap();
        let record = registry.find_pid(self.machine.pid).unwrap().unwrap();
        self.runtime.block_on(async {
            let client = Client::connect(record.port, &record.secret).await.unwrap();
            client.pause().await.unwrap();
            let seen = then();
            sleep(HOLD);
            client.resume(clock).await.unwrap();
            seen
        })
    }
}

/// The largest steps of the TSC while the machine is held once and afterwards, in ticks, with a few before any hold.
fn steps(held: &Held<'_>, clock: GuestClock) -> (u64, u64) {
    let console = held.console();
    let all = |at_least: usize| {
        console
            .first("the guest to tell its steps", |_| {
                let steps: Vec<u64> = console.text().lines().filter_map(clock_step).collect();
                (steps.len() >= at_least).then_some(steps)
            })
            .unwrap()
    };
    let before = all(5);
    let quiet = before.iter().copied().max().unwrap();
    let told = held.hold(clock, || all(1).len());
    let after = all(told + 3);
    (quiet, after[told..].iter().copied().max().unwrap())
}

#[test]
fn a_guest_that_does_nothing_but_look_at_the_time_sees_no_hold() {
    let server = linux::server().unwrap();
    std::fs::write(server.tree().join("clock"), bare_metal::clock()).unwrap();
    let boot = || {
        let more =
            serde_json::json!({"memory_mib": 64, "initrd_path": "", "cmdline": "", "disks": []});
        let machine = server.client.boot(&server.path("clock"), &more).unwrap();
        Held::new(&server, machine)
    };
    let (quiet, follows) = steps(&boot(), GuestClock::Follow);
    let (_, stands_still) = steps(&boot(), GuestClock::StandStill);
    println!(
        "largest steps of the TSC: {quiet} ticks before a hold of {HOLD:?}, {stands_still} across it, {follows} when it follows"
    );
    // The step that follows is the hold itself, and tells how many ticks that has.
    assert!(follows > 1_000_000_000, "{follows}: the hold was not seen");
    assert!(
        stands_still < follows / 20,
        "{stands_still} of {follows} ticks"
    );
}

/// What a guest in the role `clocks` says.
#[derive(Clone, Copy)]
struct Told {
    /// Hundredths of a second since it booted.
    booted: u64,
    /// Seconds of the wall clock.
    wall: u64,
    /// How often its kernel complained of time.
    complaints: u64,
}

fn told(line: &str) -> Option<Told> {
    let mut words = line.strip_prefix("fermata-guest: clock ")?.split(' ');
    let booted = words.next()?.replace('.', "").parse().ok()?;
    let mut number = || words.next()?.parse().ok();
    Some(Told {
        booted,
        wall: number()?,
        complaints: number()?,
    })
}

#[test]
fn a_linux_guest_stands_still_or_follows_as_it_is_told() {
    let server = linux::server().unwrap();
    let machine = linux::boot(&server, "clocks").unwrap();
    let held = Held::new(&server, machine);
    let console = held.console();
    console.first("the guest to tell its clocks", told).unwrap();
    for clock in [
        GuestClock::StandStill,
        GuestClock::Follow,
        GuestClock::StandStill,
    ] {
        let before = held.hold(clock, || console.last(told).unwrap());
        let after = next_told(&console, before);
        check(before, after, clock);
    }

    // Saved after a hold: what follows, follows from when it began.
    let pause = format!("/vms/{}/pause", machine.pid);
    let answer = server.client.post(&pause, &serde_json::json!({})).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    let before = console.last(told).unwrap();
    sleep(HOLD);
    let (state, memory) = (server.path("state"), server.path("memory"));
    server
        .client
        .snapshot(machine, &state, &memory, false)
        .unwrap();
    wait::until("the machine to end", || {
        server.client.vm(machine.pid).unwrap().ended
    })
    .unwrap();
    for (word, clock) in [
        ("stand-still", GuestClock::StandStill),
        ("follow", GuestClock::Follow),
    ] {
        let restored = server
            .client
            .restore_clocked(&state, &memory, word)
            .unwrap();
        let console = server.console(restored).unwrap();
        check(before, next_told(&console, before), clock);
        let path = format!("/vms/{}", restored.pid);
        assert_eq!(server.client.delete(&path).unwrap().status, 200);
    }
}

/// What the guest says next.
fn next_told(console: &Console, before: Told) -> Told {
    let complaint = |line: &str| line.contains("complaint").then(|| line.to_owned());
    if let Some(complaint) = console.last(complaint) {
        println!("{complaint}");
    }
    let later = |line: &str| told(line).filter(|now| now.booted > before.booted);
    console.first("the guest's clocks to go on", later).unwrap()
}

/// Whether the clocks have done what they were told, across a hold that took at least [`HOLD`].
fn check(before: Told, after: Told, clock: GuestClock) {
    let (booted, wall) = (after.booted - before.booted, after.wall - before.wall);
    println!("{clock:?}: {booted} hundredths of a second since boot, {wall} s of wall clock");
    let follows = clock == GuestClock::Follow;
    let hold = HOLD.as_millis() as u64 / 10;
    assert_eq!(booted >= hold, follows, "{booted} hundredths, {clock:?}");
    assert_eq!(wall >= HOLD.as_secs(), follows, "{wall} s, {clock:?}");
    let before = before.complaints;
    assert_eq!(
        after.complaints, before,
        "{clock:?}: the guest's kernel complains of time"
    );
}
