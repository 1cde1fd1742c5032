use std::{fs, os::unix::fs::MetadataExt};

use super::*;
use crate::{Error, Space};

#[test]
fn a_cut_is_an_instant_and_branches_of_it_go_their_own_ways() {
    let bench = Bench::new(64);
    let mut disk = bench.on_base("d");
    write(&mut disk, 512, &[0xaa; 1024]);
    let monday = sealed(&mut disk);
    assert_eq!(disk.path(), bench.path("d"));
    write(&mut disk, 1024, &[0xbb; 1024]);

    let mut content = bench.base.clone();
    content[512..1536].fill(0xaa);
    let mut one = Disk::branch(&monday.path, Some(monday.id), &anything).unwrap();
    let mut two = Disk::branch(&monday.path, Some(monday.id), &anything).unwrap();
    assert_ne!(one.path(), two.path());
    assert!(all(&one) == content && all(&two) == content);
    write(&mut one, 0, &[1; 512]);
    write(&mut two, 0, &[2; 512]);
    assert_eq!(read(&one, 0, 512), [1; 512]);
    assert_eq!(read(&two, 0, 512), [2; 512]);
    content[1024..2048].fill(0xbb);
    assert!(all(&disk) == content);

    let paths = [disk.path(), one.path(), two.path()].map(Path::to_owned);
    let contents = [all(&disk), all(&one), all(&two)];
    drop((disk, one, two));
    for (path, content) in paths.iter().zip(contents) {
        sound(path);
        let disk = Disk::open(path, Mode::Write, &anything).unwrap();
        assert!(all(&disk) == content);
    }
}

#[test]
fn a_branch_that_starts_over_is_what_it_began_as() {
    let bench = Bench::new(64);
    let mut disk = bench.on_base("d");
    write(&mut disk, 512, &[0xaa; 1024]);
    let monday = sealed(&mut disk);
    let began = all(&disk);
    let mut branch = Disk::branch(&monday.path, Some(monday.id), &anything).unwrap();
    let path = branch.path().to_owned();
    let inode = || fs::metadata(&path).unwrap().ino();
    let first = inode();
    branch.start_over(&monday, &anything).unwrap();
    assert_eq!(inode(), first, "there was nothing to undo");
    for round in 1..4 {
        write(&mut branch, 0, &[round; 2048]);
        branch.flush().unwrap();
        branch.discard(8192, 4096).unwrap();
        branch.start_over(&monday, &anything).unwrap();
        assert!(all(&branch) == began);
        assert_eq!(branch.path(), path);
    }
    // What a snapshot has, it keeps; a disk that has grown is as large as it was.
    write(&mut branch, 512, &[7; 512]);
    let kept = sealed(&mut branch);
    let content = all(&branch);
    let grown = branch.plan().grown_to(2 * branch.bytes()).unwrap();
    let cut = branch.cut(grown.prepare().unwrap()).unwrap();
    cut.finish().unwrap();
    branch.start_over(&monday, &anything).unwrap();
    assert!(all(&branch) == began);
    let other = Disk::branch(&kept.path, Some(kept.id), &anything).unwrap();
    assert!(all(&other) == content);
    // It is one of the branches that go when nothing was written to them, and else stay.
    drop(branch);
    assert!(!path.exists());
    let mut branch = Disk::branch(&monday.path, Some(monday.id), &anything).unwrap();
    write(&mut branch, 0, &[1; 512]);
    branch.start_over(&monday, &anything).unwrap();
    write(&mut branch, 0, &[2; 512]);
    let path = branch.path().to_owned();
    drop(branch);
    sound(&path);
    let branch = Disk::open(&path, Mode::Write, &anything).unwrap();
    assert_eq!(read(&branch, 0, 512), [2; 512]);
}

