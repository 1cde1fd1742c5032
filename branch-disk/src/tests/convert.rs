//! Images that go in and out.

use std::io;

use super::*;
use crate::{
    Error,
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
