mod pieces;

use std::{
    os::unix::fs::MetadataExt,
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::Duration,
};

use super::*;
use crate::{
    Disk, Foundation, Mode, SECTOR_BYTES, anything, check,
    tape::{self, Call},
    tests::in_memory,
};

const BYTES: u64 = 3 << 20;
const ID: LayerId = LayerId([1; 16]);

/// The second of three megabytes is zeros.
static CONTENT: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut content: Vec<u8> = (0..BYTES).map(|at| (at / 700 + 1) as u8).collect();
    content[1 << 20..2 << 20].fill(0);
    content
});

fn content() -> Vec<u8> {
    CONTENT.clone()
}

fn all(disk: &Disk) -> Vec<u8> {
    let mut found = vec![0xee; disk.bytes() as usize];
    disk.read(0, &mut &mut found[..]).unwrap();
    found
}

/// That content, kept elsewhere.
#[derive(Default)]
struct Kept {
    /// Bytes that were read.
    read: AtomicU64,
    /// Called before each read.
    before: Option<Box<dyn Fn(u64) + Send + Sync>>,
    /// Which ranges cannot be had.
    refuses: Option<Refuses>,
}

type Refuses = Box<dyn Fn(&Range<u64>) -> bool + Send + Sync>;

impl Origin for Kept {
    fn bytes(&self) -> u64 {
        BYTES
    }

    fn each_data(&self, found: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        found(0..1 << 20);
        // More than there is.
        found(2 << 20..4 << 20);
        Ok(())
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if let Some(before) = &self.before {
            before(offset);
        }
        let range = offset..offset + buffer.len() as u64;
        if self.refuses.as_ref().is_some_and(|refuses| refuses(&range)) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.read.fetch_add(buffer.len() as u64, Relaxed);
        buffer.copy_from_slice(&CONTENT[offset as usize..][..buffer.len()]);
        Ok(())
    }
}

/// The same, of which what is at this offset is not had before somebody says so. Tells when it is wanted.
fn gated(at: u64) -> (Arc<Kept>, Receiver<()>, Sender<()>) {
    let (begun, has_begun) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel();
    let gate = Mutex::new((begun, may_go_on));
    let before = move |offset| {
        if offset == at {
            let (begun, may_go_on) = &*gate.lock().unwrap();
            begun.send(()).unwrap();
            may_go_on.recv().unwrap();
        }
    };
    let kept = Kept {
        before: Some(Box::new(before)),
        ..Kept::default()
    };
    (Arc::new(kept), has_begun, go_on)
}

/// As large as [`Kept`], and all zeros.
struct Less;

impl Origin for Less {
    fn bytes(&self) -> u64 {
        BYTES
    }

    fn each_data(&self, _: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        Ok(())
    }

    fn read(&self, _: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        Ok(())
    }
}

fn begin(path: &Path, kept: &Arc<Kept>) -> Result<Rebuild, Error> {
    Rebuild::begin(path, ID, Arc::<Kept>::clone(kept), &anything)
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

#[test]
fn a_layer_that_was_lost_is_what_it_was_and_others_can_stand_on_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let mut disk = Disk::create(&path, Some(BYTES), &Foundation::Nothing, &anything).unwrap();
    disk.write(0, &mut &content()[..]).unwrap();
    let layer = disk.cut(disk.prepare().unwrap()).unwrap().finish().unwrap();
    drop(disk);
    std::fs::remove_file(&layer.path).unwrap();

    let elsewhere = directory.path().join("elsewhere");
    let origin = || Arc::new(Kept::default());
    rebuild(&elsewhere, layer.id, origin(), &anything).unwrap();
    let again = rebuild(&elsewhere, layer.id, origin(), &anything);
    assert!(matches!(again, Err(Error::Exists { .. })));
    assert_eq!(names(directory.path()).len(), 2);
    check(&elsewhere, &anything).unwrap();
    for mode in [Mode::Read, Mode::Write] {
        let read_only = mode == Mode::Read;
        let disk = match mode {
            Mode::Read => Disk::open(&elsewhere, mode, &anything).unwrap(),
            Mode::Write => Disk::branch(&elsewhere, Some(layer.id), &anything).unwrap(),
        };
        assert_eq!(disk.read_only(), read_only);
        assert!(all(&disk) == content());
    }
}

