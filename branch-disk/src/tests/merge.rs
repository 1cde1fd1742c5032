//! Layers that become one.

use std::{fs, os::unix::fs::MetadataExt};

use super::*;
use crate::{Error, LayerId, LayerRef, MAX_DEPTH, Rest, name};

/// A disk on a base with so many sealed layers, each of which has a sector of its own and one that all have written.
fn layered(bench: &Bench, layers: u8) -> (Disk, Vec<LayerRef>, Vec<Vec<u8>>) {
    layered_of("d", bench, layers)
}

/// As [`layered`], of a disk of this name.
fn layered_of(name: &str, bench: &Bench, layers: u8) -> (Disk, Vec<LayerRef>, Vec<Vec<u8>>) {
    let mut disk = bench.on_base(name);
    let (mut sealed_layers, mut contents) = (Vec::new(), Vec::new());
    for layer in 1..=layers {
        write(&mut disk, u64::from(layer) * 512, &[layer; 512]);
        write(&mut disk, 0, &[layer; 512]);
        contents.push(all(&disk));
        sealed_layers.push(sealed(&mut disk));
    }
    (disk, sealed_layers, contents)
}

fn depth(disk: &Disk) -> usize {
    disk.layers().len()
}

#[test]
fn what_is_one_is_what_the_many_were_to_all_who_stand_on_it() {
    let bench = Bench::new(64);
    let (mut disk, layers, contents) = layered(&bench, 9);
    let on_top = Disk::branch(&layers[6].path, Some(layers[6].id), &anything).unwrap();
    let next = disk.prepare().unwrap();
    let frozen = disk.frozen();
    write(&mut disk, 40 * 512, &[0xaa; 512]);
    let before = all(&disk);

    let merged = merge(&mut disk, layers[2].id, layers[6].id);
    assert_eq!(merged.path(), layers[6].path);
    assert_eq!(depth(&disk), 1 + 9 - 4);
    assert!(all(&disk) == before);
    assert!(all(&on_top) == contents[6]);
    // What was begun before goes on.
    assert!(all(&frozen.open().unwrap()) == contents[8]);
    let tenth = disk.cut(next).unwrap().finish().unwrap();
    write(&mut disk, 41 * 512, &[0xbb; 512]);
    let now = all(&disk);

    // So it is when they are opened again, with all files and with those that nobody needs removed.
    drop((disk, on_top));
    for path in [bench.path("d"), tenth.path.clone()] {
        sound(&path);
    }
    for (layer, content) in layers.iter().zip(&contents) {
        assert!(all(&Disk::open(&layer.path, Mode::Read, &anything).unwrap()) == *content);
        sound(&layer.path);
    }
    let rest = merged.remove_rest().unwrap();
    assert_eq!((rest.removed.len(), rest.kept.len()), (4, 0));
    let mut disk = bench.open("d");
    assert!(all(&disk) == now);
    for (number, (layer, content)) in layers.iter().zip(&contents).enumerate() {
        assert_eq!(layer.path.exists(), !(2..6).contains(&number));
        if layer.path.exists() {
            let branch = Disk::branch(&layer.path, Some(layer.id), &anything).unwrap();
            assert!(all(&branch) == *content);
        }
    }
    // And one takes in another that was merged, down to the base.
    let merged = merge(&mut disk, layers[0].id, tenth.id);
    drop(disk);
    merged.remove_rest().unwrap();
    sound(&bench.path("d"));
    let disk = bench.open("d");
    assert_eq!(depth(&disk), 2);
    assert!(all(&disk) == now);
    let counts = disk.counts();
    assert!(counts.base_reads > 0 && counts.layer_reads > 0);
}