#[test]
fn a_write_on_a_fresh_branch_reads_nothing() {
    let bench = Bench::new(4096);
    let mut disk = bench.on_base("d");
    let monday = sealed(&mut disk);
    let mut disk = Disk::branch(&monday.path, None, &anything).unwrap();
    let mut content = bench.base.clone();
    for (offset, len) in [
        (40960, 4096),
        (512, 512),
        (7 * 512, 3 * 512),
        (100 * 512, 65536),
    ] {
        write(&mut disk, offset, &vec![0xcc; len]);
        content[offset as usize..][..len].fill(0xcc);
    }
    let counts = disk.counts();
    assert_eq!(
        (counts.base_reads, counts.layer_reads, counts.lookups),
        (0, 0, 0)
    );
    assert!(all(&disk) == content);
    assert!(disk.counts().base_reads > 0);
}

#[test]
fn fifty_layers_are_read_like_one() {
    const DEPTH: u64 = 50;
    let bench = Bench::new(8 * 64);
    let write_all = |disk: &mut Disk, layers: bool| {
        for block in 0..DEPTH {
            write(disk, block * 4096, &vec![block as u8 + 1; 4096]);
            if layers && block + 1 < DEPTH {
                sealed(disk);
            }
        }
    };
    let mut flat = bench.on_base("flat");
    write_all(&mut flat, false);
    let mut deep = bench.on_base("deep");
    write_all(&mut deep, true);
    drop(deep);
    let deep = bench.open("deep");
    assert_eq!(deep.info().unwrap().layers.len() as u64, DEPTH);
    for disk in [&flat, &deep] {
        for block in 0..64 {
            let owner = if block < DEPTH {
                block as u8 + 1
            } else {
                bench.base[block as usize * 4096]
            };
            assert_eq!(read(disk, block * 4096, 512)[0], owner);
        }
    }
    assert_eq!(flat.counts(), deep.counts());
    assert_eq!(deep.counts().lookups, 64);
}

#[test]
fn a_chain_is_opened_by_one_map() {
    let bench = Bench::new(64);
    let mut disk = bench.on_base("d");
    let mut layers = Vec::new();
    for n in 1..10 {
        write(&mut disk, n * 512, &[n as u8; 512]);
        layers.push(sealed(&mut disk));
    }
    let content = all(&disk);
    drop(disk);
    // Of all but the last, bitmaps and maps are destroyed: nobody asks them.
    for layer in &layers[..layers.len() - 1] {
        let file = fs::OpenOptions::new()
            .write(true)
            .open(&layer.path)
            .unwrap();
        use std::os::unix::fs::FileExt;
        file.write_all_at(&[0xff; 8192], 16_384).unwrap();
        let end = file.metadata().unwrap().len();
        file.write_all_at(&[0xff; 100], end - 4096).unwrap();
    }
    let disk = bench.open("d");
    assert!(all(&disk) == content);
    drop(disk);
    // But a check does.
    let problems = crate::check(&bench.path("d"), &anything).unwrap().problems;
    assert_eq!(problems.len(), layers.len() - 1, "{problems:?}");
}

#[test]
fn discarded_space_comes_back_and_reads_as_zeros() {
    let bench = Bench::new(16 << 10);
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &vec![7; 4 << 20]);
    disk.flush().unwrap();
    let allocated = |disk: &Disk| disk.info().unwrap().layers[0].allocated_bytes;
    let before = allocated(&disk);
    assert!(before >= 4 << 20, "{before}");
    // Half of it was written here, half is the base's.
    disk.discard(2 << 20, 4 << 20).unwrap();
    disk.flush().unwrap();
    let after = allocated(&disk);
    assert!(after <= before - (2 << 20) + 8192, "{after} after {before}");
    drop(disk);
    let disk = bench.open("d");
    assert_eq!(read(&disk, 0, 2 << 20), vec![7; 2 << 20]);
    assert!(read(&disk, 2 << 20, 4 << 20).iter().all(|byte| *byte == 0));
    assert!(read(&disk, 6 << 20, 2 << 20) == bench.base[6 << 20..]);
}