#[test]
fn what_is_read_comes_first_and_nothing_else_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.layer");
    let kept = Arc::new(Kept::default());
    let rebuild = begin(&path, &kept).unwrap();
    let mut disk = rebuild.branch(&anything).unwrap();
    assert!(
        disk.path()
            .starts_with(directory.path().canonicalize().unwrap())
    );
    let mut sector = [0; 512];
    let last = BYTES - SECTOR_BYTES;
    for _ in 0..2 {
        disk.read(last, &mut &mut sector[..]).unwrap();
        assert_eq!(sector, content()[last as usize..]);
    }
    // What is zeros is known to be.
    disk.read(1 << 20, &mut &mut sector[..]).unwrap();
    assert_eq!(sector, [0; 512]);
    assert_eq!(kept.read.load(Relaxed), 64 << 10);
    assert_eq!(rebuild.progress(), (64 << 10, 2 << 20));

    // A write reads nothing, and what comes later does not undo it.
    disk.write(512, &mut &[7; 512][..]).unwrap();
    disk.flush().unwrap();
    assert_eq!(kept.read.load(Relaxed), 64 << 10);
    assert!(!path.exists() && !rebuild.is_finished());
    rebuild.finish(&|| true).unwrap();
    assert!(rebuild.is_finished());
    assert_eq!(kept.read.load(Relaxed), 2 << 20, "each part once");
    rebuild.finish(&|| true).unwrap();

    let mut expected = content();
    expected[512..1024].fill(7);
    assert!(all(&disk) == expected);
    let head = disk.path().to_owned();
    drop((disk, rebuild));
    check(&head, &anything).unwrap();
    let mut disk = Disk::open(&head, Mode::Write, &anything).unwrap();
    assert!(all(&disk) == expected);
    let layer = disk.cut(disk.prepare().unwrap()).unwrap().finish().unwrap();
    assert!(all(&Disk::open(&layer.path, Mode::Read, &anything).unwrap()) == expected);
    assert_eq!(names(directory.path()).len(), 3);
}

#[test]
fn a_disk_that_is_only_read_is_the_layer_itself() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.layer");
    let rebuild = begin(&path, &Arc::default()).unwrap();
    let disk = rebuild.read().unwrap();
    assert_eq!(disk.id(), Some(ID));
    assert!(disk.read_only() && disk.path().ends_with("disk.layer"));
    assert!(all(&disk) == content());
    // All of it came, and yet it has no name.
    assert!(!rebuild.is_finished());
    rebuild.finish(&|| true).unwrap();
    drop((rebuild, disk));
    assert!(all(&Disk::open(&path, Mode::Read, &anything).unwrap()) == content());
}

#[test]
fn many_who_read_and_who_brings_it_all_wait_for_each_other_and_for_nobody_else() {
    let directory = in_memory();
    let path = directory.path().join("disk.layer");
    let kept = Arc::new(Kept::default());
    let rebuild = begin(&path, &kept).unwrap();
    let disk = rebuild.branch(&anything).unwrap();
    thread::scope(|scope| {
        for step in [512, 4096, 9 << 9, 64 << 10] {
            let disk = &disk;
            scope.spawn(move || {
                let content = content();
                let mut bytes = vec![0; step as usize];
                for at in (0..BYTES - step).step_by(step as usize * 7) {
                    disk.read(at, &mut &mut bytes[..]).unwrap();
                    assert!(bytes == content[at as usize..][..bytes.len()]);
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| rebuild.finish(&|| true).unwrap());
        }
    });
    assert_eq!(kept.read.load(Relaxed), 2 << 20, "each part once");
}

#[test]
fn who_waits_for_what_another_brings_has_it_then() {
    let directory = tempfile::tempdir().unwrap();
    let (kept, has_begun, go_on) = gated(0);
    let rebuild = begin(&directory.path().join("disk.layer"), &kept).unwrap();
    let disk = rebuild.branch(&anything).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| rebuild.finish(&|| true).unwrap());
        has_begun.recv().unwrap();
        // Of what nobody is at.
        let mut sector = [0; 512];
        disk.read(2 << 20, &mut &mut sector[..]).unwrap();
        assert_eq!(sector, content()[2 << 20..][..512]);
        let waits = scope.spawn(|| {
            let mut sector = [0; 512];
            disk.read(0, &mut &mut sector[..]).unwrap();
            sector
        });
        thread::sleep(Duration::from_millis(20));
        assert!(!waits.is_finished());
        go_on.send(()).unwrap();
        assert_eq!(waits.join().unwrap(), content()[..512]);
    });
}