#[test]
fn what_is_needed_stays() {
    let bench = Bench::new(64);
    let (mut disk, layers, contents) = layered(&bench, 6);
    // One that is open, and was written to; and some in another directory, which nobody has open: one of the topmost, which stays.
    let mut beside = Disk::branch(&layers[1].path, None, &anything).unwrap();
    write(&mut beside, 512, &[9; 512]);
    let elsewhere = tempfile::tempdir().unwrap();
    let there = elsewhere.path().join("there");
    let on = |layer: &LayerRef| Foundation::Layer(layer.path.clone(), None);
    drop(Disk::create(&there, None, &on(&layers[3]), &anything).unwrap());
    let topmost = elsewhere.path().join("topmost");
    drop(Disk::create(&topmost, None, &on(&layers[5]), &anything).unwrap());

    let merged = merge(&mut disk, layers[0].id, layers[5].id);
    let paths = |range: std::ops::Range<usize>| -> Vec<PathBuf> {
        let layers = layers[range].iter().rev();
        layers.map(|layer| layer.path.clone()).collect()
    };
    let Rest { removed, kept } = merged.remove_rest().unwrap();
    assert_eq!((removed, kept), (paths(4..5), paths(0..4)));
    assert!(all(&Disk::open(&there, Mode::Read, &anything).unwrap()) == contents[3]);

    // The other disk goes, and with it the name that it had its layer keep.
    fs::remove_file(&there).unwrap();
    let third = layers[3].id.to_string();
    let is_kept = |name: &&String| name.ends_with(".kept") && name.contains(&third);
    let names = bench.names();
    let kept: Vec<_> = names.iter().filter(is_kept).collect();
    fs::remove_file(bench.path(kept[0])).unwrap();
    let Rest { removed, kept } = merged.remove_rest().unwrap();
    assert_eq!(
        (removed, kept),
        (paths(2..4), [paths(4..5), paths(0..2)].concat())
    );

    // One that is open and was not written to leaves nothing when it is closed.
    drop(beside);
    let head = fs::read_dir(bench.dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let head = head.filter(|path| path.extension() == Some("head".as_ref()));
    head.for_each(|path| fs::remove_file(path).unwrap());
    let open = Disk::open(&layers[0].path, Mode::Read, &anything).unwrap();
    assert_eq!(merged.remove_rest().unwrap().removed, paths(1..2));
    drop(open);
    assert_eq!(merged.remove_rest().unwrap().removed, paths(0..1));
    drop(disk);
    assert!(all(&Disk::open(&topmost, Mode::Read, &anything).unwrap()) == contents[5]);
    sound(&bench.path("d"));
}

#[test]
fn a_directory_in_which_not_every_layer_can_be_read_stays_as_it_is() {
    let bench = Bench::new(64);
    let (mut disk, layers, _) = layered(&bench, 3);
    let merged = merge(&mut disk, layers[0].id, layers[2].id);
    let mut newer = fs::read(bench.path("d")).unwrap();
    newer[8] = 9;
    let digest = crate::page::digest(&newer[..4080]);
    newer[4080..4096].copy_from_slice(&digest);
    fs::write(bench.path("newer"), newer).unwrap();
    // But what the guest of a raw image has written there is nobody's.
    fs::write(bench.path("raw"), [&b"FERMDISK"[..], &[7; 8192]].concat()).unwrap();
    let names = bench.names();
    let refused = merged.remove_rest();
    assert!(matches!(refused, Err(Error::Newer { .. })));
    assert_eq!(bench.names(), names);
    // It is nobody's any more afterwards.
    fs::remove_file(bench.path("newer")).unwrap();
    let other = Disk::branch(&layers[1].path, None, &anything).unwrap();
    drop(other);
    assert_eq!(merged.remove_rest().unwrap().removed.len(), 2);
}

#[test]
fn a_merge_that_is_not_wanted_any_more_leaves_nothing() {
    let bench = Bench::new(64);
    let (disk, layers, contents) = layered(&bench, 3);
    let names = bench.names();
    let merge = disk.merge(layers[0].id, layers[2].id).unwrap();
    let Err(Error::Io { source, .. }) = merge.write(&|| false) else {
        panic!("it was made");
    };
    assert_eq!(source.kind(), std::io::ErrorKind::Interrupted);
    assert_eq!(bench.names(), names);
    assert!(all(&disk) == contents[2]);

    // Nor is there one of what is not two sealed layers of the disk.
    let head = disk.id().unwrap();
    for (lowest, topmost) in [(0, 0), (2, 1)] {
        assert!(disk.merge(layers[lowest].id, layers[topmost].id).is_none());
    }
    assert!(disk.merge(layers[0].id, head).is_none());
    assert!(disk.merge(LayerId([7; 16]), layers[2].id).is_none());
}

#[test]
fn a_draft_is_left_to_who_is_at_work_on_it() {
    let bench = Bench::new(64);
    let (mut disk, layers, _) = layered(&bench, 3);
    let id = LayerId([7; 16]);
    let left = bench.path(&format!(".d.{id}.partial"));
    let in_work = bench.path(&format!(".d.{}.partial", LayerId([8; 16])));
    fs::write(&left, "").unwrap();
    let file = fs::File::create(&in_work).unwrap();
    file.lock().unwrap();
    sealed(&mut disk);
    assert!(!left.exists() && in_work.exists());
    drop(file);
    merge(&mut disk, layers[0].id, layers[2].id);
    write(&mut disk, 0, &[1; 512]);
    sealed(&mut disk);
    assert!(!in_work.exists());
}

#[test]
fn a_crash_and_somebody_else_who_merges_the_same_are_no_hindrance() {
    let bench = Bench::new(64);
    let (mut disk, layers, contents) = layered(&bench, 3);
    let topmost = layers[2].id;
    fs::write(bench.path(&format!(".d.{topmost}.partial")), "").unwrap();
    let ours = disk.merge(layers[0].id, topmost).unwrap().write(&|| true);
    let ours = ours.unwrap();
    // Theirs is in the place of ours, and may stand on what is to be removed.
    let copy = fs::read(&layers[2].path).unwrap();
    fs::remove_file(&layers[2].path).unwrap();
    fs::write(&layers[2].path, copy).unwrap();
    assert!(disk.adopt(&ours));
    assert_eq!(ours.remove_rest().unwrap().removed, [] as [PathBuf; 0]);
    assert!(all(&disk) == contents[2]);

    // Nor is theirs replaced.
    let bench = Bench::new(64);
    let (disk, layers, _) = layered(&bench, 2);
    fs::remove_file(&layers[1].path).unwrap();
    fs::write(&layers[1].path, "theirs").unwrap();
    let merge = disk.merge(layers[0].id, layers[1].id).unwrap();
    let refused = merge.write(&|| true);
    assert!(
        matches!(refused, Err(Error::OtherLayer { .. })),
        "{refused:?}"
    );
    assert_eq!(fs::read(&layers[1].path).unwrap(), b"theirs");
}

#[test]
fn what_lies_elsewhere_is_not_removed_and_what_is_made_belongs_to_whom_it_did() {
    let bench = Bench::new(64);
    let (disk, layers, contents) = layered(&bench, 2);
    drop(disk);
    let elsewhere = tempfile::tempdir().unwrap();
    let there = elsewhere.path().canonicalize().unwrap().join("there");
    let on = Foundation::Layer(layers[1].path.clone(), None);
    let mut disk = Disk::create(&there, None, &on, &anything).unwrap();
    let ours = [3, 4].map(|byte| {
        write(&mut disk, 0, &[byte; 512]);
        sealed(&mut disk)
    });
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o640);
    fs::set_permissions(&ours[1].path, mode).unwrap();
    for name in bench.names().iter().filter(|name| name.ends_with(".kept")) {
        fs::remove_file(bench.path(name)).unwrap();
    }
    let merged = merge(&mut disk, layers[0].id, ours[1].id);
    let Rest { removed, kept } = merged.remove_rest().unwrap();
    assert_eq!(removed, [ours[0].path.clone()]);
    assert_eq!(kept, [layers[1].path.clone(), layers[0].path.clone()]);
    assert_eq!(fs::metadata(merged.path()).unwrap().mode() & 0o777, 0o640);
    drop(disk);
    sound(&there);
    // It names the base by its path, as it lies elsewhere now.
    let disk = Disk::open(&there, Mode::Write, &anything).unwrap();
    assert_eq!(disk.layers().len(), 2);
    let expected = [&[4; 512][..], &contents[1][512..]].concat();
    assert!(all(&disk) == expected);
}

