//! Crashes of the host at any point, with any part of what was not synced on the disk.

mod host;
mod rebuild;

use std::{
    collections::BTreeSet, io::ErrorKind, os::unix::fs::MetadataExt, sync::mpsc, thread,
    time::Duration,
};

use proptest::{collection::vec, prelude::*};

use host::Host;

use super::*;
use crate::{
    Cut, Space,
    tape::{self, Call, Event, Told},
};

const SECTORS: u64 = 160;
const BASE_SECTORS: usize = 100;
const BASE_STAMP: u32 = 1 << 20;

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64),
    Zero(u64, u64, Space),
    Flush,
    Cut,
    /// Finishes the cuts so far.
    Finish,
    Reopen,
    /// Merges all sealed layers, once they are finished, and removes those that no snapshot has.
    Merge,
    /// After so many more writes of what is not data there is no space for one.
    NoSpace(u32),
}

fn op() -> impl Strategy<Value = Op> {
    let range = || (0..SECTORS, 1..24u64).prop_map(|(at, len)| (at, len.min(SECTORS - at)));
    let space = prop_oneof![Just(Space::Free), Just(Space::Keep)];
    prop_oneof![
        6 => range().prop_map(|(at, len)| Op::Write(at, len)),
        2 => (range(), space).prop_map(|((at, len), space)| Op::Zero(at, len, space)),
        3 => Just(Op::Flush),
        2 => Just(Op::Cut),
        2 => Just(Op::Finish),
        1 => Just(Op::Reopen),
        2 => Just(Op::Merge),
        2 => (0..5u32).prop_map(Op::NoSpace),
    ]
}

fn stamped(stamps: &[u32]) -> Vec<u8> {
    stamps
        .iter()
        .flat_map(|stamp| stamp.to_le_bytes().repeat(128))
        .collect()
}

/// The stamp of each sector, all of which must be of one.
fn stamps(bytes: &[u8]) -> Vec<u32> {
    bytes
        .chunks_exact(512)
        .map(|sector| {
            let stamp: [u8; 4] = sector[..4].try_into().unwrap();
            assert!(
                sector.chunks_exact(4).all(|word| word == stamp),
                "a torn sector"
            );
            u32::from_le_bytes(stamp)
        })
        .collect()
}

fn base() -> Vec<u32> {
    (0..BASE_SECTORS as u32)
        .map(|sector| BASE_STAMP + sector)
        .collect()
}