#[test]
fn neither_who_was_killed_nor_who_is_at_work_is_in_the_way() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    for draft in [ID, LayerId([2; 16])] {
        std::fs::write(name::draft(&path, draft), "half of it").unwrap();
    }
    let [first, second] = [(); 2].map(|()| begin(&path, &Arc::default()).unwrap());
    assert_eq!(names(directory.path()).len(), 2);
    let on_second = second.branch(&anything).unwrap();
    first.finish(&|| true).unwrap();
    second.finish(&|| true).unwrap();
    assert!(second.is_finished());
    assert!(all(&on_second) == content());
    drop((first, second, on_second));
    assert_eq!(names(directory.path()).len(), 1);
}

#[test]
fn what_cannot_be_read_is_an_error_until_it_can_be() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.layer");
    let lost_from = Arc::new(AtomicU64::new(2 << 20));
    let from = Arc::clone(&lost_from);
    let kept = Arc::new(Kept {
        refuses: Some(Box::new(move |range| range.end > from.load(Relaxed))),
        ..Kept::default()
    });
    let rebuild = begin(&path, &kept).unwrap();
    let mut disk = rebuild.branch(&anything).unwrap();
    let mut sector = [0; 512];
    let failed = disk.read(2 << 20, &mut &mut sector[..]).unwrap_err();
    assert_eq!(failed.kind(), io::ErrorKind::InvalidData);
    let failed = rebuild.finish(&|| true);
    assert!(matches!(failed, Err(Error::Io { .. })), "{failed:?}");
    disk.read(0, &mut &mut sector[..]).unwrap();
    disk.write(0, &mut &[9; 512][..]).unwrap();
    assert!(!rebuild.is_finished() && !path.exists());
    lost_from.store(u64::MAX, Relaxed);
    rebuild.finish(&|| true).unwrap();
    disk.read(2 << 20, &mut &mut sector[..]).unwrap();
    assert_eq!(sector, content()[2 << 20..][..512]);
}

#[test]
fn a_panic_of_who_brings_something_leaves_nobody_waiting() {
    let directory = tempfile::tempdir().unwrap();
    let panicked = AtomicU64::new(0);
    let before = move |_| assert!(panicked.fetch_add(1, Relaxed) > 0, "only at first");
    let kept = Arc::new(Kept {
        before: Some(Box::new(before)),
        ..Kept::default()
    });
    let rebuild = Arc::new(begin(&directory.path().join("disk.layer"), &kept).unwrap());
    let other = Arc::clone(&rebuild);
    assert!(
        thread::spawn(move || other.finish(&|| true))
            .join()
            .is_err()
    );
    rebuild.finish(&|| true).unwrap();
}

#[test]
fn what_is_not_wanted_any_more_leaves_nothing_but_what_was_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.layer");
    let rebuild = begin(&path, &Arc::default()).unwrap();
    let untouched = rebuild.branch(&anything).unwrap();
    let mut touched = rebuild.branch(&anything).unwrap();
    touched.write(0, &mut &[9; 512][..]).unwrap();
    assert!(touched.is_touched() && !untouched.is_touched());
    let ended = rebuild.finish(&|| false).unwrap_err();
    assert!(
        matches!(ended, Error::Io { source, .. } if source.kind() == io::ErrorKind::Interrupted)
    );
    let head = touched.path().to_owned();
    rebuild.give_up();
    let ended = rebuild.finish(&|| true).unwrap_err();
    assert!(
        matches!(ended, Error::Io { source, .. } if source.kind() == io::ErrorKind::Interrupted)
    );
    assert_eq!(names(directory.path()).len(), 2, "the heads");
    drop((rebuild, touched, untouched));
    assert_eq!(
        names(directory.path()),
        [head.file_name().unwrap().to_str().unwrap()]
    );
    // It is of use again once the layer is.
    assert!(Disk::open(&head, Mode::Write, &anything).is_err());
    super::rebuild(&path, ID, Arc::new(Kept::default()), &anything).unwrap();
    let mut expected = content();
    expected[..512].fill(9);
    assert!(all(&Disk::open(&head, Mode::Write, &anything).unwrap()) == expected);
}