#[test]
fn a_discard_hides_what_a_process_left_that_was_killed() {
    let bench = Bench::new(64);
    let disk = bench.on_base("d");
    let data_at = disk.layers()[0].header.geometry.data_at();
    drop(disk);
    // As if it had been written and the bits had not: the file has it, nobody owns it.
    let file = fs::OpenOptions::new()
        .write(true)
        .open(bench.path("d"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xdd; 1024], data_at + 512).unwrap();
    for space in [Space::Free, Space::Keep] {
        let mut disk = bench.open("d");
        disk.write_zeroes(512, 1024, space).unwrap();
        assert_eq!(read(&disk, 512, 1024), [0; 1024]);
    }
}

#[test]
fn what_is_nothing_costs_nothing() {
    let bench = Bench::new(0);
    let path = bench.path("empty");
    let mut disk = Disk::create(&path, Some(1 << 40), &Foundation::Nothing, &anything).unwrap();
    disk.discard(0, 1 << 40).unwrap();
    disk.flush().unwrap();
    let info = disk.info().unwrap();
    assert_eq!(info.layers[0].owned_bytes, 0);
    assert!(info.layers[0].allocated_bytes <= 16_384, "{info:?}");
    assert_eq!(read(&disk, (1 << 40) - 512, 512), [0; 512]);
}

#[test]
fn twenty_branches_cost_what_they_changed() {
    const CHANGED: usize = 256 << 10;
    const BYTES: u64 = 2 << 30;
    let bench = Bench::new(0);
    let base = fs::File::create(bench.path("base")).unwrap();
    base.set_len(BYTES).unwrap();
    let mut disk = bench.on_base("d");
    let monday = sealed(&mut disk);
    let cost = |disk: &Disk| fs::metadata(disk.path()).unwrap().blocks() * 512;
    for n in 0..20u64 {
        let mut branch = Disk::branch(&monday.path, None, &anything).unwrap();
        assert_eq!(branch.bytes(), BYTES);
        write(&mut branch, n * 100_000 * 512, &vec![n as u8; CHANGED]);
        branch.flush().unwrap();
        // Its header, a page of bitmap, and the ends of the blocks that it begins and ends in.
        let cost = cost(&branch);
        assert!(cost <= (CHANGED + 8 * 4096) as u64, "{cost}");
    }
}

#[test]
fn nothing_written_is_nothing_sealed() {
    let bench = Bench::new(8);
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &[1; 512]);
    let one = sealed(&mut disk);
    let names = bench.names();
    assert_eq!(sealed(&mut disk), one);
    assert_eq!(bench.names(), names);
    write(&mut disk, 0, &[2; 512]);
    assert_ne!(sealed(&mut disk), one);
}

#[test]
fn a_larger_head_is_sealed_even_if_nothing_was_written_to_it() {
    let bench = Bench::new(8);
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &[1; 512]);
    let small = sealed(&mut disk);
    let on = Foundation::Layer(small.path.clone(), None);
    let mut large = Disk::create(&bench.path("large"), Some(1 << 20), &on, &anything).unwrap();
    let layer = sealed(&mut large);
    assert_ne!(layer, small);
    let branch = Disk::branch(&layer.path, Some(layer.id), &anything).unwrap();
    assert_eq!(branch.bytes(), 1 << 20);
    assert!(all(&branch) == all(&large));
    sound(&layer.path);
    // What is above it is as large as it is.
    assert_eq!(sealed(&mut large), layer);
}

#[test]
fn a_disk_in_use_grows_by_a_larger_head_and_never_shrinks() {
    const LARGER: u64 = 3 << 20;
    let bench = Bench::new(16);
    let mut disk = bench.on_base("d");
    let mut content = all(&disk);
    let smaller = disk.plan().grown_to(disk.bytes() - 512);
    assert!(matches!(smaller, Err(Error::Smaller { .. })));
    let crooked = disk.plan().grown_to(LARGER + 1);
    assert!(matches!(crooked, Err(Error::Size(_))));
    // Although nothing was written: the layer that ends is of the old size.
    let next = disk.plan().grown_to(LARGER).unwrap().prepare().unwrap();
    let small = disk.cut(next).unwrap().finish().unwrap();
    assert_eq!(disk.bytes(), LARGER);
    content.resize(LARGER as usize, 0);
    assert!(all(&disk) == content);
    write(&mut disk, LARGER - 1024, &[9; 1024]);
    content[LARGER as usize - 1024..].fill(9);
    let large = sealed(&mut disk);
    drop(disk);
    sound(&bench.path("d"));
    assert!(all(&bench.open("d")) == content);
    let branch = |layer: &crate::LayerRef| Disk::branch(&layer.path, None, &anything).unwrap();
    assert_eq!(branch(&small).bytes(), 16 * 512);
    assert!(all(&branch(&large)) == content);
}

