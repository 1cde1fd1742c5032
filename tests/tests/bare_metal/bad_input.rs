//! What cannot be meant, is not there, is damaged, or comes at the wrong time: the right status, a
//! sentence that says what to do, nothing half-written, and everybody lives on.

use std::{fs, os::unix::fs::FileExt, path::Path, thread};

use serde_json::{Value, json};
use system_tests::{bare_metal, http::Answer, server::Server};

use crate::{counting, server};

/// Asserts that `answer` is a refusal with `status` whose text has `words`.
#[track_caller]
fn refused(answer: &Answer, status: u16, words: &str) {
    assert_eq!(answer.status, status, "{answer:?}");
    let message = answer
        .body
        .get("message")
        .and_then(Value::as_str)
        .unwrap_or_default();
    assert!(message.contains(words), "{words:?} is not in {message:?}");
}

fn create(server: &Server, kernel: &str, more: &Value) -> Answer {
    let mut body = json!({
        "cpu_snapshot_path": "", "memory_snapshot_path": "", "kernel_path": kernel, "resume": false,
    });
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    server.client.post("/create", &body).unwrap()
}

#[test]
fn kernels_that_are_none() {
    let Some(server) = server() else { return };
    let none = json!({});
    fs::write(
        server.tree().join("text"),
        "this is no kernel at all, but a text ".repeat(100),
    )
    .unwrap();
    fs::write(server.tree().join("empty"), "").unwrap();
    let counter = bare_metal::counter();
    fs::write(server.tree().join("kernel"), &counter).unwrap();
    fs::write(server.tree().join("cut"), &counter[..100]).unwrap();
    refused(
        &create(&server, &server.path("text"), &none),
        400,
        "not a kernel",
    );
    refused(
        &create(&server, &server.path("empty"), &none),
        400,
        "not a kernel",
    );
    refused(
        &create(&server, &server.path("cut"), &none),
        400,
        "not a kernel",
    );
    refused(
        &create(&server, &server.path("missing"), &none),
        404,
        "missing",
    );
    refused(&create(&server, &server.path("."), &none), 400, "");
    refused(
        &create(&server, "/etc/passwd", &none),
        400,
        &server.tree().display().to_string(),
    );
    refused(&create(&server, &server.path("../run"), &none), 400, "");
    let kernel = server.path("kernel");
    refused(&create(&server, &kernel, &json!({"vcpus": 0})), 400, "");
    refused(&create(&server, &kernel, &json!({"vcpus": 1000})), 400, "");
    refused(
        &create(&server, &kernel, &json!({"memory_mib": 1})),
        400,
        "ask for 64",
    );
    refused(
        &create(&server, &kernel, &json!({"cmdline": "x".repeat(5000)})),
        400,
        "command line",
    );
    assert_eq!(server.client.get("/vms").unwrap().body, json!([]));
}

#[test]
fn requests_that_are_none() {
    let Some(server) = server() else { return };
    for body in [
        "",
        "{",
        "[]",
        "null",
        "{\"resume\": false}",
        "{\"kernel_path\": 3, \"resume\": false}",
    ] {
        for path in ["/create", "/snapshot"] {
            let answer = server.client.post_raw(path, body).unwrap();
            assert_eq!(answer.status, 400, "{body} to {path}: {answer:?}");
        }
    }
    let unknown = server
        .client
        .try_snapshot(1, &server.path("s"), &server.path("m"), true)
        .unwrap();
    refused(&unknown, 404, "1");
    assert_eq!(server.client.get("/vms/1").unwrap().status, 404);
    assert_eq!(server.client.delete("/vms/1").unwrap().status, 404);
    assert_eq!(server.client.get("/nothing").unwrap().status, 404);
    assert_eq!(server.client.get("/healthz").unwrap().status, 200);
}

#[test]
fn snapshots_that_cannot_go_where_they_should() {
    let Some(server) = server() else { return };
    let client = &server.client;
    let machine = counting(&server, 2);
    let snapshot = |state: &str, memory: &str| {
        client
            .try_snapshot(machine.port, state, memory, true)
            .unwrap()
    };
    let (state, memory) = (server.path("state"), server.path("memory"));
    refused(&snapshot(&state, &state), 400, "");
    refused(
        &snapshot(&server.path("no/such/state"), &memory),
        404,
        "no/such",
    );
    refused(
        &snapshot(&state, &server.path("no/such/memory")),
        404,
        "no/such",
    );
    refused(
        &snapshot("/tmp/state", &memory),
        400,
        &server.tree().display().to_string(),
    );
    refused(&snapshot(&state, &server.path("../memory")), 400, "");
    fs::create_dir(server.tree().join("directory")).unwrap();
    refused(&snapshot(&server.path("directory"), &memory), 400, "");
    std::os::unix::fs::symlink("/tmp", server.tree().join("out")).unwrap();
    refused(&snapshot(&server.path("out/state"), &memory), 400, "");
    assert_eq!(server.names().unwrap(), ["directory", "kernel", "out"]);
    // The machine has not noticed any of it.
    let console = server.console(machine).unwrap();
    let before = console.last(bare_metal::count).unwrap();
    let next = |line: &str| bare_metal::count(line).filter(|count| *count > before);
    console.first("the next count", next).unwrap();
    client.snapshot(machine, &state, &memory, true).unwrap();
}