/// Works on a disk `d`, and returns what was done.
fn work(dir: &Path, ops: &[Op]) -> Vec<Event> {
    std::fs::write(dir.join("base"), stamped(&base())).unwrap();
    tape::start();
    let path = dir.join("d");
    let on = Foundation::Raw(dir.join("base"));
    let mut disk = Disk::create(&path, Some(SECTORS * 512), &on, &anything).unwrap();
    let mut content = base();
    content.resize(SECTORS as usize, 0);
    tape::note(Event::Told(Told::Flushed));
    let mut cuts: Vec<(Cut, Vec<u32>)> = Vec::new();
    let finish = |cuts: &mut Vec<(Cut, Vec<u32>)>| {
        for (cut, content) in cuts.drain(..) {
            let again = Cut {
                layer: cut.layer.clone(),
                seals: cut.seals.clone(),
            };
            let finished = cut.finish().or_else(|_| {
                tape::note(Event::Told(Told::Refused));
                again.finish()
            });
            let layer = finished.unwrap().path.file_name().unwrap().into();
            tape::note(Event::Told(Told::Snapshot { layer, content }));
        }
    };
    // Whether the host refuses nothing.
    let mut permitted = true;
    for (op, stamp) in ops.iter().zip(1..) {
        let begins = |at: u64, len: u64, stamp| {
            tape::note(Event::Told(Told::Begins {
                start: at,
                end: at + len,
                stamp,
            }));
        };
        match *op {
            Op::Write(at, len) => {
                begins(at, len, stamp);
                content[at as usize..(at + len) as usize].fill(stamp);
                write(&mut disk, at * 512, &stamped(&vec![stamp; len as usize]));
            }
            Op::Zero(at, len, space) => {
                begins(at, len, 0);
                content[at as usize..(at + len) as usize].fill(0);
                disk.write_zeroes(at * 512, len * 512, space).unwrap();
            }
            Op::Flush => {
                let flushed = disk.flush();
                assert!(flushed.is_ok() || !permitted);
                permitted |= flushed.is_err();
                tape::note(Event::Told(match flushed {
                    Ok(()) => Told::Flushed,
                    Err(_) => Told::Refused,
                }));
            }
            Op::Cut => {
                tape::permit();
                permitted = true;
                cuts.push((disk.cut(disk.prepare().unwrap()).unwrap(), content.clone()));
            }
            Op::Finish => finish(&mut cuts),
            Op::Merge => {
                tape::permit();
                permitted = true;
                finish(&mut cuts);
                merge_all(&mut disk);
            }
            Op::NoSpace(skip) => {
                tape::fail(|call| call == Call::Write, skip, ErrorKind::StorageFull);
                permitted = false;
            }
            Op::Reopen => {
                tape::permit();
                permitted = true;
                finish(&mut cuts);
                drop(disk);
                tape::note(Event::Told(Told::Flushed));
                disk = Disk::open(&path, Mode::Write, &anything).unwrap();
            }
        }
        assert!(stamps(&all(&disk)) == content);
    }
    let events = tape::stop();
    drop(disk);
    events
}

/// Merges the sealed layers of `disk`, and has those go that are one now.
fn merge_all(disk: &mut Disk) {
    let ids: Vec<_> = disk.layers().iter().map(|layer| layer.header.id).collect();
    let [lowest, .., topmost, _] = *ids else {
        return;
    };
    let merged = merge(disk, lowest, topmost);
    for layer in merged.rest() {
        let layer = layer.file_name().unwrap().into();
        tape::note(Event::Told(Told::Gone { layer }));
    }
    let rest = merged.remove_rest().unwrap();
    assert_eq!(rest.kept, [] as [PathBuf; 0]);
}

/// What may be read after a crash behind `events`, and the snapshots that must be there.
type Expected = (Vec<BTreeSet<u32>>, Vec<(PathBuf, Vec<u32>)>);

fn expected(events: &[Event]) -> Expected {
    let mut content = base();
    content.resize(SECTORS as usize, 0);
    let mut possible: Vec<BTreeSet<u32>> = content.iter().map(|stamp| [*stamp].into()).collect();
    let mut snapshots = Vec::new();
    for event in events {
        let Event::Told(told) = event else { continue };
        match told {
            Told::Begins { start, end, stamp } => {
                for sector in *start..*end {
                    content[sector as usize] = *stamp;
                    possible[sector as usize].insert(*stamp);
                }
            }
            Told::Flushed => {
                possible = content.iter().map(|stamp| [*stamp].into()).collect();
            }
            Told::Snapshot { layer, content } => snapshots.push((layer.clone(), content.clone())),
            Told::Gone { layer } => snapshots.retain(|(name, _)| name != layer),
            Told::Refused => {}
        }
    }
    (possible, snapshots)
}

/// What the first `at` events leave, where the host crashes then.
fn crashed(events: &[Event], at: usize, seed: u32) -> TempDir {
    let dir = in_memory();
    let mut host = Host::default();
    for event in &events[..at] {
        host.take(event);
    }
    let mut state = seed | 1;
    host.crash(dir.path(), || {
        // xorshift
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    });
    dir
}