#[test]
fn what_cannot_be_leaves_nothing() {
    struct Crooked;
    impl Origin for Crooked {
        fn bytes(&self) -> u64 {
            BYTES + 1
        }
        fn each_data(&self, _: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
            Ok(())
        }
        fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            Ok(())
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let crooked = Rebuild::begin(&path, ID, Arc::new(Crooked), &anything);
    assert!(matches!(crooked, Err(Error::Size(_))));
    let origin = Arc::new(Kept::default());
    let forbidden = Rebuild::begin(&path, ID, origin, &|_| false);
    assert!(matches!(forbidden, Err(Error::NotAllowed { .. })));
    let kept = Arc::new(Kept {
        refuses: Some(Box::new(|_| true)),
        ..Kept::default()
    });
    let failed = super::rebuild(&path, ID, kept, &anything);
    assert!(matches!(failed, Err(Error::Io { .. })), "{failed:?}");
    assert_eq!(names(directory.path()).len(), 0);
}

#[test]
fn layers_that_are_not_all_here_are_not_merged() {
    let directory = tempfile::tempdir().unwrap();
    let rebuild = begin(&directory.path().join("disk.layer"), &Arc::default()).unwrap();
    let mut disk = rebuild.branch(&anything).unwrap();
    disk.write(0, &mut &[9; 512][..]).unwrap();
    let layer = disk.cut(disk.prepare().unwrap()).unwrap().finish().unwrap();
    assert!(disk.merge(ID, layer.id).is_none());
    rebuild.finish(&|| true).unwrap();
    assert!(disk.merge(ID, layer.id).is_some());
    let mut expected = content();
    expected[..512].fill(9);
    assert!(all(&Disk::open(&layer.path, Mode::Read, &anything).unwrap()) == expected);
}

#[test]
fn what_somebody_else_has_made_is_used_instead() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.layer");
    let kept = Arc::new(Kept::default());
    let [first, second] = [(); 2].map(|()| begin(&path, &kept).unwrap());
    let mut disk = second.branch(&anything).unwrap();
    let mut sector = [0; 512];
    disk.read(0, &mut &mut sector[..]).unwrap();
    first.finish(&|| true).unwrap();
    let read = kept.read.load(Relaxed);
    second.finish(&|| true).unwrap();
    assert!(second.is_finished());
    assert_eq!(second.progress(), (2 << 20, 2 << 20));
    assert!(all(&disk) == content());
    // Its own file takes no room any more, though it is open.
    let used = second.layer.media.allocated_bytes().unwrap();
    assert_eq!(used, path.metadata().unwrap().blocks() * 512);
    assert_eq!(second.arrival.allocated_bytes(), 0);
    assert_eq!(kept.read.load(Relaxed), read, "nothing was read again");
    assert_eq!(names(directory.path()).len(), 2, "a layer and a head");
    // Nor does it need anybody from here on.
    drop((first, second));
    assert_eq!(Arc::strong_count(&kept), 1);
    disk.write(0, &mut &[9; 512][..]).unwrap();
    let layer = disk.cut(disk.prepare().unwrap()).unwrap().finish().unwrap();
    let mut expected = content();
    expected[..512].fill(9);
    assert!(all(&disk) == expected);
    assert!(all(&Disk::open(&layer.path, Mode::Read, &anything).unwrap()) == expected);
}

#[test]
fn what_is_in_the_way_is_not_taken_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.layer");
    let rebuild = begin(&path, &Arc::default()).unwrap();
    let disk = rebuild.branch(&anything).unwrap();
    // The same content, but on something else: what stands on it says otherwise.
    let base = directory.path().join("base");
    std::fs::write(&base, content()).unwrap();
    let other = Disk::create(&path, None, &Foundation::Raw(base), &anything).unwrap();
    drop(other);
    for _ in 0..2 {
        let refused = rebuild.finish(&|| true).unwrap_err();
        assert!(matches!(refused, Error::Exists { .. }), "{refused}");
        assert!(!rebuild.is_finished());
    }
    std::fs::write(&path, "something").unwrap();
    rebuild.finish(&|| true).unwrap_err();
    // Nor what owns less, though it is called the same.
    std::fs::remove_file(&path).unwrap();
    super::rebuild(&path, ID, Arc::new(Less), &anything).unwrap();
    rebuild.finish(&|| true).unwrap_err();
    assert!(all(&disk) == content());
    std::fs::remove_file(&path).unwrap();
    rebuild.finish(&|| true).unwrap();
    assert!(all(&Disk::open(&path, Mode::Read, &anything).unwrap()) == content());
}

