//! Writers, readers and collections at once; each has a handle of its own, as processes have.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

mod support;

use std::sync::atomic::{AtomicBool, Ordering};

use dedup::{Error, GcOptions, Store};
use support::{Random, create_options, image, load, options, save, touch};

/// The image of a snapshot of this name: most is common to all, some to a few.
fn image_of(writer: u64, round: u64) -> Vec<u8> {
    let mut image = image(700, round / 3);
    touch(&mut image, 30, writer * 1000 + round);
    image
}

#[test]
fn writers_readers_and_collections_do_not_hurt_each_other() {
    let dir = tempfile::tempdir().unwrap();
    Store::create_dir(dir.path(), &create_options(), options()).unwrap();
    let open = || Store::open_dir(dir.path(), options()).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2u64)
            .map(|writer| {
                scope.spawn(move || {
                    let store = open();
                    for round in 0..12 {
                        save(
                            &store,
                            &format!("w{writer}-{round}"),
                            &image_of(writer, round),
                        )
                        .unwrap();
                        // Leaves every fourth; what is removed was shared with others.
                        if round % 4 != 0 {
                            store.rm(&format!("w{writer}-{round}")).unwrap();
                        }
                    }
                })
            })
            .collect();
        let (reader_done, collector_done) = (&done, &done);
        scope.spawn(move || {
            let store = open();
            let mut random = Random::new(1);
            while !reader_done.load(Ordering::Relaxed) {
                let (writer, round) = (random.below(2) as u64, random.below(12) as u64);
                match load(&store, &format!("w{writer}-{round}")) {
                    Ok(loaded) => assert!(loaded == image_of(writer, round)),
                    Err(Error::NoSnapshot(_)) => {}
                    // Removed between being found and being opened.
                    Err(Error::Io { source, .. })
                        if source.kind() == std::io::ErrorKind::NotFound => {}
                    Err(other) => panic!("{other}"),
                }
            }
        });
        scope.spawn(move || {
            let store = open();
            while !collector_done.load(Ordering::Relaxed) {
                store.gc(&GcOptions::default()).unwrap();
            }
        });
        let results: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        done.store(true, Ordering::Relaxed);
        results.into_iter().for_each(|result| result.unwrap());
    });
    let store = open();
    store.gc(&GcOptions::default()).unwrap();
    let report = store.fsck().unwrap();
    assert!(report.problems.is_empty(), "{report:?}");
    for writer in 0..2 {
        for round in (0..12).step_by(4) {
            assert!(
                load(&store, &format!("w{writer}-{round}")).unwrap() == image_of(writer, round)
            );
        }
    }
    assert_eq!(store.log().unwrap().len(), 6);
}
