//! What was saved on one machine goes on on another.

use std::fs;

use system_tests::{linux, server::Server};
use testbed::environment;

#[test]
fn elsewhere_a_snapshot_goes_on() {
    let share = environment::path(environment::SHARE).unwrap();
    let state = fs::read(share.join("state")).unwrap();
    // The other machine serves its tree at the same path, as a disk's is part of the snapshot.
    let disk = path_of_disk(&state);
    let tree = disk.parent().unwrap();
    fs::create_dir_all(tree).unwrap();
    for name in ["state", "memory", "disk"] {
        linux::copy_sparse(&share.join(name), &tree.join(name)).unwrap();
    }
    let server = Server::serve(tree).unwrap();

    let expected = fs::read_to_string(share.join("expected")).unwrap();
    let expected: Vec<&str> = expected.split(' ').collect();
    let cut: u64 = expected[0].parse().unwrap();
    let machine = server
        .client
        .restore(&server.path("state"), &server.path("memory"))
        .unwrap();
    let console = server.console(machine).unwrap();
    let first = linux::counts_past(&console, 0).unwrap();
    assert!((cut + 1..=cut + 2).contains(&first), "{first} after {cut}");
    let verified = linux::verify(&console).unwrap();
    assert_eq!(
        [&*verified.process, &*verified.memory, &*verified.disk],
        expected[1..]
    );
}

/// The path of the disk, which is the only thing in the state that ends like this.
fn path_of_disk(state: &[u8]) -> std::path::PathBuf {
    let text = String::from_utf8_lossy(state);
    let end = text.find("/tree/disk").unwrap() + "/tree/disk".len();
    let start = text[..end].rfind("/tmp").unwrap();
    text[start..end].into()
}
