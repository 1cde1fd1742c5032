//! Ten thousand times paused and resumed: no vCPU misses a kick.

use std::time::{Duration, Instant};

use control::{Client, GuestClock, MachineState, Registry};
use system_tests::{bare_metal, http::Machine, server::Server};

use crate::{boot, server};

/// In all, over the three kinds of guest.
const ROUNDS: u32 = 10_000;

#[test]
fn ten_thousand_rounds_lose_none() {
    let Some(server) = server() else { return };
    let guests = [
        ("spinning", bare_metal::spinner()),
        ("halted", bare_metal::halted()),
        ("in I/O", bare_metal::io()),
    ];
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let each = ROUNDS.div_ceil(guests.len() as u32);
    for (name, kernel) in guests {
        let machine = boot(&server, &kernel);
        let (slowest, total) = runtime.block_on(rounds(&server, machine, each));
        println!("{each} rounds of a vCPU {name}: {total:?}, the slowest pause {slowest:?}");
        let path = format!("/vms/{}", machine.pid);
        assert_eq!(server.client.delete(&path).unwrap().status, 200);
    }
}

async fn rounds(server: &Server, machine: Machine, count: u32) -> (Duration, Duration) {
    let registry = Registry::open(server.run_directory()).unwrap();
    let record = registry.find_pid(machine.pid).unwrap().unwrap();
    let client = Client::connect(record.port, &record.secret).await.unwrap();
    let begun = Instant::now();
    let mut slowest = Duration::ZERO;
    for round in 0..count {
        let pause = Instant::now();
        client.pause().await.unwrap();
        slowest = slowest.max(pause.elapsed());
        if round % 100 == 0 {
            // Twice is as good as once.
            client.pause().await.unwrap();
            assert_eq!(client.status().await.unwrap().state, MachineState::Paused);
        }
        client.resume(GuestClock::StandStill).await.unwrap();
        if round % 100 == 0 {
            client.resume(GuestClock::StandStill).await.unwrap();
            assert_eq!(client.status().await.unwrap().state, MachineState::Running);
        }
    }
    (slowest, begun.elapsed())
}