fn crash_and_look(events: &[Event], at: usize, seed: u32) {
    let dir = crashed(events, at, seed);
    std::fs::write(dir.path().join("base"), stamped(&base())).unwrap();
    let (possible, snapshots) = expected(&events[..at]);
    let path = dir.path().join("d");
    sound(&path);
    // Who only looks sees the same as who goes on.
    let looked = stamps(&all(&Disk::open(&path, Mode::Read, &anything).unwrap()));
    let mut disk = Disk::open(&path, Mode::Write, &anything).unwrap();
    let found = stamps(&all(&disk));
    assert!(looked == found);
    for (sector, (found, possible)) in found.iter().zip(&possible).enumerate() {
        assert!(
            possible.contains(found),
            "sector {sector} is {found} and not of {possible:?}"
        );
    }
    for (layer, content) in &snapshots {
        let branch = Disk::branch(&dir.path().join(layer), None, &anything).unwrap();
        assert!(stamps(&all(&branch)) == *content, "{}", layer.display());
    }
    // And it goes on.
    write(&mut disk, 0, &stamped(&[77; 9]));
    disk.discard(20 * 512, 512).unwrap();
    let layer = sealed(&mut disk);
    let mut content = found;
    content[..9].fill(77);
    content[20] = 0;
    drop(disk);
    for path in [&path, &layer.path] {
        sound(path);
        assert!(stamps(&all(&Disk::open(path, Mode::Read, &anything).unwrap())) == content);
    }
}

/// The first point at which the disk is there.
fn begin(events: &[Event]) -> usize {
    let flushed = |event: &Event| matches!(event, Event::Told(Told::Flushed));
    events.iter().position(flushed).unwrap() + 1
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn a_crash_loses_nothing_that_was_flushed(
        ops in vec(op(), 1..24),
        crashes in vec((any::<prop::sample::Index>(), any::<u32>()), 12),
    ) {
        let dir = in_memory();
        let events = work(dir.path(), &ops);
        let begin = begin(&events);
        for (at, seed) in crashes {
            crash_and_look(&events, begin + at.index(events.len() + 1 - begin), seed);
        }
    }
}

#[test]
fn every_point_of_a_merge_can_be_the_last() {
    let ops = [
        Op::Write(3, 9),
        Op::Cut,
        Op::Write(8, 20),
        Op::Zero(4, 2, Space::Free),
        Op::Cut,
        Op::Write(5, 5),
        Op::Merge,
        Op::Write(6, 1),
        Op::Cut,
        Op::Merge,
        Op::Write(7, 1),
    ];
    let dir = in_memory();
    let events = work(dir.path(), &ops);
    let gone = |event: &&Event| matches!(event, Event::Told(Told::Gone { .. }));
    assert_eq!(events.iter().filter(gone).count(), 2);
    // Nothing goes before the name of what it was merged into is durable.
    let mut durable = true;
    for event in &events {
        match event {
            Event::Renamed { .. } => durable = false,
            Event::SyncedNames => durable = true,
            Event::Removed { name } => {
                assert!(durable || name.extension() != Some("layer".as_ref()));
            }
            _ => {}
        }
    }
    everywhere(&events);
}

#[test]
fn every_point_of_a_seal_and_a_flush_can_be_the_last() {
    let ops = [
        Op::Write(3, 9),
        Op::Flush,
        Op::Write(8, 20),
        Op::Cut,
        Op::Write(5, 5),
        Op::Flush,
        Op::Zero(0, 4, Space::Free),
        Op::Finish,
        Op::Cut,
        Op::Write(70, 24),
        Op::Finish,
        Op::Write(1, 2),
        Op::Flush,
    ];
    let dir = in_memory();
    everywhere(&work(dir.path(), &ops));
}

/// Crashes at every point.
fn everywhere(events: &[Event]) {
    for at in begin(events)..=events.len() {
        for seed in 0..6u32 {
            crash_and_look(
                events,
                at,
                (seed + 1).wrapping_mul(0x9e37_79b9u32.rotate_left(at as u32)),
            );
        }
    }
}