#[test]
fn a_machine_that_is_busy_says_so() {
    let Some(server) = server() else { return };
    let client = &server.client;
    let machine = counting(&server, 2);
    // Among many at once, those that come while another is under way are refused.
    let answers: Vec<Answer> = thread::scope(|scope| {
        let server = &server;
        let one = |i: usize| {
            let (state, memory) = (server.path(&format!("s{i}")), server.path(&format!("m{i}")));
            client
                .try_snapshot(machine.port, &state, &memory, true)
                .unwrap()
        };
        let requests: Vec<_> = (0..8).map(|i| scope.spawn(move || one(i))).collect();
        requests
            .into_iter()
            .map(|request| request.join().unwrap())
            .collect()
    });
    let taken = answers.iter().filter(|answer| answer.status == 200).count();
    assert!(taken >= 1);
    for answer in answers.iter().filter(|answer| answer.status != 200) {
        refused(answer, 409, "busy");
    }
    let names = server.names().unwrap();
    assert_eq!(names.len(), 1 + 2 * taken, "{names:?}");
}

#[test]
fn snapshots_that_are_damaged() {
    let Some(server) = server() else { return };
    let client = &server.client;
    let machine = counting(&server, 2);
    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(machine, &state, &memory, false).unwrap();
    let restore = |state: &str, memory: &str| client.try_restore(state, memory).unwrap();

    refused(&restore(&server.path("none"), &memory), 404, "none");
    refused(&restore(&state, &server.path("none")), 404, "none");
    refused(
        &restore("/etc/passwd", &memory),
        400,
        &server.tree().display().to_string(),
    );
    refused(&restore(&memory, &state), 422, "not a fermata state file");
    refused(&restore(&state, &server.path("kernel")), 422, "memory file");

    let intact = fs::read(&state).unwrap();
    let damaged = server.path("damaged");
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = intact.clone();
        change(&mut bytes);
        fs::write(&damaged, bytes).unwrap();
        restore(&damaged, &memory)
    };
    refused(&with(&|bytes| bytes.truncate(1000)), 422, "cut or appended");
    refused(&with(&|bytes| bytes.truncate(5)), 422, "");
    refused(&with(&|bytes| bytes[20] ^= 1), 422, "damaged");
    refused(&with(&|bytes| bytes[5000] ^= 1), 422, "damaged");
    refused(
        &with(&|bytes| bytes[0] ^= 1),
        422,
        "not a fermata state file",
    );

    flip(Path::new(&memory), 0x10_0000);
    refused(&restore(&state, &memory), 422, "damaged");
    flip(Path::new(&memory), 0x10_0000);
    let length = fs::metadata(&memory).unwrap().len();
    fs::OpenOptions::new()
        .write(true)
        .open(&memory)
        .unwrap()
        .set_len(length - 1)
        .unwrap();
    refused(&restore(&state, &memory), 422, "");
    assert_eq!(client.get("/vms").unwrap().body, json!([]));
}

fn flip(path: &Path, at: u64) {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn a_state_file_cannot_reach_out_of_the_tree() {
    let Some(server) = server() else { return };
    let client = &server.client;
    fs::write(server.tree().join("kernel"), bare_metal::counter()).unwrap();
    let outside = tempfile::tempdir().unwrap();
    let disk = outside.path().join("disk");
    let secret = fs::File::create(&disk).unwrap();
    secret.set_len(1 << 20).unwrap();
    // A link in the tree is as good as a forged path: at the boot it leads inside, later outside.
    let inside = server.tree().join("disk");
    fs::File::create(&inside).unwrap().set_len(1 << 20).unwrap();
    let more = json!({"vcpus": 1, "memory_mib": 64, "disks": [{"path": server.path("disk")}]});
    let machine = client.boot(&server.path("kernel"), &more).unwrap();
    let (state, memory) = (server.path("state"), server.path("memory"));
    client.snapshot(machine, &state, &memory, false).unwrap();
    fs::remove_file(&inside).unwrap();
    std::os::unix::fs::symlink(&disk, &inside).unwrap();
    refused(
        &client.try_restore(&state, &memory).unwrap(),
        400,
        "outside",
    );
    fs::remove_file(&inside).unwrap();
    fs::File::create(&inside).unwrap().set_len(1 << 20).unwrap();
    client.restore(&state, &memory).unwrap();
}
