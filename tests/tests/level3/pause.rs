//! A Linux guest that is paused all the time notices nothing but time.

use std::time::{Duration, Instant};

use control::{Client, GuestClock, Registry};
use system_tests::{console::count, linux};

const ROUNDS: u32 = 1_000;

#[test]
fn a_busy_linux_guest_lives_through_a_thousand_pauses() {
    let server = linux::server().unwrap();
    let machine = linux::boot(&server, "counter").unwrap();
    let console = server.console(machine).unwrap();
    let before = linux::verify(&console).unwrap();
    let registry = Registry::open(server.run_directory()).unwrap();
    let record = registry.find_pid(machine.pid).unwrap().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let slowest = runtime.block_on(async {
        let client = Client::connect(record.port, &record.secret).await.unwrap();
        let mut slowest = Duration::ZERO;
        for _ in 0..ROUNDS {
            let pause = Instant::now();
            client.pause().await.unwrap();
            slowest = slowest.max(pause.elapsed());
            client.resume(GuestClock::StandStill).await.unwrap();
        }
        slowest
    });
    println!("{ROUNDS} rounds of a Linux guest, the slowest pause {slowest:?}");
    let then = console.last(count).unwrap();
    linux::counts_past(&console, then + 10).unwrap();
    let after = console.last(system_tests::console::verified).unwrap();
    linux::nothing_lost(&before, &after).unwrap();
}