/// A process that is killed leaves all that it wrote to files, in order.
#[test]
fn what_a_killed_process_leaves_is_made_durable_before_it_is_relied_upon() {
    let dir = in_memory();
    let events = work(dir.path(), &[Op::Write(3, 9), Op::Flush]);
    // Killed between the page of the bitmap and the sync of it.
    let last_sync = events
        .iter()
        .rposition(|event| matches!(event, Event::Synced { .. }))
        .unwrap();
    let there = in_memory();
    std::fs::write(there.path().join("base"), stamped(&base())).unwrap();
    let mut host = Host::default();
    events[..last_sync]
        .iter()
        .for_each(|event| host.take(event));
    host.take(&Event::SyncedNames);
    let inodes: Vec<u64> = host.inodes.keys().copied().collect();
    inodes
        .iter()
        .for_each(|inode| host.take(&Event::Synced { inode: *inode }));
    host.crash(there.path(), || 1);
    let path = there.path().join("d");
    let mut disk = Disk::open(&path, Mode::Write, &anything).unwrap();
    assert_eq!(stamps(&all(&disk))[3..12], [1; 9]);
    tape::start();
    disk.flush().unwrap();
    let synced = tape::stop();
    assert!(matches!(synced[..], [Event::Synced { .. }]), "{synced:?}");
}

/// As above, of a seal that nobody has synced, with a layer on it that has none.
#[test]
fn a_seal_that_a_killed_process_wrote_is_made_durable_before_what_is_above_it() {
    let bench = Bench::in_memory(8);
    let mut disk = bench.on_base("d");
    let cuts = [1, 2].map(|byte| {
        write(&mut disk, 0, &[byte; 512]);
        disk.cut(disk.prepare().unwrap()).unwrap()
    });
    // Of the layer's data, of its bits, of its seal.
    tape::fail(|call| call == Call::Sync, 2, ErrorKind::Other);
    let [first, second] = cuts.map(|cut| (cut.layer().path.clone(), cut));
    first.1.finish().unwrap_err();
    tape::permit();
    drop((disk, second.1));
    tape::start();
    let mut disk = bench.open("d");
    let done = tape::stop();
    let inode = |path: &Path| std::fs::metadata(path).unwrap().ino();
    let at = |path: &Path, of: fn(&Event) -> Option<u64>| {
        let inode = inode(path);
        done.iter().position(|event| of(event) == Some(inode))
    };
    let synced = at(&first.0, |event| match event {
        Event::Synced { inode } => Some(*inode),
        _ => None,
    });
    let sealed_above = at(&second.0, |event| match event {
        Event::Wrote { inode, .. } => Some(*inode),
        _ => None,
    });
    assert!(synced.unwrap() < sealed_above.unwrap(), "{done:?}");
    write(&mut disk, 0, &[3; 512]);
    drop(disk);
    sound(&bench.path("d"));
}

/// Flushes, or says why not.
fn flush(disk: &mut Disk) -> Result<(), String> {
    disk.flush().map_err(|error| error.to_string())
}

#[test]
fn after_a_sync_that_failed_nothing_is_promised() {
    let syncs = |call| matches!(call, Call::Sync | Call::SyncNames);
    let written = |bench: &Bench| {
        let mut disk = bench.on_base("d");
        write(&mut disk, 0, &[1; 512]);
        disk
    };
    // Of the head: of its data, and of its bits.
    for skip in 0..2 {
        let bench = Bench::in_memory(8);
        let mut disk = written(&bench);
        let next = disk.prepare().unwrap();
        tape::fail(syncs, skip, ErrorKind::Other);
        assert!(flush(&mut disk).is_err());
        assert!(flush(&mut disk).is_err());
        assert!(disk.write(0, &mut &[1; 512][..]).is_err());
        assert!(disk.cut(next).is_err());
        tape::permit();
    }
    // Of a sealed layer: of its data, of the names, of its bits, and of its seal; whoever comes first.
    for skip in 0..4 {
        let bench = Bench::in_memory(8);
        let mut disk = written(&bench);
        let cut = disk.cut(disk.prepare().unwrap()).unwrap();
        tape::fail(syncs, skip, ErrorKind::Other);
        assert!(flush(&mut disk).is_err());
        assert!(cut.finish().is_err(), "{skip}");
        assert!(disk.write(0, &mut &[1; 512][..]).is_err());
        tape::permit();

        let bench = Bench::in_memory(8);
        let mut disk = written(&bench);
        let cut = disk.cut(disk.prepare().unwrap()).unwrap();
        tape::fail(syncs, skip, ErrorKind::Other);
        assert!(cut.finish().is_err());
        assert!(flush(&mut disk).is_err(), "{skip}");
        assert!(disk.write(0, &mut &[1; 512][..]).is_err());
        tape::permit();
    }
}