#[test]
fn a_layer_that_a_disk_elsewhere_stands_on_stays_however_often_it_is_merged() {
    layers_stay_for_who_is_elsewhere("d");
}

#[test]
fn a_layer_of_a_disk_with_the_longest_name_stays_as_well() {
    layers_stay_for_who_is_elsewhere(&"d".repeat(name::MAX_DISK_BYTES));
}

fn layers_stay_for_who_is_elsewhere(name: &str) {
    let bench = Bench::new(64);
    let (mut disk, layers, contents) = layered_of(name, &bench, 2);
    let elsewhere = tempfile::tempdir().unwrap();
    let there = elsewhere.path().join("there");
    let on = Foundation::Layer(layers[1].path.clone(), None);
    drop(Disk::create(&there, None, &on, &anything).unwrap());
    let first = merge(&mut disk, layers[0].id, layers[1].id);
    assert_eq!(first.remove_rest().unwrap().removed.len(), 1);
    // What was there before takes no space any more.
    let kept = bench
        .names()
        .into_iter()
        .find(|name| name.ends_with(".kept"));
    let kept = fs::metadata(bench.path(&kept.unwrap())).unwrap();
    assert_eq!(kept.ino(), fs::metadata(&layers[1].path).unwrap().ino());
    drop(first);
    let more = [7, 8].map(|byte| {
        write(&mut disk, 512 * 20, &[byte; 512]);
        sealed(&mut disk)
    });
    let second = merge(&mut disk, layers[1].id, more[1].id);
    let rest = second.remove_rest().unwrap();
    assert_eq!(rest.removed, [more[0].path.clone()]);
    assert_eq!(rest.kept, [layers[1].path.clone()]);
    assert!(all(&Disk::open(&there, Mode::Read, &anything).unwrap()) == contents[1]);
}

