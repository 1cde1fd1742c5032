//! Every backend obeys the same rules.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

use std::io::ErrorKind;

use dedup::backend::{Backend, Fault, Faulty, LocalDir, Memory, conformance};

const NEVER: Fault = Fault {
    after_writes: u64::MAX,
    times: 0,
    kind: ErrorKind::Other,
};

#[test]
fn a_local_directory_conforms() {
    let dir = tempfile::tempdir().unwrap();
    conformance::check(&LocalDir::create(dir.path().join("store")).unwrap()).unwrap();
}

#[test]
fn memory_conforms() {
    conformance::check(&Memory::new()).unwrap();
}

#[test]
fn a_backend_whose_fault_has_not_come_conforms() {
    conformance::check(&Faulty::new(Memory::new(), NEVER)).unwrap();
}

#[test]
fn a_backend_that_fails_does_not_conform() {
    let healthy = Faulty::new(Memory::new(), NEVER);
    conformance::check(&healthy).unwrap();
    for after_writes in 0..healthy.writes() {
        let fault = Fault {
            after_writes,
            times: 1,
            kind: ErrorKind::StorageFull,
        };
        assert!(
            conformance::check(&Faulty::new(Memory::new(), fault)).is_err(),
            "write {after_writes}"
        );
    }
}

#[test]
fn what_a_dead_process_left_is_cleared() {
    let dir = tempfile::tempdir().unwrap();
    let backend = LocalDir::create(dir.path()).unwrap();
    // Not locked by anybody, as after the kernel has dropped a dead process's locks.
    std::fs::write(dir.path().join("tmp/draft"), "half").unwrap();
    std::fs::write(dir.path().join("leases/lease"), [0; 16]).unwrap();
    assert!(backend.leases().unwrap().is_empty());
    let _living = backend.lease().unwrap();
    assert_eq!(backend.clear_dead().unwrap(), 2);
    assert_eq!(backend.leases().unwrap().len(), 1);
}