#[test]
fn a_cut_that_does_not_come_about_leaves_nothing() {
    let bench = Bench::new(8);
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &[1; 512]);
    let names = bench.names();
    let next = disk.prepare().unwrap();
    assert_eq!(bench.names().len(), names.len() + 2);
    drop(next);
    assert_eq!(bench.names(), names);
    // One that was prepared before another came about is refused.
    let other = bench.on_base("other").prepare().unwrap();
    assert!(matches!(disk.cut(other), Err(Error::OtherLayer { .. })));
    sealed(&mut disk);
    assert_eq!(all(&disk)[..512], [1; 512]);
}

#[test]
fn a_head_is_not_written_to_by_the_name_that_it_gets_when_it_is_sealed() {
    let bench = Bench::new(8);
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &[1; 512]);
    let sealed = format!("d.{}.layer", disk.id().unwrap());
    drop(disk);
    // As when the host crashes before the seal is written.
    fs::rename(bench.path("d"), bench.path(&sealed)).unwrap();
    let names = bench.names();
    let refused = Disk::open(&bench.path(&sealed), Mode::Write, &anything);
    assert!(
        matches!(refused, Err(Error::SealedName { .. })),
        "{refused:?}"
    );
    assert_eq!(bench.names(), names);
    fs::rename(bench.path(&sealed), bench.path("d")).unwrap();
    assert_eq!(all(&bench.open("d"))[..512], [1; 512]);
}

#[test]
fn a_cut_can_be_finished_after_the_next_and_a_flush_needs_no_finish() {
    let bench = Bench::new(8);
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &[1; 512]);
    let first = disk.cut(disk.prepare().unwrap()).unwrap();
    write(&mut disk, 512, &[2; 512]);
    disk.flush().unwrap();
    let second = disk.cut(disk.prepare().unwrap()).unwrap();
    write(&mut disk, 1024, &[3; 512]);
    let second = second.finish().unwrap();
    let first = first.finish().unwrap();
    let at = |layer: &crate::LayerRef| {
        let disk = Disk::open(&layer.path, Mode::Read, &anything).unwrap();
        let content = all(&disk);
        [0, 512, 1024].map(|at| content[at])
    };
    let base = &bench.base;
    assert_eq!(at(&first), [1, base[512], base[1024]]);
    assert_eq!(at(&second), [1, 2, base[1024]]);
}