#[test]
fn a_layer_that_was_asked_for_stays_though_nobody_stands_on_it() {
    let bench = Bench::new(64);
    let (mut disk, layers, contents) = layered(&bench, 3);
    // Of another machine, which ends and leaves a snapshot without disks.
    let branch = Disk::branch(&layers[0].path, None, &anything).unwrap();
    for _ in 0..2 {
        branch.to_keep(layers[0].id).unwrap().keep().unwrap();
    }
    drop(branch);
    let merged = merge(&mut disk, layers[0].id, layers[2].id);
    let rest = merged.remove_rest().unwrap();
    assert_eq!(rest.removed, [layers[1].path.clone()]);
    let kept = Disk::open(&layers[0].path, Mode::Read, &anything).unwrap();
    assert!(all(&kept) == contents[0]);
}

#[test]
fn what_was_started_over_meanwhile_takes_nothing_in() {
    let bench = Bench::new(64);
    let (disk, layers, contents) = layered(&bench, 2);
    drop(disk);
    let mut disk = Disk::branch(&layers[1].path, None, &anything).unwrap();
    let ours = [3, 4].map(|byte| {
        write(&mut disk, 0, &[byte; 512]);
        sealed(&mut disk)
    });
    let merged = disk.merge(ours[0].id, ours[1].id).unwrap();
    let merged = merged.write(&|| true).unwrap();
    disk.start_over(&layers[1], &anything).unwrap();
    assert!(!disk.adopt(&merged));
    assert!(all(&disk) == contents[1]);
    sound(&ours[1].path);
}