#[test]
fn what_cannot_be_had_keeps_nothing_else_from_coming() {
    let directory = tempfile::tempdir().unwrap();
    let is_lost = Arc::new(AtomicU64::new(1));
    let lost = Arc::clone(&is_lost);
    let bad = 3 * (64 << 10)..4 * (64 << 10);
    let refuses = move |range: &Range<u64>| {
        lost.load(Relaxed) == 1 && range.start < bad.end && bad.start < range.end
    };
    let kept = Arc::new(Kept {
        refuses: Some(Box::new(refuses)),
        ..Kept::default()
    });
    let rebuild = begin(&directory.path().join("disk.layer"), &kept).unwrap();
    let failed = rebuild.finish(&|| true);
    assert!(matches!(failed, Err(Error::Io { .. })), "{failed:?}");
    let (come, total) = rebuild.progress();
    assert_eq!(total - come, 64 << 10);
    assert!(!rebuild.is_finished());
    is_lost.store(0, Relaxed);
    rebuild.finish(&|| true).unwrap();
    assert_eq!(kept.read.load(Relaxed), 2 << 20, "each part once");
    assert_eq!(Arc::strong_count(&kept), 1, "it is let go");
}

#[test]
fn what_one_waits_for_does_not_keep_others_waiting() {
    let directory = tempfile::tempdir().unwrap();
    let (kept, has_begun, go_on) = gated(64 << 10);
    let rebuild = begin(&directory.path().join("disk.layer"), &kept).unwrap();
    let disk = rebuild.branch(&anything).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| disk.read(64 << 10, &mut &mut [0; 512][..]).unwrap());
        has_begun.recv().unwrap();
        scope.spawn(|| rebuild.finish(&|| true).unwrap());
        while rebuild.progress().0 < (2 << 20) - (64 << 10) {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(!rebuild.is_finished());
        go_on.send(()).unwrap();
    });
    assert!(rebuild.is_finished());
}

#[test]
fn whoever_meets_a_sync_that_fails_nothing_of_it_gets_a_name() {
    for skip in 0..40 {
        let directory = in_memory();
        let path = directory.path().join("disk.layer");
        let rebuild = begin(&path, &Arc::default()).unwrap();
        let disk = rebuild.branch(&anything).unwrap();
        let finished = thread::scope(|scope| {
            let other = scope.spawn(|| rebuild.finish(&|| true).is_ok());
            let failing = scope.spawn(|| {
                tape::fail(|call| call == Call::Sync, skip, io::ErrorKind::Other);
                let finished = rebuild.finish(&|| true).is_ok();
                tape::permit();
                finished
            });
            other.join().unwrap() | failing.join().unwrap()
        });
        assert_eq!((rebuild.is_finished(), path.exists()), (finished, finished));
        let mut found = vec![0; BYTES as usize];
        let read = disk.read(0, &mut &mut found[..]);
        assert_eq!(read.is_ok(), finished);
        assert!(!finished || found == content());
    }
}

#[test]
fn whoever_is_the_first_all_go_on_with_one() {
    for _ in 0..20 {
        let directory = in_memory();
        let path = directory.path().join("disk.layer");
        let rebuilds = [(); 3].map(|()| begin(&path, &Arc::default()).unwrap());
        let disks = rebuilds
            .each_ref()
            .map(|rebuild| rebuild.branch(&anything).unwrap());
        thread::scope(|scope| {
            for (rebuild, disk) in rebuilds.iter().zip(&disks) {
                for _ in 0..2 {
                    scope.spawn(|| rebuild.finish(&|| true).unwrap());
                }
                scope.spawn(|| assert!(all(disk) == content()));
            }
        });
        for (rebuild, disk) in rebuilds.iter().zip(&disks) {
            assert!(rebuild.is_finished());
            assert!(all(disk) == content());
            assert!(is(&path, &rebuild.layer).unwrap());
        }
        assert_eq!(names(directory.path()).len(), 4);
    }
}

#[test]
fn after_a_sync_that_failed_nothing_of_it_is_shown() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.layer");
    let rebuild = begin(&path, &Arc::default()).unwrap();
    let disk = rebuild.branch(&anything).unwrap();
    tape::fail(|call| call == Call::Sync, 0, io::ErrorKind::Other);
    rebuild.finish(&|| true).unwrap_err();
    tape::permit();
    for _ in 0..2 {
        let mut sector = [0; 512];
        disk.read(0, &mut &mut sector[..]).unwrap_err();
        rebuild.finish(&|| true).unwrap_err();
    }
    assert!(!path.exists() && !rebuild.is_finished());
    // Somebody else may do better.
    super::rebuild(&path, ID, Arc::new(Kept::default()), &anything).unwrap();
    rebuild.finish(&|| true).unwrap();
    assert!(all(&disk) == content());
}