#[test]
fn one_writes_and_what_is_below_stays_as_it_is() {
    let bench = Bench::new(8);
    let mut disk = bench.on_base("d");
    let open = |name: &str, mode| Disk::open(&bench.path(name), mode, &anything);
    assert!(matches!(open("d", Mode::Write), Err(Error::InUse { .. })));
    assert!(matches!(open("d", Mode::Read), Err(Error::InUse { .. })));
    write(&mut disk, 0, &[1; 512]);
    let layer = sealed(&mut disk);
    let on = |path: &Path| Disk::branch(path, None, &anything);
    assert!(matches!(
        open(layer.path.to_str().unwrap(), Mode::Write),
        Err(Error::Sealed { .. })
    ));
    drop(disk);
    assert!(matches!(on(&bench.path("d")), Err(Error::NotSealed { .. })));
    let reader = open("d", Mode::Read).unwrap();
    assert!(reader.read_only() && open("d", Mode::Read).is_ok());
    assert!(matches!(open("d", Mode::Write), Err(Error::InUse { .. })));
    let mut reader = reader;
    let error = reader.write(0, &mut &[0; 512][..]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert!(reader.discard(0, 512).is_err());
    // The base is somebody's disk: not while others stand on it.
    assert!(
        fs::File::open(bench.path("base"))
            .unwrap()
            .try_lock()
            .is_err()
    );
}

#[test]
fn a_chain_of_other_files_is_refused() {
    let bench = Bench::new(8);
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &[1; 512]);
    let layer = sealed(&mut disk);
    drop(disk);
    let open = || Disk::open(&bench.path("d"), Mode::Read, &anything).map(|_| ());
    open().unwrap();
    // Another layer in its place.
    let mut other = bench.on_base("other");
    write(&mut other, 0, &[1; 512]);
    let another = sealed(&mut other);
    drop(other);
    let kept = bench.path("kept");
    fs::rename(&layer.path, &kept).unwrap();
    fs::copy(&another.path, &layer.path).unwrap();
    assert!(matches!(open(), Err(Error::OtherLayer { .. })));
    fs::rename(&kept, &layer.path).unwrap();
    assert!(matches!(
        Disk::branch(&layer.path, Some(another.id), &anything),
        Err(Error::OtherLayer { .. })
    ));
    // A base that was written to, and one of another size; a copy is taken.
    let base = bench.path("base");
    fs::copy(&base, bench.path("copy")).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&base).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    assert!(matches!(open(), Err(Error::BaseChanged { .. })));
    fs::rename(bench.path("copy"), &base).unwrap();
    open().unwrap();
    fs::OpenOptions::new()
        .write(true)
        .open(&base)
        .unwrap()
        .set_len(512)
        .unwrap();
    assert!(matches!(open(), Err(Error::BaseChanged { .. })));
}

#[test]
fn only_what_the_rule_allows_is_opened() {
    let bench = Bench::new(8);
    drop(bench.on_base("d"));
    let base = bench.path("base");
    let not_base = |path: &Path| path != base;
    let refused = Disk::open(&bench.path("d"), Mode::Read, &not_base);
    assert!(matches!(refused, Err(Error::NotAllowed { path }) if path == base));
    let refused = Disk::create(
        &bench.path("e"),
        None,
        &Foundation::Raw(base.clone()),
        &not_base,
    );
    assert!(matches!(refused, Err(Error::NotAllowed { .. })));
    let refused = Disk::create(
        &bench.path("e"),
        None,
        &Foundation::Raw(base),
        &|_: &Path| false,
    );
    assert!(matches!(refused, Err(Error::NotAllowed { .. })));
    assert_eq!(bench.names(), ["base", "d"]);
}

#[test]
fn a_directory_can_be_moved_as_a_whole() {
    let bench = Bench::new(8);
    let mut disk = bench.on_base("d");
    write(&mut disk, 512, &[9; 512]);
    sealed(&mut disk);
    let content = all(&disk);
    drop(disk);
    let there = tempfile::tempdir().unwrap();
    for name in bench.names() {
        fs::rename(bench.path(&name), there.path().join(name)).unwrap();
    }
    let disk = Disk::open(&there.path().join("d"), Mode::Write, &anything).unwrap();
    assert!(all(&disk) == content);
}

#[test]
fn a_larger_disk_can_stand_on_a_smaller_but_not_the_other_way_round() {
    let bench = Bench::new(8);
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &[1; 512]);
    let layer = sealed(&mut disk);
    let on = Foundation::Layer(layer.path, None);
    let mut large = Disk::create(&bench.path("large"), Some(1 << 20), &on, &anything).unwrap();
    let content = all(&large);
    assert_eq!(content[..512], [1; 512]);
    assert!(content[4096..].iter().all(|byte| *byte == 0));
    write(&mut large, (1 << 20) - 512, &[5; 512]);
    let layer = sealed(&mut large);
    let again = Disk::branch(&layer.path, None, &anything).unwrap();
    assert_eq!(read(&again, (1 << 20) - 512, 512), [5; 512]);
    sound(&layer.path);
    let small = Disk::create(&bench.path("small"), Some(2048), &on, &anything);
    assert!(matches!(small, Err(Error::Size(2048))));
    let nothing = Disk::create(
        &bench.path("nothing"),
        None,
        &Foundation::Nothing,
        &anything,
    );
    assert!(matches!(nothing, Err(Error::NoSize)));
}