#[test]
fn zeros_are_holes_and_other_sizes_do_not_matter() {
    let bench = Bench::new(0);
    let on = Foundation::Nothing;
    let path = bench.path("d");
    let mut disk = Disk::create(&path, Some(8 << 20), &on, &anything).unwrap();
    write(&mut disk, 0, &vec![1; 4 << 20]);
    let first = sealed(&mut disk);
    let grown = disk.plan().grown_to(64 << 20).unwrap().prepare().unwrap();
    disk.discard(1 << 20, 2 << 20).unwrap();
    write(&mut disk, 6 << 20, &[2; 1536]);
    disk.cut(grown).unwrap().finish().unwrap();
    write(&mut disk, 63 << 20, &[3; 4096]);
    let last = sealed(&mut disk);
    let before = all(&disk);
    let bytes = disk
        .merge(first.id, last.id)
        .unwrap()
        .allocated_bytes()
        .unwrap();
    assert_eq!(bytes.len(), 3);
    assert!(bytes[0] >= 4 << 20);
    let merged = merge(&mut disk, first.id, last.id);
    assert!(all(&disk) == before);
    let taken = fs::metadata(merged.path()).unwrap().blocks() * 512;
    assert!(taken < (2 << 20) + (256 << 10), "{taken}");
    let owned = disk.info().unwrap().layers[1].owned_bytes;
    assert_eq!(owned, (4 << 20) + 1536 + 4096);
}

#[test]
fn layers_that_nobody_has_finished_become_one() {
    let bench = Bench::new(64);
    let mut disk = bench.on_base("d");
    let mut layers = Vec::new();
    for layer in 1..=5u8 {
        write(&mut disk, u64::from(layer) * 512, &[layer; 512]);
        let cut = disk.cut(disk.prepare().unwrap()).unwrap();
        layers.push(cut.layer().clone());
    }
    let before = all(&disk);
    let merged = merge(&mut disk, layers[0].id, layers[3].id);
    assert_eq!(merged.remove_rest().unwrap().removed.len(), 3);
    assert_eq!(depth(&disk), 3);
    assert!(all(&disk) == before);
    disk.flush().unwrap();
    drop(disk);
    let disk = bench.open("d");
    assert!(all(&disk) == before);
    drop(disk);
    for path in [&layers[3].path, &layers[4].path, &bench.path("d")] {
        sound(path);
    }
}

#[test]
fn a_chain_ends_somewhere() {
    let bench = Bench::in_memory(8);
    let mut disk = bench.on_base("d");
    for layer in 1..MAX_DEPTH {
        write(&mut disk, 0, &[layer as u8; 512]);
        sealed(&mut disk);
    }
    write(&mut disk, 512, &[7; 512]);
    assert!(matches!(disk.prepare(), Err(Error::TooDeep { .. })));
    drop(disk);
    let mut disk = bench.open("d");
    let ids = disk.sealed_layers();
    let (lowest, topmost) = (ids[0], ids[MAX_DEPTH - 2]);
    let on = Foundation::Layer(bench.path(&format!("d.{topmost}.layer")), None);
    let head = Disk::create(&bench.path("e"), None, &on, &anything).unwrap();
    drop(head);
    // One more, by somebody who means no good.
    let header = crate::header::Header {
        id: LayerId([9; 16]),
        depth: MAX_DEPTH as u32 + 1,
        below: MAX_DEPTH as u32,
        ..disk.layers()[1].header.clone()
    };
    let path = bench.path("f");
    let parent = crate::header::Parent::Layer {
        path: "e".into(),
        id: bench.open("e").id().unwrap(),
        bytes: disk.bytes(),
    };
    let header = crate::header::Header { parent, ..header };
    let draft = crate::create::Draft::write(&path, &path, &header).unwrap();
    draft.publish(&path).unwrap();
    let refused = Disk::open(&path, Mode::Read, &anything);
    assert!(matches!(refused, Err(Error::Damaged { .. })), "{refused:?}");

    // Merged, it goes on.
    let merged = merge(&mut disk, lowest, topmost);
    merged.remove_rest().unwrap();
    write(&mut disk, 0, &[8; 512]);
    sealed(&mut disk);
    let depth = disk.layers()[2].header.depth as usize;
    assert_eq!((disk.layers().len(), depth), (3, MAX_DEPTH + 1));
    assert_eq!(read(&disk, 512, 512), [7; 512]);
    let path = disk.path().to_owned();
    drop(disk);
    sound(&path);
}
