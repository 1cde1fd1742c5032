//! Disks of every released version of the format can be read, written to, and branched.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

use std::path::Path;

use branch_disk::{Disk, Foundation, LayerRef, Mode, Space, anything, check};

const BYTES: u64 = 1 << 20;

/// Sectors that are written, by whom, and with what: the first layer, the second, the head.
const WRITES: [&[(u64, u64, u8)]; 3] = [
    &[(0, 8, 1), (100, 3, 2), (1024, 64, 3)],
    &[(101, 1, 4), (1000, 40, 5)],
    &[(0, 1, 6), (2047, 1, 7)],
];
/// Sectors that the second layer discards.
const DISCARDED: (u64, u64) = (1072, 16);

/// What the disk of so many layers holds.
fn content(layers: usize) -> Vec<u8> {
    let mut content = vec![0; BYTES as usize];
    for (number, writes) in WRITES.iter().take(layers).enumerate() {
        for &(at, count, byte) in *writes {
            content[(at * 512) as usize..((at + count) * 512) as usize].fill(byte);
        }
        if number == 1 {
            let (at, count) = DISCARDED;
            content[(at * 512) as usize..((at + count) * 512) as usize].fill(0);
        }
    }
    content
}

/// A disk whose first two layers were merged once the third was there, which knows them both.
fn make_merged(directory: &Path) {
    make(directory);
    let name = |number: usize| {
        let name = std::fs::read_to_string(directory.join(format!("{number}.name"))).unwrap();
        directory.join(name)
    };
    let mut disk = Disk::open(&name(2), Mode::Write, &anything).unwrap();
    let sealed = disk.cut(disk.prepare().unwrap()).unwrap().finish().unwrap();
    disk.write(5 * 512, &mut &[9; 512][..]).unwrap();
    disk.flush().unwrap();
    let [lowest, topmost, third] = *disk.sealed_layers() else {
        panic!("it has other layers");
    };
    assert_eq!(third, sealed.id);
    let merged = disk
        .merge(lowest, topmost)
        .unwrap()
        .write(&|| true)
        .unwrap();
    assert!(disk.adopt(&merged));
    merged.remove_rest().unwrap();
    std::fs::rename(directory.join("2.name"), directory.join("3.name")).unwrap();
    std::fs::remove_file(directory.join("0.name")).unwrap();
    std::fs::write(
        directory.join("2.name"),
        sealed.path.file_name().unwrap().as_encoded_bytes(),
    )
    .unwrap();
}

fn make(directory: &Path) {
    let path = directory.join("head.disk");
    let mut disk = Disk::create(&path, Some(BYTES), &Foundation::Nothing, &anything).unwrap();
    for (number, writes) in WRITES.iter().enumerate() {
        for &(at, count, byte) in *writes {
            let bytes = vec![byte; (count * 512) as usize];
            disk.write(at * 512, &mut &bytes[..]).unwrap();
        }
        if number == 1 {
            let (at, count) = DISCARDED;
            disk.write_zeroes(at * 512, count * 512, Space::Free)
                .unwrap();
        }
        if number < 2 {
            let cut = disk.cut(disk.prepare().unwrap()).unwrap();
            let LayerRef { path, .. } = cut.finish().unwrap();
            std::fs::write(
                directory.join(format!("{number}.name")),
                path.file_name().unwrap().as_encoded_bytes(),
            )
            .unwrap();
        }
    }
    disk.flush().unwrap();
    std::fs::write(
        directory.join("2.name"),
        disk.path().file_name().unwrap().as_encoded_bytes(),
    )
    .unwrap();
}

fn holds(disk: &Disk, expected: &[u8]) {
    let mut read = vec![0; expected.len()];
    disk.read(0, &mut &mut read[..]).unwrap();
    assert!(read == expected);
}

#[test]
fn a_disk_of_version_1_is_whole() {
    let kept = golden::tree("disk", 1, make);
    let layer = |number: usize| {
        let name = std::fs::read_to_string(kept.path().join(format!("{number}.name"))).unwrap();
        kept.path().join(name)
    };
    for number in 0..3 {
        let checked = check(&layer(number), &anything).unwrap();
        assert_eq!((checked.layers, checked.without_map), (number + 1, 0));
        assert!(checked.problems.is_empty(), "{:?}", checked.problems);
        let disk = Disk::open(&layer(number), Mode::Read, &anything).unwrap();
        holds(&disk, &content(number + 1));
    }

    // It goes on as one of today, and so does a branch of what was sealed.
    let mut expected = content(3);
    let mut head = Disk::open(&layer(2), Mode::Write, &anything).unwrap();
    head.write(2000 * 512, &mut &[8; 1024][..]).unwrap();
    expected[2000 * 512..2002 * 512].fill(8);
    head.flush().unwrap();
    head.cut(head.prepare().unwrap()).unwrap().finish().unwrap();
    holds(&head, &expected);
    let branch = Disk::branch(&layer(1), None, &anything).unwrap();
    holds(&branch, &content(2));
}

#[test]
fn a_disk_of_version_2_is_whole() {
    let kept = golden::tree("disk", 2, make_merged);
    let layer = |number: usize| {
        let name = std::fs::read_to_string(kept.path().join(format!("{number}.name"))).unwrap();
        kept.path().join(name)
    };
    let mut head = content(3);
    head[5 * 512..6 * 512].fill(9);
    for (number, layers, expected) in [(1, 1, content(2)), (2, 2, content(3)), (3, 3, head)] {
        let checked = check(&layer(number), &anything).unwrap();
        assert_eq!((checked.layers, checked.without_map), (layers, 0));
        assert!(checked.problems.is_empty(), "{:?}", checked.problems);
        let disk = Disk::open(&layer(number), Mode::Read, &anything).unwrap();
        holds(&disk, &expected);
    }

    // It goes on as one of today.
    let mut disk = Disk::open(&layer(3), Mode::Write, &anything).unwrap();
    disk.write(6 * 512, &mut &[1; 512][..]).unwrap();
    let cut = disk.cut(disk.prepare().unwrap()).unwrap().finish().unwrap();
    let branch = Disk::branch(&cut.path, Some(cut.id), &anything).unwrap();
    assert_eq!(branch.sealed_layers().len(), 3);
}