#[test]
fn requests_beyond_the_disk_or_not_of_whole_sectors_fail() {
    let bench = Bench::new(8);
    let mut disk = bench.on_base("d");
    for (offset, len) in [
        (4096, 512),
        (0, 4608),
        (1, 512),
        (0, 511),
        (u64::MAX - 511, 512),
    ] {
        let mut bytes = vec![0; len];
        assert!(disk.read(offset, &mut &mut bytes[..]).is_err());
        assert!(disk.write(offset, &mut &bytes[..]).is_err());
        assert!(disk.discard(offset, len as u64).is_err());
    }
    disk.read(4096, &mut &mut [][..]).unwrap();
}

#[test]
fn a_name_that_is_taken_is_left_alone() {
    let bench = Bench::new(8);
    let on = Foundation::Raw(bench.path("base"));
    let taken = Disk::create(&bench.path("base"), None, &on, &anything);
    assert!(matches!(taken, Err(Error::Exists { .. })));
    assert_eq!(bench.names(), ["base"]);
    assert!(fs::read(bench.path("base")).unwrap() == bench.base);
    let raw = Disk::open(&bench.path("base"), Mode::Write, &anything);
    assert!(matches!(raw, Err(Error::NotALayer { .. })));
}

#[test]
fn a_raw_image_goes_in_and_comes_out_with_its_holes() {
    let bench = Bench::new(0);
    let raw = bench.path("raw");
    let file = fs::File::create(&raw).unwrap();
    file.set_len((8 << 20) + 100).unwrap();
    use std::os::unix::fs::FileExt;
    file.write_all_at(&[3; 5000], 1 << 20).unwrap();
    let copied = crate::import_raw(&raw, &bench.path("d"), &anything).unwrap();
    assert_eq!((copied.bytes, copied.data_bytes), ((8 << 20) + 512, 8192));
    let disk = bench.open("d");
    assert_eq!(disk.info().unwrap().layers[0].owned_bytes, 8192);
    let exported = crate::export_raw(&disk, &bench.path("out")).unwrap();
    assert_eq!(exported, copied);
    let mut expected = fs::read(&raw).unwrap();
    expected.resize((8 << 20) + 512, 0);
    assert!(fs::read(bench.path("out")).unwrap() == expected);
    assert!(fs::metadata(bench.path("out")).unwrap().blocks() * 512 <= 64 << 10);
    let again = crate::export_raw(&disk, &bench.path("out"));
    assert!(matches!(again, Err(Error::Exists { .. })));
}

#[test]
fn a_branch_that_nobody_wrote_to_leaves_nothing() {
    let bench = Bench::new(8);
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &[1; 512]);
    let layer = sealed(&mut disk);
    let names = bench.names();
    drop(Disk::branch(&layer.path, None, &anything).unwrap());
    assert_eq!(bench.names(), names);
    let mut branch = Disk::branch(&layer.path, None, &anything).unwrap();
    branch.discard(0, 512).unwrap();
    sealed(&mut branch);
    drop(branch);
    assert_eq!(bench.names().len(), names.len() + 2);
}

#[test]
fn what_was_put_in_the_place_of_a_head_is_not_replaced() {
    let bench = Bench::new(8);
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &[1; 512]);
    let next = disk.prepare().unwrap();
    fs::rename(bench.path("d"), bench.path("moved")).unwrap();
    fs::write(bench.path("d"), "something else").unwrap();
    assert!(matches!(disk.cut(next), Err(Error::OtherLayer { .. })));
    assert_eq!(fs::read(bench.path("d")).unwrap(), b"something else");
    drop(disk);
    assert_eq!(all(&bench.open("moved"))[..512], [1; 512]);
}