#[test]
fn a_directory_that_cannot_be_opened_ends_one_flush_and_not_the_disk() {
    let bench = Bench::in_memory(8);
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &[1; 512]);
    let cut = disk.cut(disk.prepare().unwrap()).unwrap();
    tape::fail(|call| call == Call::OpenNames, 0, ErrorKind::Other);
    assert!(flush(&mut disk).is_err());
    write(&mut disk, 512, &[2; 512]);
    assert_eq!(flush(&mut disk), Ok(()));
    let layer = cut.finish().unwrap();
    tape::permit();
    assert_eq!(read(&disk, 512, 512), [2; 512]);
    sound(&layer.path);
}

#[test]
fn what_there_was_no_space_for_is_written_when_there_is() {
    let ops = [
        Op::Write(3, 9),
        Op::Flush,
        Op::Write(8, 20),
        // The page of the bitmap.
        Op::NoSpace(0),
        Op::Flush,
        Op::Flush,
        Op::Write(40, 3),
        Op::NoSpace(0),
        Op::Flush,
        Op::Write(50, 3),
        Op::Cut,
        // That of the sealed layer, then its seal.
        Op::NoSpace(0),
        Op::Flush,
        Op::NoSpace(1),
        Op::Flush,
        Op::Write(60, 3),
        Op::Flush,
        Op::Cut,
        // The descriptor of the first, after its map.
        Op::NoSpace(1),
        Op::Finish,
        Op::Write(70, 3),
        Op::Cut,
        // The map, after bitmap and seal.
        Op::NoSpace(2),
        Op::Finish,
    ];
    let dir = in_memory();
    let events = work(dir.path(), &ops);
    let refused = |event: &&Event| matches!(event, Event::Told(Told::Refused));
    assert_eq!(events.iter().filter(refused).count(), 6);
    everywhere(&events);
}

/// The map of a sealed layer may be large, and who writes it waits for the disk.
#[test]
fn a_flush_does_not_wait_for_a_map() {
    const HANG: Duration = Duration::from_secs(60);
    let bench = Bench::in_memory(8);
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &[1; 512]);
    let cut = disk.cut(disk.prepare().unwrap()).unwrap();
    write(&mut disk, 0, &[2; 512]);
    let (at_map, is_at_map) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel::<()>();
    let finisher = thread::spawn(move || {
        let mut syncs = 0;
        tape::answer(move |call| {
            syncs += u32::from(call == Call::Sync);
            // Of the data, of the bits, of the seal, of the map.
            if call == Call::Sync && syncs == 4 {
                at_map.send(()).unwrap();
                may_go_on.recv().unwrap();
            }
            Ok(())
        });
        cut.finish().unwrap()
    });
    is_at_map.recv_timeout(HANG).unwrap();
    let (flushed, is_flushed) = mpsc::channel();
    thread::spawn(move || flushed.send(flush(&mut disk)));
    assert_eq!(is_flushed.recv_timeout(HANG), Ok(Ok(())));
    go_on.send(()).unwrap();
    sound(&finisher.join().unwrap().path);
}
