//! Images that go in and out.

use std::{fs::File, io, sync::mpsc, thread, time::Duration};

use rustix::fs::{CWD, FileType, Mode as Permissions, mknodat};

use super::*;
use crate::{
    Copied, Error,
    convert::export,
    tape::{self, Event},
};

#[test]
fn an_image_has_its_name_when_it_is_whole_and_durable() {
    let bench = Bench::new(64);
    let disk = bench.on_base("d");
    let names = bench.names();
    for to in ["raw", "qcow2"] {
        let to = bench.path(to);
        tape::start();
        let exported = match to.ends_with("raw") {
            true => crate::export_raw(&disk, &to),
            false => crate::export_qcow2(&disk, &to),
        };
        exported.unwrap();
        let done = tape::stop();
        let named = |event: &Event| matches!(event, Event::Linked { name, .. } if *name == to);
        let at = done.iter().position(named).unwrap();
        assert!(matches!(done[at - 1], Event::Synced { .. }), "{done:?}");
        assert!(matches!(
            done[at + 1..],
            [Event::Removed { .. }, Event::SyncedNames]
        ));
        std::fs::remove_file(&to).unwrap();
    }
    let failed = export(&bench.path("half"), |_| {
        assert!(!bench.path("half").exists());
        Err(io::ErrorKind::StorageFull.into())
    });
    assert!(matches!(failed, Err(Error::Io { .. })), "{failed:?}");
    assert_eq!(bench.names(), names);
}

#[test]
fn an_image_that_a_machine_writes_to_is_not_imported() {
    let bench = Bench::new(64);
    crate::export_qcow2(&bench.on_base("d"), &bench.path("qcow2")).unwrap();
    let in_use = |from: &str, imported: Result<Copied, Error>| match imported {
        Err(Error::InUse { path }) => assert_eq!(path, bench.path(from)),
        imported => panic!("{from}: {imported:?}"),
    };
    let locked = ["base", "qcow2"].map(|from| File::open(bench.path(from)).unwrap());
    locked.iter().for_each(|file| file.lock().unwrap());
    let to = bench.path("to");
    in_use(
        "base",
        crate::import_raw(&bench.path("base"), &to, &anything),
    );
    in_use(
        "qcow2",
        crate::import_qcow2(&bench.path("qcow2"), &to, &anything),
    );
    assert!(!to.exists());
    // Others may read it, and it may be called by a link.
    locked.iter().for_each(|file| file.lock_shared().unwrap());
    std::os::unix::fs::symlink("base", bench.path("link")).unwrap();
    crate::import_raw(&bench.path("link"), &to, &anything).unwrap();
}

#[test]
fn a_pipe_is_refused_and_not_waited_for() {
    const HANG: Duration = Duration::from_secs(60);
    let bench = Bench::new(8);
    let pipe = bench.path("pipe");
    mknodat(CWD, &pipe, FileType::Fifo, Permissions::RWXU, 0).unwrap();
    let (done, is_done) = mpsc::channel();
    let to = bench.path("to");
    thread::spawn(move || {
        done.send(crate::import_raw(&pipe, &to, &anything)).unwrap();
        done.send(crate::import_qcow2(&pipe, &to, &anything))
    });
    for _ in 0..2 {
        let refused = is_done.recv_timeout(HANG).unwrap();
        assert!(
            matches!(refused, Err(Error::NotAFile { .. })),
            "{refused:?}"
        );
    }
}

#[test]
fn a_qcow2_image_that_was_cut_short_is_refused() {
    let bench = Bench::new(4096);
    crate::export_qcow2(&bench.on_base("d"), &bench.path("qcow2")).unwrap();
    let file = File::options()
        .write(true)
        .open(bench.path("qcow2"))
        .unwrap();
    let whole = file.metadata().unwrap().len();
    crate::import_qcow2(&bench.path("qcow2"), &bench.path("whole"), &anything).unwrap();
    let mut cut = whole.next_multiple_of(65536);
    while cut > 65536 {
        cut -= 65536;
        file.set_len(cut).unwrap();
        let refused = crate::import_qcow2(&bench.path("qcow2"), &bench.path("to"), &anything);
        assert!(refused.is_err(), "{cut}");
    }
}
